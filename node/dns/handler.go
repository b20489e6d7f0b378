// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// ednsSize is the largest datagram we send and say that we take.
	ednsSize = 1232
	// maxAliases bounds how many names an alias may lead through within the cluster.
	maxAliases = 8
)

// Kinds of question, for metrics.
const (
	kindCluster = "cluster"
	kindReverse = "reverse"
	kindForward = "forward"
	kindRefused = "refused"
)

// handler answers questions.
type handler struct {
	zone    *zone
	forward *forwarder
	// prefixes are the cluster's own ranges: reverse questions about them are nobody else's to answer.
	prefixes []netip.Prefix
	// ready is set once the table holds everything; before, a name that is not in it may exist.
	ready   *atomic.Bool
	metrics *metrics
	ctx     context.Context // ends with the server
}

// ServeDNS implements dns.Handler.
func (h *handler) ServeDNS(w dns.ResponseWriter, request *dns.Msg) {
	began := time.Now()
	proto, size := "tcp", dns.MaxMsgSize
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		proto, size = "udp", dns.MinMsgSize
		if opt := request.IsEdns0(); opt != nil {
			size = max(size, min(int(opt.UDPSize()), ednsSize))
		}
	}
	reply, kind := h.answer(h.ctx, request)
	reply.Truncate(size)
	_ = w.WriteMsg(reply) // nobody to tell but the asker, who asks again
	h.metrics.queries.WithLabelValues(kind, proto, rcodeLabel(reply.Rcode)).Inc()
	h.metrics.duration.WithLabelValues(kind).Observe(time.Since(began).Seconds())
}

func rcodeLabel(rcode int) string {
	if text, ok := dns.RcodeToString[rcode]; ok {
		return text
	}
	return strconv.Itoa(rcode)
}

// answer makes the whole reply to a request, except that it may be too long.
func (h *handler) answer(ctx context.Context, request *dns.Msg) (reply *dns.Msg, kind string) {
	reply, kind = h.decide(ctx, request)
	if opt := request.IsEdns0(); opt != nil {
		reply.SetEdns0(ednsSize, opt.Do())
		if opt.Version() != 0 {
			reply.Answer, reply.Ns = nil, nil
			reply.Extra = reply.Extra[len(reply.Extra)-1:]
			reply.Rcode = dns.RcodeBadVers
		}
	}
	return reply, kind
}

func (h *handler) decide(ctx context.Context, request *dns.Msg) (*dns.Msg, string) {
	reply := new(dns.Msg)
	reply.SetReply(request)
	reply.RecursionAvailable = true
	reply.Rcode = dns.RcodeSuccess
	switch {
	case request.Opcode != dns.OpcodeQuery:
		reply.Rcode = dns.RcodeNotImplemented
		return reply, kindRefused
	case len(request.Question) != 1:
		reply.Rcode = dns.RcodeFormatError
		return reply, kindRefused
	}
	q := request.Question[0]
	switch {
	case q.Qclass != dns.ClassINET, q.Qtype == dns.TypeAXFR, q.Qtype == dns.TypeIXFR:
		reply.Rcode = dns.RcodeRefused
		return reply, kindRefused
	case q.Qtype == dns.TypeANY: // RFC 8482: there is no use for it but abuse
		reply.Answer = []dns.RR{&dns.HINFO{Hdr: header(q.Name, dns.TypeHINFO), Cpu: "RFC8482"}}
		return reply, kindRefused
	}
	name := strings.ToLower(q.Name)
	if h.zone.within(name) {
		h.cluster(ctx, reply, name, request)
		return reply, kindCluster
	}
	if address, ok := reverseAddress(name); ok && h.reverse(reply, address) {
		return reply, kindReverse
	}
	h.outside(ctx, reply, asked(request, name, q.Qtype))
	return reply, kindForward
}

// asked makes a question to forward out of a request.
func asked(request *dns.Msg, name string, qtype uint16) question {
	q := question{name: name, qtype: qtype, rd: request.RecursionDesired, cd: request.CheckingDisabled}
	if opt := request.IsEdns0(); opt != nil {
		q.do = opt.Do()
	}
	return q
}

// cluster answers from the table.
func (h *handler) cluster(ctx context.Context, reply *dns.Msg, name string, request *dns.Msg) {
	q := request.Question[0]
	reply.Authoritative = true
	owner := q.Name
	for range maxAliases {
		f := h.zone.lookup(name, owner, q.Qtype)
		if !f.exists && !h.ready.Load() {
			// Whoever is told now that a name does not exist may not ask again.
			reply.Authoritative, reply.Answer = false, nil
			reply.Rcode = dns.RcodeServerFailure
			return
		}
		reply.Answer = append(reply.Answer, f.answer...)
		reply.Extra = append(reply.Extra, f.extra...)
		if f.alias == "" {
			if !f.exists {
				reply.Rcode = dns.RcodeNameError
			}
			if len(f.answer) == 0 {
				reply.Ns = []dns.RR{h.zone.soa()}
			}
			return
		}
		if !h.zone.within(f.alias) {
			h.alias(ctx, reply, asked(request, f.alias, q.Qtype))
			return
		}
		name, owner = f.alias, f.alias
	}
	reply.Answer = nil // the aliases lead in a circle
	reply.Rcode = dns.RcodeServerFailure
}

// alias adds what a name outside resolves to: stub resolvers do not follow aliases themselves.
func (h *handler) alias(ctx context.Context, reply *dns.Msg, q question) {
	answer, err := h.forward.resolve(ctx, q)
	if err != nil {
		reply.Answer = nil
		reply.Rcode = dns.RcodeServerFailure
		return
	}
	reply.Rcode = answer.Rcode
	reply.Answer = append(reply.Answer, answer.Answer...)
	reply.Ns = append(reply.Ns, answer.Ns...)
}

// reverse says whether the address was ours to answer for.
func (h *handler) reverse(reply *dns.Msg, address netip.Addr) bool {
	q := reply.Question[0]
	pointers := h.zone.pointers(address, q.Name)
	if len(pointers) > 0 {
		reply.Authoritative = true
		if q.Qtype == dns.TypePTR {
			reply.Answer = pointers
			return true
		}
	} else {
		ours := false
		for _, prefix := range h.prefixes {
			ours = ours || prefix.Contains(address)
		}
		if !ours {
			return false
		}
		if !h.ready.Load() {
			reply.Rcode = dns.RcodeServerFailure
			return true
		}
		reply.Authoritative = true
		reply.Rcode = dns.RcodeNameError
	}
	reply.Ns = []dns.RR{soa(q.Name, h.zone.nameserver(), h.zone.domain)}
	return true
}

func (h *handler) outside(ctx context.Context, reply *dns.Msg, q question) {
	answer, err := h.forward.resolve(ctx, q)
	if err != nil {
		reply.Rcode = dns.RcodeServerFailure
		return
	}
	reply.Rcode, reply.Truncated, reply.AuthenticatedData = answer.Rcode, answer.Truncated, answer.AuthenticatedData
	reply.Answer, reply.Ns = answer.Answer, answer.Ns
	for _, record := range answer.Extra {
		if record.Header().Rrtype != dns.TypeOPT { // it is between the server and us
			reply.Extra = append(reply.Extra, record)
		}
	}
	// The answer speaks of the name in the spelling in which we asked.
	spelling := reply.Question[0].Name
	for _, record := range reply.Answer {
		if h := record.Header(); h.Name != spelling && strings.EqualFold(h.Name, spelling) {
			h.Name = spelling
		}
	}
}
