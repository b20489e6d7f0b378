// SPDX-License-Identifier: Apache-2.0

package services

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/maps"
)

// Frontend is an address that clients use. Addr is the unspecified address for a NodePort.
type Frontend struct {
	Addr  netip.Addr
	Port  uint16
	Proto uint8
	Scope uint8
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
	Sets  []Set
	Ports []Port
}

// Build says what a Service with its EndpointSlices needs on a node. It is pure, and changes nothing
// it is given.
func Build(svc *corev1.Service, eps []*discoveryv1.EndpointSlice, node string) Desired {
	var d Desired
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return d
	}
	for i := range svc.Spec.Ports {
		port := &svc.Spec.Ports[i]
		out := Port{Name: port.Name, Number: port.Port, Proto: port.Protocol}
		for _, family := range families(svc) {
			all := candidates(eps, family, port)
			cluster := pick(all)
			out.Addrs = append(out.Addrs, cluster...)
			d.Sets = append(d.Sets, sets(svc, port, family, cluster, func() []netip.AddrPort {
				return pick(local(all, node))
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
	for _, f := range frontends(svc, port, family, proto) {
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
	add := func(f Frontend, local bool) { out = append(out, frontend{f, local}) }
	both := func(addr netip.Addr, number uint16) {
		add(Frontend{addr, number, proto, maps.ScopeInternal}, false)
		add(Frontend{addr, number, proto, maps.ScopeExternal}, externalLocal)
	}
	if svc.Annotations[api.NodeLocalAnnotation] != "true" {
		for _, ip := range parse(clusterIPs(svc), family) {
			add(Frontend{ip, number, proto, maps.ScopeInternal}, internalLocal)
		}
	}
	if port.NodePort > 0 {
		wildcard := netip.IPv4Unspecified()
		if family == corev1.IPv6Protocol {
			wildcard = netip.IPv6Unspecified()
		}
		both(wildcard, uint16(port.NodePort))
	}
	for _, ip := range parse(svc.Spec.ExternalIPs, family) {
		both(ip, number)
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy {
			continue
		}
		for _, ip := range parse([]string{in.IP}, family) {
			both(ip, number)
		}
	}
	slices.SortFunc(out, func(a, b frontend) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Scope, b.Scope))
	})
	return slices.CompactFunc(out, func(a, b frontend) bool { return a.Frontend == b.Frontend })
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
