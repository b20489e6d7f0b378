// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
	"sync/atomic"

	"github.com/miekg/dns"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// ttl of every record of the cluster, in seconds, and of the knowledge that there is none:
	// services come and go.
	ttl = 5
	// specVersion is of the Kubernetes DNS specification that the answers follow.
	specVersion = "1.1.0"
)

// zone answers questions about the cluster's domain. All answers follow the Kubernetes DNS-based
// service discovery specification 1.1.0 and, where that says nothing, CoreDNS.
type zone struct {
	domain string // "cluster.local.", lower case
	table  *table
	turn   atomic.Uint32 // rotates the order of addresses
}

// found is an answer before it becomes a message.
type found struct {
	exists bool // the name exists, though perhaps not with records of the type asked for
	answer []dns.RR
	extra  []dns.RR
	// alias is the name outside that an ExternalName service stands for, to be resolved as well.
	alias string
}

// within says whether a name in lower case belongs to the zone.
func (z *zone) within(name string) bool {
	return name == z.domain || strings.HasSuffix(name, "."+z.domain)
}

// labels splits what stands before the zone's domain.
func (z *zone) labels(name string) []string {
	rest := strings.TrimSuffix(name, z.domain)
	if rest == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(rest, "."), ".")
}

// lookup answers a question whose name, in lower case, is within the zone. owner is the name as it
// was asked, for the answer repeats its spelling.
func (z *zone) lookup(name, owner string, qtype uint16) found {
	labels := z.labels(name)
	if len(labels) == 0 {
		switch qtype {
		case dns.TypeSOA:
			return exists(z.soa())
		case dns.TypeNS:
			return exists(&dns.NS{Hdr: header(owner, dns.TypeNS), Ns: z.nameserver()})
		}
		return exists()
	}
	if len(labels) == 1 && labels[0] == "dns-version" {
		if qtype == dns.TypeTXT {
			return exists(&dns.TXT{Hdr: header(owner, dns.TypeTXT), Txt: []string{specVersion}})
		}
		return exists()
	}
	last := len(labels) - 1
	switch labels[last] {
	case "svc":
		return z.underServices(labels[:last], owner, qtype)
	case "pod":
		return z.underPods(labels[:last], owner, qtype)
	case "dns": // of the server that the SOA and NS records name
		if last == 1 && labels[0] == "ns" {
			if s := z.table.service(types.NamespacedName{Namespace: "kube-system", Name: "kube-dns"}); s != nil {
				return exists(z.addresses(owner, qtype, s.v4, s.v6)...)
			}
		}
		return found{exists: last == 0 || last == 1 && labels[0] == "ns"}
	}
	return found{}
}

// underServices answers for [[_port._protocol. | endpoint.]service.]namespace, given as labels.
func (z *zone) underServices(labels []string, owner string, qtype uint16) found {
	switch len(labels) {
	case 0:
		return exists()
	case 1:
		return found{exists: z.table.hasNamespace(labels[0])}
	}
	last := len(labels) - 1
	s := z.table.service(types.NamespacedName{Namespace: labels[last], Name: labels[last-1]})
	if s == nil {
		return found{}
	}
	if s.external != "" {
		if last == 1 {
			alias := &dns.CNAME{Hdr: header(owner, dns.TypeCNAME), Target: s.external}
			if qtype == dns.TypeCNAME {
				return exists(alias)
			}
			return found{exists: true, answer: []dns.RR{alias}, alias: s.external}
		}
		return found{}
	}
	switch below := labels[:last-1]; len(below) {
	case 0:
		if qtype == dns.TypeSRV {
			f := z.srv(s, owner, qtype, func(port) bool { return true })
			f.exists = true
			return f
		}
		return exists(z.addresses(owner, qtype, s.v4, s.v6)...)
	case 1:
		if protocol, ok := strings.CutPrefix(below[0], "_"); ok {
			// No records, but names below it if there are named ports.
			return found{exists: z.srv(s, owner, dns.TypeNone, func(p port) bool { return p.name != "" && p.protocol == protocol }).exists}
		}
		return z.endpoint(s, below[0], owner, qtype)
	case 2:
		name, isPort := strings.CutPrefix(below[0], "_")
		protocol, isProtocol := strings.CutPrefix(below[1], "_")
		if isPort && isProtocol && name != "" {
			return z.srv(s, owner, qtype, func(p port) bool { return p.name == name && p.protocol == protocol })
		}
	}
	return found{}
}

func (z *zone) endpoint(s *service, hostname, owner string, qtype uint16) found {
	first := sort.Search(len(s.endpoints), func(i int) bool { return s.endpoints[i].hostname >= hostname })
	var v4, v6 []netip.Addr
	for _, e := range s.endpoints[first:] {
		if e.hostname != hostname {
			break
		}
		if e.address.Is4() {
			v4 = append(v4, e.address)
		} else {
			v6 = append(v6, e.address)
		}
	}
	return found{exists: len(v4)+len(v6) > 0, answer: z.addresses(owner, qtype, v4, v6)}
}

// underPods answers for [address.]namespace. Any address has a name in a namespace that exists, so
// that nodes need not know all pods (CoreDNS calls this "insecure", and has it as default too).
func (z *zone) underPods(labels []string, owner string, qtype uint16) found {
	if len(labels) == 0 {
		return exists()
	}
	if !z.table.hasNamespace(labels[len(labels)-1]) {
		return found{}
	}
	switch len(labels) {
	case 1:
		return exists()
	case 2:
		address, ok := undashed(labels[0])
		if !ok {
			return found{}
		}
		if address.Is4() {
			return exists(z.addresses(owner, qtype, []netip.Addr{address}, nil)...)
		}
		return exists(z.addresses(owner, qtype, nil, []netip.Addr{address})...)
	}
	return found{}
}

// srv answers for those ports that match. The name exists if one does, whatever qtype is.
func (z *zone) srv(s *service, owner string, qtype uint16, matches func(port) bool) found {
	var f found
	add := func(target string, ports []port, v4, v6 []netip.Addr) {
		some := false
		for _, p := range ports {
			if !matches(p) {
				continue
			}
			f.exists, some = true, true
			if qtype == dns.TypeSRV {
				f.answer = append(f.answer, &dns.SRV{Hdr: header(owner, dns.TypeSRV), Weight: 100, Port: p.number, Target: target})
			}
		}
		if some && qtype == dns.TypeSRV {
			f.extra = append(f.extra, z.addresses(target, dns.TypeA, v4, v6)...)
			f.extra = append(f.extra, z.addresses(target, dns.TypeAAAA, v4, v6)...)
		}
	}
	base := s.name() + "." + z.domain
	if !s.headless {
		add(base, s.ports, s.v4, s.v6)
		return f
	}
	for i := 0; i < len(s.endpoints); {
		// One target per name: a pod with two addresses is one server.
		var ports []port
		var v4, v6 []netip.Addr
		first := i
		for ; i < len(s.endpoints) && s.endpoints[i].hostname == s.endpoints[first].hostname; i++ {
			e := &s.endpoints[i]
			for _, p := range e.ports {
				if !slices.Contains(ports, p) {
					ports = append(ports, p)
				}
			}
			if e.address.Is4() {
				v4 = append(v4, e.address)
			} else {
				v6 = append(v6, e.address)
			}
		}
		add(s.endpoints[first].hostname+"."+base, ports, v4, v6)
	}
	return f
}

// pointers answers a reverse question, if the address is the cluster's.
func (z *zone) pointers(address netip.Addr, owner string) []dns.RR {
	var answer []dns.RR
	for _, o := range z.table.ownersOf(address) {
		answer = append(answer, &dns.PTR{Hdr: header(owner, dns.TypePTR), Ptr: o.name + "." + z.domain})
	}
	return answer
}

// addresses makes the records of the family that qtype asks for, starting at another address each
// time so that clients that take the first spread.
func (z *zone) addresses(owner string, qtype uint16, v4, v6 []netip.Addr) []dns.RR {
	list := v4
	switch qtype {
	case dns.TypeA:
	case dns.TypeAAAA:
		list = v6
	default:
		return nil
	}
	if len(list) == 0 {
		return nil
	}
	records := make([]dns.RR, 0, len(list))
	start := 0
	if len(list) > 1 {
		start = int(z.turn.Add(1) % uint32(len(list)))
	}
	for i := range list {
		address := list[(start+i)%len(list)]
		if qtype == dns.TypeA {
			records = append(records, &dns.A{Hdr: header(owner, qtype), A: address.AsSlice()})
		} else {
			records = append(records, &dns.AAAA{Hdr: header(owner, qtype), AAAA: address.AsSlice()})
		}
	}
	return records
}

func (z *zone) nameserver() string { return "ns.dns." + z.domain }

func (z *zone) soa() *dns.SOA { return soa(z.domain, z.nameserver(), z.domain) }

// soa lets resolvers remember a negative answer for as long as a positive one.
func soa(owner, nameserver, domain string) *dns.SOA {
	return &dns.SOA{
		Hdr: header(owner, dns.TypeSOA), Ns: nameserver, Mbox: "hostmaster." + domain,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}

func header(owner string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: owner, Rrtype: rrtype, Class: dns.ClassINET, Ttl: ttl}
}

func exists(answer ...dns.RR) found { return found{exists: true, answer: answer} }

// reverseAddress reads the address out of a name below in-addr.arpa or ip6.arpa.
func reverseAddress(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		labels := strings.Split(rest, ".")
		if len(labels) != 4 {
			return netip.Addr{}, false
		}
		slices.Reverse(labels)
		address, err := netip.ParseAddr(strings.Join(labels, "."))
		return address, err == nil
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var b strings.Builder
	for i := 62; i >= 0; i -= 2 {
		b.WriteByte(rest[i])
		if i > 0 && rest[i-1] != '.' {
			return netip.Addr{}, false
		}
		if i%8 == 0 && i > 0 {
			b.WriteByte(':')
		}
	}
	address, err := netip.ParseAddr(b.String())
	return address, err == nil
}
