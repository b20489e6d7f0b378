// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

const (
	// tryTimeout bounds one server's answer, forwardTimeout that of all together. Stub resolvers
	// ask again after five seconds.
	tryTimeout     = 1500 * time.Millisecond
	forwardTimeout = 4500 * time.Millisecond
	// forwardsInFlight bounds questions that wait for servers, so that dead ones cost a bounded
	// number of sockets; what comes on top is refused at once.
	forwardsInFlight = 1000
	// forwardSize is the size of UDP answers we ask servers for: what passes everywhere without
	// fragments (DNS flag day 2020).
	forwardSize = 1232
)

var (
	errNoUpstream = errors.New("no upstream DNS server is known")
	errBusy       = errors.New("too many questions wait for upstream DNS servers")
)

// forwarder asks other servers. Only one question of a kind is under way at a time. That also
// bounds a loop: should a server send our question back to us by a way that selfless (upstreams.go)
// cannot see, it waits for itself once and fails, instead of multiplying.
type forwarder struct {
	servers func() []string // "address:port", in order of preference
	cache   *answerCache
	flights singleflight.Group
	slots   chan struct{}
	metrics *metrics
	// lucky is the index of the server that answered last; it is asked first.
	lucky atomic.Uint32
}

func newForwarder(servers func() []string, m *metrics) *forwarder {
	return &forwarder{
		servers: servers,
		cache:   newAnswerCache(cacheEntries, time.Now),
		slots:   make(chan struct{}, forwardsInFlight),
		metrics: m,
	}
}

// resolve returns an answer that the caller may change.
func (f *forwarder) resolve(ctx context.Context, q question) (*dns.Msg, error) {
	if answer := f.cache.get(q); answer != nil {
		f.metrics.cache.WithLabelValues("hit").Inc()
		return answer, nil
	}
	f.metrics.cache.WithLabelValues("miss").Inc()
	era := f.cache.current() // before the servers are read: a change forgets what the old ones say
	servers := f.servers()
	if len(servers) == 0 {
		return nil, errNoUpstream
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, errBusy
	}
	flight := f.flights.DoChan(fmt.Sprint(q), func() (any, error) {
		// Others may wait for the answer when the first asker has gone.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forwardTimeout)
		defer cancel()
		answer, err := f.ask(ctx, q, servers)
		if err == nil {
			f.cache.put(q, answer, era)
		}
		return answer, err
	})
	select {
	case result := <-flight:
		if result.Err != nil {
			return nil, result.Err
		}
		return result.Val.(*dns.Msg).Copy(), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ask tries one server after the other, beginning with the one that answered last.
func (f *forwarder) ask(ctx context.Context, q question, servers []string) (*dns.Msg, error) {
	first := f.lucky.Load()
	var failed *dns.Msg
	var errs []error
	for i := range servers {
		at := (int(first) + i) % len(servers)
		began := time.Now()
		answer, err := exchange(ctx, q, servers[at])
		switch {
		case err != nil:
			f.metrics.upstream(servers[at], "error", began)
			errs = append(errs, fmt.Errorf("%s: %w", servers[at], err))
		case answer.Rcode == dns.RcodeServerFailure || answer.Rcode == dns.RcodeRefused || answer.Rcode == dns.RcodeNotImplemented:
			f.metrics.upstream(servers[at], strings.ToLower(dns.RcodeToString[answer.Rcode]), began)
			failed = answer // another server may know better
		default:
			f.metrics.upstream(servers[at], "ok", began)
			f.lucky.Store(uint32(at))
			return answer, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	if failed != nil {
		return failed, nil
	}
	return nil, fmt.Errorf("asking for %s: %w", q.name, errors.Join(errs...))
}

// exchange asks one server, by TCP if its answer does not fit into a datagram.
func exchange(ctx context.Context, q question, server string) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	m := &dns.Msg{Question: []dns.Question{{Name: q.name, Qtype: q.qtype, Qclass: dns.ClassINET}}}
	m.Id = dns.Id()
	m.RecursionDesired, m.CheckingDisabled = q.rd, q.cd
	m.SetEdns0(forwardSize, q.do)
	answer, _, err := (&dns.Client{Net: "udp", UDPSize: forwardSize, Timeout: tryTimeout}).ExchangeContext(ctx, m, server)
	if err == nil && answer.Rcode == dns.RcodeFormatError {
		// Some old servers do not know EDNS.
		m.Extra = nil
		answer, _, err = (&dns.Client{Net: "udp", Timeout: tryTimeout}).ExchangeContext(ctx, m, server)
	}
	if err == nil && answer.Truncated {
		full, _, tcpErr := (&dns.Client{Net: "tcp", Timeout: tryTimeout}).ExchangeContext(ctx, m, server)
		if tcpErr == nil {
			answer = full
		} // else the part is better than nothing, and says that it is one
	}
	if err != nil {
		return nil, err
	}
	if !answer.Response || len(answer.Question) != 1 || !strings.EqualFold(answer.Question[0].Name, q.name) || answer.Question[0].Qtype != q.qtype {
		return nil, errors.New("the answer is to another question")
	}
	return answer, nil
}
