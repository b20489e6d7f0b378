// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func record(name string, ttl uint32) dns.RR {
	return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl}, A: net.IPv4(192, 0, 2, 1)}
}

func TestLifetime(t *testing.T) {
	soa := func(ttl, minimum uint32) []dns.RR {
		return []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl}, Minttl: minimum}}
	}
	alias := &dns.CNAME{Hdr: dns.RR_Header{Name: "a.", Rrtype: dns.TypeCNAME, Ttl: 7}, Target: "b."}
	for name, c := range map[string]struct {
		rcode     int
		truncated bool
		answer    []dns.RR
		ns        []dns.RR
		want      time.Duration
	}{
		"the smallest counts":              {answer: []dns.RR{record("a.", 60), record("a.", 30)}, want: 30 * time.Second},
		"zero is not kept":                 {answer: []dns.RR{record("a.", 0)}},
		"a day is too long":                {answer: []dns.RR{record("a.", 86400)}, want: time.Hour},
		"a part is not kept":               {truncated: true, answer: []dns.RR{record("a.", 60)}},
		"failures are not kept":            {rcode: dns.RcodeServerFailure},
		"no such name":                     {rcode: dns.RcodeNameError, ns: soa(60, 20), want: 20 * time.Second},
		"no such name, SOA's own TTL":      {rcode: dns.RcodeNameError, ns: soa(10, 20), want: 10 * time.Second},
		"no such name, without SOA":        {rcode: dns.RcodeNameError},
		"no such record":                   {ns: soa(60, 20), want: 20 * time.Second},
		"no such record, for too long":     {ns: soa(86400, 86400), want: 5 * time.Minute},
		"an alias to nothing, without SOA": {answer: []dns.RR{alias}},
		"an alias to nothing":              {answer: []dns.RR{alias}, ns: soa(60, 20), want: 7 * time.Second},
	} {
		m := new(dns.Msg).SetQuestion("a.", dns.TypeA)
		m.Rcode, m.Truncated, m.Answer, m.Ns = c.rcode, c.truncated, c.answer, c.ns
		m.SetEdns0(1232, false) // its "TTL" is none
		if got := lifetime(m); got != c.want {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func TestCacheCountsDownAndForgets(t *testing.T) {
	now := time.Unix(0, 0)
	c := newAnswerCache(3, func() time.Time { return now })
	put := func(name string, ttl uint32) {
		m := new(dns.Msg).SetQuestion(name, dns.TypeA)
		m.Answer = []dns.RR{record(name, ttl)}
		c.put(question{name: name, qtype: dns.TypeA}, m, c.current())
	}
	get := func(name string) *dns.Msg { return c.get(question{name: name, qtype: dns.TypeA}) }
	put("a.", 10)
	now = now.Add(4 * time.Second)
	if m := get("a."); m == nil || m.Answer[0].Header().Ttl != 6 {
		t.Errorf("after 4 of 10 seconds: %v", m)
	}
	get("a.").Answer[0].Header().Ttl = 99 // a copy
	if m := get("a."); m.Answer[0].Header().Ttl != 6 {
		t.Error("a caller changed what is kept")
	}
	if c.get(question{name: "a.", qtype: dns.TypeA, do: true}) != nil {
		t.Error("an answer without signatures was given to who asked for them")
	}
	now = now.Add(6 * time.Second)
	if get("a.") != nil || c.len() != 0 {
		t.Error("an answer was kept too long")
	}
	for i := range 3 {
		put(strconv.Itoa(i)+".", 60)
	}
	get("0.")
	put("3.", 60)
	if get("0.") == nil || get("1.") != nil || c.len() != 3 {
		t.Error("not the least recently used answer went")
	}
	before := c.current()
	c.clear()
	m := new(dns.Msg).SetQuestion("late.", dns.TypeA)
	m.Answer = []dns.RR{record("late.", 60)}
	c.put(question{name: "late.", qtype: dns.TypeA}, m, before)
	if c.len() != 0 {
		t.Error("an answer from before was kept")
	}
}
