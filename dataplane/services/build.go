// SPDX-License-Identifier: Apache-2.0

package services

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/maps"
)

// Frontend is an address that clients use. Addr is the unspecified address for a NodePort.
type Frontend struct {
	Addr  netip.Addr
	Port  uint16
	Proto uint8
	Scope uint8
	// Ranged says that only clients in the set's Ranges may use it.
	Ranged bool
	// Maglev says that packets choose a backend by the set's consistent table.
	Maglev bool
}

// Key is the frontend as the kernel knows it.
func (f Frontend) Key() maps.ServiceKey {
	return maps.ServiceKey{Addr: maps.AddressOf(f.Addr), Port: maps.PortOf(f.Port), Proto: f.Proto, Scope: f.Scope}
}

// Set is a group of backends with the frontends that lead to it.
type Set struct {
	Name            string // unique in the cluster, stable
	Proto           uint8
	Flags           uint32
	AffinitySeconds uint32
	Frontends       []Frontend
	Backends        []netip.AddrPort // sorted, without duplicates
	Ranges          []netip.Prefix   // sorted, masked; who may use the frontends that are Ranged
}

// Port is what Lookup answers about a port of a Service.
type Port struct {
	Name   string
	Number int32
	Proto  corev1.Protocol
	Addrs  []netip.AddrPort
}

// Desired is what one Service needs.
type Desired struct {
	Sets   []Set
	Ports  []Port
	Health Health
	// Announce are the addresses that this node announces to its neighbours.
	Announce []netip.Addr
	// Unsupported says what of the Service is left out, and why; empty if nothing.
	Unsupported string
}

// Place is where a node is.
type Place struct{ Node, Zone string }

// Build says what a Service with its EndpointSlices needs on a node. It is pure, and changes nothing
// it is given.
func Build(svc *corev1.Service, eps []*discoveryv1.EndpointSlice, here Place) Desired {
	d := Desired{Health: health(svc, eps, here.Node), Unsupported: unsupported(svc), Announce: announce(svc, here.Node)}
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return d
	}
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		out := Port{Name: port.Name, Number: port.Port, Proto: port.Protocol}
		for _, family := range families(svc) {
			all := candidates(eps, family, port)
			cluster := pick(near(all, here))
			out.Addrs = append(out.Addrs, cluster...)
			d.Sets = append(d.Sets, sets(svc, port, family, cluster, func() []netip.AddrPort {
				return pick(local(all, here.Node))
			})...)
		}
		d.Ports = append(d.Ports, out)
	}
	return d
}

// families of a Service; a headless one without a list gets both.
func families(svc *corev1.Service) []corev1.IPFamily {
	if len(svc.Spec.IPFamilies) > 0 {
		return svc.Spec.IPFamilies
	}
	return []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
}

type candidate struct {
	addr        netip.AddrPort
	ready       bool
	terminating bool // and serving
	node        string
	forNodes    []string // hints
	forZones    []string
}

func candidates(eps []*discoveryv1.EndpointSlice, family corev1.IPFamily, port *corev1.ServicePort) []candidate {
	var out []candidate
	for _, s := range eps {
		if string(s.AddressType) != string(family) {
			continue
		}
		number, ok := slicePort(s, port)
		if !ok {
			continue
		}
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			c := candidate{
				ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
				terminating: isTrue(e.Conditions.Terminating) && isTrue(e.Conditions.Serving),
			}
			if e.NodeName != nil {
				c.node = *e.NodeName
			}
			if e.Hints != nil {
				for _, h := range e.Hints.ForNodes {
					c.forNodes = append(c.forNodes, h.Name)
				}
				for _, h := range e.Hints.ForZones {
					c.forZones = append(c.forZones, h.Name)
				}
			}
			for _, a := range e.Addresses {
				addr, err := netip.ParseAddr(a)
				if err != nil || !sameFamily(addr, family) {
					continue // the API server validates; a later version may know more
				}
				c.addr = netip.AddrPortFrom(addr, number)
				out = append(out, c)
			}
		}
	}
	return out
}

func isTrue(b *bool) bool { return b != nil && *b }

func sameFamily(a netip.Addr, family corev1.IPFamily) bool {
	return a.Is4() == (family == corev1.IPv4Protocol)
}

func slicePort(s *discoveryv1.EndpointSlice, port *corev1.ServicePort) (uint16, bool) {
	for _, p := range s.Ports {
		name, proto := "", corev1.ProtocolTCP
		if p.Name != nil {
			name = *p.Name
		}
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		if name == port.Name && proto == protocol(port.Protocol) && p.Port != nil && *p.Port > 0 && *p.Port < 1<<16 {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}

func protocol(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}

func local(all []candidate, node string) []candidate {
	var out []candidate
	for _, c := range all {
		if c.node == node {
			out = append(out, c)
		}
	}
	return out
}

// pick takes the ready ones, or, if none is, those that terminate but still serve (KEP-1669).
func pick(all []candidate) []netip.AddrPort {
	var ready, serving []netip.AddrPort
	for _, c := range all {
		switch {
		case c.ready:
			ready = append(ready, c.addr)
		case c.terminating:
			serving = append(serving, c.addr)
		}
	}
	if len(ready) == 0 {
		ready = serving
	}
	slices.SortFunc(ready, netip.AddrPort.Compare)
	return slices.Compact(ready)
}

func sets(svc *corev1.Service, port *corev1.ServicePort, family corev1.IPFamily, cluster []netip.AddrPort, local func() []netip.AddrPort) []Set {
	var proto uint8
	switch protocol(port.Protocol) {
	case corev1.ProtocolTCP:
		proto = maps.TCP
	case corev1.ProtocolUDP:
		proto = maps.UDP
	default:
		return nil // SCTP: no program translates it
	}
	everywhere := Set{Proto: proto, Backends: cluster}
	here := Set{Proto: proto, Flags: maps.ServiceLocal}
	ranges := sourceRanges(svc, family)
	for _, f := range frontends(svc, port, family, proto) {
		if f.Ranged && f.local {
			here.Ranges = ranges
		} else if f.Ranged {
			everywhere.Ranges = ranges
		}
		if f.local {
			here.Frontends = append(here.Frontends, f.Frontend)
		} else {
			everywhere.Frontends = append(everywhere.Frontends, f.Frontend)
		}
	}
	name := svc.Namespace + "/" + svc.Name + ":" + port.Name + "/" + string(protocol(port.Protocol)) + "/" + string(family)
	var out []Set
	if len(everywhere.Frontends) > 0 {
		everywhere.Name = name
		out = append(out, everywhere)
	}
	if len(here.Frontends) > 0 {
		here.Name = name + "/local"
		here.Backends = local()
		out = append(out, here)
	}
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		for i := range out {
			out[i].Flags |= maps.ServiceAffinity
			out[i].AffinitySeconds = affinitySeconds(svc)
		}
	}
	return out
}

func affinitySeconds(svc *corev1.Service) uint32 {
	if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		return uint32(*c.ClientIP.TimeoutSeconds)
	}
	return uint32(corev1.DefaultClientIPServiceAffinitySeconds)
}

type frontend struct {
	Frontend
	local bool
}

// frontends of one port and family. Traffic policy Local: internalTrafficPolicy rules the ClusterIP,
// externalTrafficPolicy what arrives from outside; from inside the cluster an external address or a
// NodePort leads to all backends.
func frontends(svc *corev1.Service, port *corev1.ServicePort, family corev1.IPFamily, proto uint8) []frontend {
	number := uint16(port.Port)
	internalLocal := svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	externalLocal := svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal

	var out []frontend
	add := func(addr netip.Addr, number uint16, scope uint8, ranged, local bool) {
		f := Frontend{Addr: addr, Port: number, Proto: proto, Scope: scope, Ranged: ranged, Maglev: maglev(svc, scope)}
		out = append(out, frontend{f, local})
	}
	both := func(addr netip.Addr, number uint16, ranged bool) {
		add(addr, number, maps.ScopeInternal, ranged, false)
		add(addr, number, maps.ScopeExternal, ranged, externalLocal)
	}
	if svc.Annotations[api.NodeLocalAnnotation] != "true" {
		for _, ip := range parse(clusterIPs(svc), family) {
			add(ip, number, maps.ScopeInternal, false, internalLocal)
		}
	}
	if port.NodePort > 0 {
		wildcard := netip.IPv4Unspecified()
		if family == corev1.IPv6Protocol {
			wildcard = netip.IPv6Unspecified()
		}
		both(wildcard, uint16(port.NodePort), false)
	}
	for _, ip := range parse(svc.Spec.ExternalIPs, family) {
		both(ip, number, false)
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy {
			continue
		}
		for _, ip := range parse([]string{in.IP}, family) {
			both(ip, number, len(svc.Spec.LoadBalancerSourceRanges) > 0)
		}
	}
	// The same address as external IP and as load balancer's: what is for some clients only stays so.
	slices.SortFunc(out, func(a, b frontend) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Scope, b.Scope), -compareBool(a.Ranged, b.Ranged))
	})
	return slices.CompactFunc(out, func(a, b frontend) bool { return a.Key() == b.Key() })
}

// maglev says whether packets that ask a Service in a scope choose by a consistent table: those from outside may
// reach another node in the middle of a connection, when routers choose anew.
func maglev(svc *corev1.Service, scope uint8) bool {
	switch svc.Annotations[api.AlgorithmAnnotation] {
	case api.AlgorithmMaglev:
		return true
	case api.AlgorithmRandom:
		return false
	}
	return scope == maps.ScopeExternal
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// sourceRanges of one family. A list that names none of the family admits nobody of it.
func sourceRanges(svc *corev1.Service, family corev1.IPFamily) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range svc.Spec.LoadBalancerSourceRanges {
		// The API server allows white space around a range (KEP-4858 knows of more that it allowed).
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err == nil && sameFamily(p.Addr(), family) {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// announce lists a Service's load balancer addresses, if it is this node that announces them.
func announce(svc *corev1.Service, node string) []netip.Addr {
	c := meta.FindStatusCondition(svc.Status.Conditions, api.AnnouncedCondition)
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || c == nil || c.Status != metav1.ConditionTrue || c.Message != node {
		return nil
	}
	var out []netip.Addr
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(in.IP); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func unsupported(svc *corev1.Service) string {
	for _, p := range svc.Spec.Ports {
		if p.Protocol == corev1.ProtocolSCTP {
			return fmt.Sprintf("port %d: services over SCTP are not translated; pods are still reached at their own addresses", p.Port)
		}
	}
	switch a := svc.Annotations[api.AlgorithmAnnotation]; a {
	case "", api.AlgorithmMaglev, api.AlgorithmRandom:
	default:
		return fmt.Sprintf("annotation %s: %q is neither %s nor %s: the default is used", api.AlgorithmAnnotation, a, api.AlgorithmMaglev, api.AlgorithmRandom)
	}
	return ""
}

func clusterIPs(svc *corev1.Service) []string {
	if len(svc.Spec.ClusterIPs) > 0 {
		return svc.Spec.ClusterIPs
	}
	return []string{svc.Spec.ClusterIP}
}

func parse(in []string, family corev1.IPFamily) []netip.Addr {
	var out []netip.Addr
	for _, s := range in {
		if a, err := netip.ParseAddr(s); err == nil && sameFamily(a.Unmap(), family) {
			out = append(out, a.Unmap())
		}
	}
	return out
}
