// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"container/list"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// cacheEntries bounds the answers kept; at some hundred bytes each that is a few megabytes.
	cacheEntries = 10000
	// longest times that answers are kept, whatever they say.
	maxPositiveTTL = time.Hour
	maxNegativeTTL = 5 * time.Minute
)

// question identifies an answer. Flags that change the answer are part of it.
type question struct {
	name       string // lower case
	qtype      uint16
	do, cd, rd bool
}

// answerCache keeps answers from upstreams for as long as these allow, the least recently used ones go
// first when it is full.
type answerCache struct {
	mu      sync.Mutex
	entries map[question]*list.Element
	recent  *list.List // of *cached, most recently used first
	limit   int
	now     func() time.Time
	// era counts how often everything was forgotten.
	era uint64
}

type cached struct {
	question question
	message  *dns.Msg // never written after it was stored
	stored   time.Time
	expires  time.Time
}

func newAnswerCache(limit int, now func() time.Time) *answerCache {
	return &answerCache{entries: map[question]*list.Element{}, recent: list.New(), limit: limit, now: now}
}

// get returns a copy of an answer with its times to live counted down, or nil.
func (c *answerCache) get(q question) *dns.Msg {
	now := c.now()
	c.mu.Lock()
	element := c.entries[q]
	if element == nil {
		c.mu.Unlock()
		return nil
	}
	entry := element.Value.(*cached)
	if !now.Before(entry.expires) {
		c.remove(element)
		c.mu.Unlock()
		return nil
	}
	c.recent.MoveToFront(element)
	c.mu.Unlock()

	message := entry.message.Copy()
	age := uint32(now.Sub(entry.stored) / time.Second)
	for _, section := range [][]dns.RR{message.Answer, message.Ns, message.Extra} {
		for _, record := range section {
			if h := record.Header(); h.Rrtype != dns.TypeOPT {
				h.Ttl -= min(h.Ttl, age)
			}
		}
	}
	return message
}

// put keeps an answer if it may be kept and was asked for in this era. The cache owns message from
// then on.
func (c *answerCache) put(q question, message *dns.Msg, era uint64) {
	keep := lifetime(message)
	if keep <= 0 {
		return
	}
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if era != c.era {
		return
	}
	if element := c.entries[q]; element != nil {
		c.remove(element)
	}
	c.entries[q] = c.recent.PushFront(&cached{question: q, message: message, stored: now, expires: now.Add(keep)})
	for c.recent.Len() > c.limit {
		c.remove(c.recent.Back())
	}
}

func (c *answerCache) remove(element *list.Element) {
	c.recent.Remove(element)
	delete(c.entries, element.Value.(*cached).question)
}

// clear forgets everything, and what is being asked for now.
func (c *answerCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.era++
	clear(c.entries)
	c.recent.Init()
}

func (c *answerCache) current() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.era
}

func (c *answerCache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recent.Len()
}

// lifetime is the smallest time to live in a complete answer; for a negative one, what its SOA
// allows (RFC 2308), and nothing if it has none.
func lifetime(m *dns.Msg) time.Duration {
	if m.Truncated {
		return 0
	}
	negative := m.Rcode == dns.RcodeNameError
	switch {
	case m.Rcode == dns.RcodeSuccess && !answers(m):
		negative = true
	case m.Rcode != dns.RcodeSuccess && !negative:
		return 0
	}
	least := maxPositiveTTL
	if negative {
		least = 0
		for _, record := range m.Ns {
			if s, ok := record.(*dns.SOA); ok {
				least = min(time.Duration(min(s.Hdr.Ttl, s.Minttl))*time.Second, maxNegativeTTL)
			}
		}
	}
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, record := range section {
			if h := record.Header(); h.Rrtype != dns.TypeOPT {
				least = min(least, time.Duration(h.Ttl)*time.Second)
			}
		}
	}
	return least
}

// answers says whether there is a record of the type asked for, and not only aliases.
func answers(m *dns.Msg) bool {
	if len(m.Question) == 0 {
		return false
	}
	for _, record := range m.Answer {
		if t := record.Header().Rrtype; t == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY {
			return true
		}
	}
	return false
}
