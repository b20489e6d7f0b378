// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// Frontend is an address at which a Service is reached.
type Frontend struct {
	Namespace       string           `json:"namespace"`
	Service         string           `json:"service"`
	Address         netip.AddrPort   `json:"address"` // the unspecified one: a NodePort, at any address of the node
	Protocol        string           `json:"protocol"`
	Scope           string           `json:"scope"` // internal: asked from the node or its pods; external: from outside
	LocalOnly       bool             `json:"localOnly,omitempty"`
	AffinitySeconds uint32           `json:"affinitySeconds,omitempty"`
	Algorithm       string           `json:"algorithm"` // maglev: packets choose by a consistent table; random
	Backends        []netip.AddrPort `json:"backends"`
	ID              uint32           `json:"id"`
	Generation      uint32           `json:"generation"`
}

// Backend is an address that serves.
type Backend struct {
	flows.Peer
	Protocol  string `json:"protocol"`
	State     string `json:"state"` // active, or retired: keeps its connections and gets no new ones
	ServiceNS string `json:"serviceNamespace"`
	Service   string `json:"service"`
	ID        uint32 `json:"id"`
}

// Endpoint is an address of a pod of the node.
type Endpoint struct {
	flows.Peer
	Ifindex uint32 `json:"ifindex"`
	PodMAC  string `json:"podMAC"`
	HostMAC string `json:"hostMAC"`
	Ingress string `json:"ingress"` // open: no policy selects the pod; policies; closed
	Egress  string `json:"egress"`
}

// States of one direction of a pod.
const (
	Open   = "open"
	Judged = "policies"
	Closed = "closed"
)

// PolicySet is what one direction of a pod's traffic must satisfy.
type PolicySet struct {
	Namespace string   `json:"namespace"`
	Pod       string   `json:"pod"`
	Direction string   `json:"direction"`
	State     string   `json:"state"`
	Policies  []string `json:"policies,omitempty"`
	Why       string   `json:"why,omitempty"` // it is closed
	Rules     []Rule   `json:"rules,omitempty"`
	Drops     uint64   `json:"drops"` // of all pods that share the set
	Set       uint32   `json:"set"`
}

// Rule says whether peers may use ports.
type Rule struct {
	Verdict  string         `json:"verdict"`         // allow, or what each tier says, in order
	Peers    []flows.Peer   `json:"peers,omitempty"` // pods by address
	Blocks   []netip.Prefix `json:"blocks,omitempty"`
	Anybody  bool           `json:"anybody,omitempty"`
	Protocol string         `json:"protocol"` // any, or one
	First    uint16         `json:"firstPort"`
	Last     uint16         `json:"lastPort"`
}

// Connection is an entry of the tracked flows.
type Connection struct {
	Protocol    string        `json:"protocol"`
	Source      flows.Peer    `json:"source"`
	Destination flows.Peer    `json:"destination"`
	To          *flows.Peer   `json:"to,omitempty"`   // destination after translation
	From        *flows.Peer   `json:"from,omitempty"` // source after translation, if another
	Namespace   string        `json:"serviceNamespace,omitempty"`
	Service     string        `json:"service,omitempty"`
	State       string        `json:"state"` // new, established, closing, reset; of UDP: new or established
	Reply       bool          `json:"reply,omitempty"`
	Idle        time.Duration `json:"idleNanoseconds"`
}

func peerOf(names flows.Names, a netip.Addr, port uint16, node string) flows.Peer {
	p := flows.Peer{Address: a, Port: port}
	p.Namespace, p.Pod, _ = names.Pod(a)
	if p.Pod == "" && names.IsNode(a) {
		p.Node = node
	}
	return p
}

// Frontends are all that the kernel has.
func Frontends(s maps.Snapshot, names flows.Names) []Frontend {
	out := make([]Frontend, 0, len(s.Services))
	for k, v := range s.Services {
		f := Frontend{
			Address: netip.AddrPortFrom(k.Addr.Addr(), k.Port.Number()), Protocol: flows.Protocol(k.Proto), Scope: "internal", Algorithm: api.AlgorithmRandom,
			LocalOnly: v.Flags&maps.ServiceLocal != 0, ID: v.ID, Generation: v.Generation, Backends: []netip.AddrPort{},
		}
		if k.Scope == maps.ScopeExternal {
			f.Scope = "external"
		}
		if v.Flags&maps.ServiceMaglev != 0 {
			f.Algorithm = api.AlgorithmMaglev
		}
		if v.Flags&maps.ServiceAffinity != 0 {
			f.AffinitySeconds = v.AffinitySeconds
		}
		f.Namespace, f.Service, _ = names.Service(v.ID)
		for slot := range v.Count {
			if b, ok := s.Backends[s.Slots[maps.SlotKey{Service: v.ID, Generation: v.Generation, Slot: slot}]]; ok {
				f.Backends = append(f.Backends, netip.AddrPortFrom(b.Addr.Addr(), b.Port.Number()))
			}
		}
		slices.SortFunc(f.Backends, netip.AddrPort.Compare)
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b Frontend) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Service, b.Service), a.Address.Compare(b.Address),
			cmp.Compare(a.Protocol, b.Protocol), -cmp.Compare(a.Scope, b.Scope))
	})
	return out
}

// Backends are all that the kernel has.
func Backends(s maps.Snapshot, names flows.Names, node string) []Backend {
	out := make([]Backend, 0, len(s.Backends))
	for id, v := range s.Backends {
		b := Backend{Peer: peerOf(names, v.Addr.Addr(), v.Port.Number(), node), Protocol: flows.Protocol(v.Proto), State: "active", ID: id}
		if v.State != 0 {
			b.State = "retired"
		}
		b.ServiceNS, b.Service, _ = names.Service(v.Service)
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b Backend) int {
		return cmp.Or(cmp.Compare(a.ServiceNS, b.ServiceNS), cmp.Compare(a.Service, b.Service), a.Address.Compare(b.Address),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.ID, b.ID))
	})
	return out
}

func stateOf(set uint32) string {
	switch set {
	case 0:
		return Open
	case maps.PolicyClosed:
		return Closed
	}
	return Judged
}

// Endpoints are the node's pods, with the sets that their slots lead to.
func Endpoints(all map[netip.Addr]maps.Endpoint, sets map[uint32]maps.PolicySets, names flows.Names) []Endpoint {
	out := make([]Endpoint, 0, len(all))
	for a, v := range all {
		s := sets[v.Slot]
		out = append(out, Endpoint{
			Peer: peerOf(names, a, 0, ""), Ifindex: v.Ifindex, PodMAC: mac(v.PodMAC), HostMAC: mac(v.HostMAC),
			Ingress: stateOf(s.Ingress), Egress: stateOf(s.Egress),
		})
	}
	slices.SortFunc(out, func(a, b Endpoint) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), a.Address.Compare(b.Address))
	})
	return out
}

func mac(m [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// PolicySets says what both directions of each of the node's pods must satisfy.
func PolicySets(all map[netip.Addr]maps.Endpoint, sets map[uint32]maps.PolicySets, policy map[maps.PolicyKey]maps.PolicyVerdict,
	identities map[maps.IdentityKey]uint32, drops map[uint32]uint64, names flows.Names) []PolicySet {
	bySet := map[uint32][]maps.PolicyKey{}
	for k := range policy {
		bySet[k.Set] = append(bySet[k.Set], k)
	}
	type peer struct{ scope, number uint32 }
	addresses := map[peer][]netip.Prefix{}
	for k, number := range identities {
		addresses[peer{k.Scope, number}] = append(addresses[peer{k.Scope, number}], k.Prefix())
	}
	rules := func(set uint32, direction string) (out []Rule) {
		for _, k := range bySet[set] {
			r := Rule{Verdict: says(policy[k], set, direction, names), Protocol: "any", Last: 65535}
			if k.Bits > maps.PolicyBitsPeer {
				r.Protocol = flows.Protocol(k.Proto)
				r.First = k.Port.Number()
				r.Last = r.First | uint16(1<<(maps.PolicyBitsPort-k.Bits)-1)
			}
			switch {
			case k.Peer == maps.PeerAny:
				r.Anybody = true
			case k.Peer >= maps.PeerBlock:
				r.Blocks = slices.SortedFunc(slices.Values(addresses[peer{set, k.Peer}]), comparePrefix)
			default:
				for _, p := range slices.SortedFunc(slices.Values(addresses[peer{maps.EpochOf(set), k.Peer}]), comparePrefix) {
					r.Peers = append(r.Peers, peerOf(names, p.Addr(), 0, ""))
				}
			}
			out = append(out, r)
		}
		return joinPorts(out)
	}
	var out []PolicySet
	seen := map[uint32]bool{}
	for a, v := range all {
		if seen[v.Slot] {
			continue
		}
		seen[v.Slot] = true
		pod := peerOf(names, a, 0, "")
		for i, direction := range []string{"ingress", "egress"} {
			set := []uint32{sets[v.Slot].Ingress, sets[v.Slot].Egress}[i]
			s := PolicySet{Namespace: pod.Namespace, Pod: pod.Pod, Direction: direction, State: stateOf(set), Set: set, Drops: drops[set]}
			if set != 0 {
				s.Policies, s.Why = names.Policies(set, maps.AnyRule, pod.Namespace, pod.Pod, direction)
				s.Rules = rules(set, direction)
			}
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b PolicySet) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), -cmp.Compare(a.Direction, b.Direction))
	})
	return out
}

// says names the rules that an entry's verdict is made of.
func says(v maps.PolicyVerdict, set uint32, direction string, names flows.Names) string {
	admin, baseline, tiered := v.Tiers()
	if !tiered {
		return "allow"
	}
	var parts []string
	rule := func(t maps.Tier, place int, field uint32) {
		if place == 0 {
			return
		}
		by, _ := names.Policies(set, uint32(t)<<16|uint32(place), "", "", direction)
		action := [...]string{"Accept", "Deny", "Pass"}[field&3]
		parts = append(parts, strings.TrimSpace(strings.Join(by, ",")+" "+action))
	}
	rule(maps.TierAdmin, admin, uint32(v))
	if v.LetByNetworkPolicy() {
		parts = append(parts, "NetworkPolicies allow")
	}
	rule(maps.TierBaseline, baseline, uint32(v)>>14)
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// who is the same for rules about the same peers.
func (r *Rule) who() string { return fmt.Sprint(r.Verdict, r.Anybody, r.Peers, r.Blocks, r.Protocol) }

// joinPorts turns the prefixes that the kernel has back into ranges.
func joinPorts(in []Rule) (out []Rule) {
	slices.SortFunc(in, func(a, b Rule) int { return cmp.Or(cmp.Compare(a.who(), b.who()), cmp.Compare(a.First, b.First)) })
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].who() == r.who() && uint32(out[n-1].Last)+1 >= uint32(r.First) {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// Connections are all tracked flows. now is the kernel's monotonic clock.
func Connections(all map[maps.Tuple]maps.Flow, names flows.Names, node string, now int64) []Connection {
	out := make([]Connection, 0, len(all))
	for k, v := range all {
		t := k
		translated := v.Flags&maps.FlowTranslated != 0
		if translated && v.Reversed != 0 || !translated && v.Flags&maps.FlowOpenedBack != 0 {
			t = k.Reverse()
		}
		c := Connection{
			Protocol: flows.Protocol(k.Proto), Reply: v.Flags&maps.FlowReply != 0, State: connectionState(v.Flags),
			Source: peerOf(names, t.Saddr.Addr(), t.Sport.Number(), node), Destination: peerOf(names, t.Daddr.Addr(), t.Dport.Number(), node),
			Idle: max(0, time.Duration(now-int64(v.LastSeen))),
		}
		if translated {
			to := peerOf(names, v.To.Daddr.Addr(), v.To.Dport.Number(), node)
			c.To = &to
			if v.To.Saddr != t.Saddr || v.To.Sport != t.Sport {
				from := peerOf(names, v.To.Saddr.Addr(), v.To.Sport.Number(), node)
				c.From = &from
			}
		}
		c.Namespace, c.Service, _ = names.Service(v.Service)
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Connection) int { return cmp.Compare(a.Idle, b.Idle) })
	return out
}

func connectionState(flags uint32) string {
	const over = maps.FlowFin | maps.FlowFinBack
	switch {
	case flags&maps.FlowRst != 0:
		return "reset"
	case flags&over != 0:
		return "closing"
	case flags&maps.FlowSeen != 0 && flags&maps.FlowSeenBack != 0, flags&maps.FlowReply != 0:
		return "established"
	}
	return "new"
}
