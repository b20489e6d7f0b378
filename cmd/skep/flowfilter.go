// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"skep.io/skep/dataplane/flows"
)

// flowFilter says which flows to show; an empty member takes all.
type flowFilter struct {
	from, to, either []peerFilter // one of each must match
	services         []string     // namespace/name, or name in any namespace
	namespaces       []string     // of either end or the service
	verdicts         []string
	reasons          []string
	policies         []string // namespace/name, or name
	protocols        []string
	ports            []uint16 // of the destination or of the service
	since            time.Time
}

// peerFilter is a pod, a node, or a range of addresses.
type peerFilter struct {
	prefix          netip.Prefix
	node            string
	namespace, name string // of a pod; namespace may be empty
}

// parsePeer reads pod/NAME, NAMESPACE/NAME, NAME, node/NAME, an address or a CIDR.
func parsePeer(s string) (p peerFilter, err error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return peerFilter{prefix: netip.PrefixFrom(a, a.BitLen())}, nil
	}
	if r, err := netip.ParsePrefix(s); err == nil {
		return peerFilter{prefix: r.Masked()}, nil
	}
	kind, name, ok := strings.Cut(s, "/")
	switch {
	case s == "":
		return p, fmt.Errorf("a pod, a node or an address is missing")
	case !ok:
		return peerFilter{name: s}, nil
	case name == "" || kind == "":
		return p, fmt.Errorf("%q is neither a pod (NAME or NAMESPACE/NAME), node/NAME, an address nor a CIDR", s)
	case kind == "node" || kind == "nodes" || kind == "no":
		return peerFilter{node: name}, nil
	case kind == "pod" || kind == "pods" || kind == "po":
		namespace, pod, ok := strings.Cut(name, "/")
		if !ok {
			return peerFilter{name: namespace}, nil
		}
		return peerFilter{namespace: namespace, name: pod}, nil
	}
	return peerFilter{namespace: kind, name: name}, nil
}

func (p *peerFilter) matches(e *flows.Peer) bool {
	switch {
	case p.prefix.IsValid():
		return p.prefix.Contains(e.Address)
	case p.node != "":
		return p.node == e.Node
	}
	return p.name == e.Pod && (p.namespace == "" || p.namespace == e.Namespace)
}

func anyPeer(list []peerFilter, peers ...*flows.Peer) bool {
	return len(list) == 0 || slices.ContainsFunc(list, func(p peerFilter) bool { return slices.ContainsFunc(peers, p.matches) })
}

// named matches a namespaced name against NAME or NAMESPACE/NAME.
func named(list []string, full string) bool {
	_, name, _ := strings.Cut(full, "/")
	return slices.Contains(list, full) || slices.Contains(list, name)
}

func foldedIn(list []string, s string) bool {
	return len(list) == 0 || slices.ContainsFunc(list, func(x string) bool { return strings.EqualFold(x, s) })
}

// matches is pure.
func (f *flowFilter) matches(e *flows.Flow) bool {
	service, namespace := "", ""
	ports := []uint16{e.Destination.Port}
	if e.Service != nil {
		service, namespace = e.Service.Namespace+"/"+e.Service.Name, e.Service.Namespace
		ports = append(ports, e.Service.Address.Port())
	}
	return anyPeer(f.from, &e.Source) && anyPeer(f.to, &e.Destination) && anyPeer(f.either, &e.Source, &e.Destination) &&
		(len(f.services) == 0 || e.Service != nil && named(f.services, service)) &&
		(len(f.namespaces) == 0 || slices.ContainsFunc(f.namespaces, func(n string) bool {
			return n == e.Source.Namespace || n == e.Destination.Namespace || n == namespace
		})) &&
		foldedIn(f.verdicts, string(e.Verdict)) && foldedIn(f.reasons, e.Reason) && foldedIn(f.protocols, e.Protocol) &&
		(len(f.policies) == 0 || slices.ContainsFunc(e.Policies, func(p string) bool { return named(f.policies, p) })) &&
		(len(f.ports) == 0 || slices.ContainsFunc(ports, func(p uint16) bool { return slices.Contains(f.ports, p) })) &&
		!e.Time.Before(f.since)
}

// flowFlags are the flags that make a flowFilter.
type flowFlags struct {
	from, to, pods, services, namespaces, verdicts, reasons, policies, protocols, ports []string
	since                                                                               time.Duration
}

func (o *flowFlags) filter(now time.Time) (f flowFilter, err error) {
	for _, list := range []struct {
		flag string
		in   []string
		out  *[]peerFilter
	}{{"from", o.from, &f.from}, {"to", o.to, &f.to}, {"pod", o.pods, &f.either}} {
		for _, s := range list.in {
			p, err := parsePeer(s)
			if err != nil {
				return f, fmt.Errorf("--%s: %w", list.flag, err)
			}
			*list.out = append(*list.out, p)
		}
	}
	for _, s := range o.ports {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return f, fmt.Errorf("--port: %q is no port", s)
		}
		f.ports = append(f.ports, uint16(n))
	}
	for _, v := range o.verdicts {
		if !slices.Contains(flows.Verdicts, flows.Verdict(strings.ToLower(v))) {
			return f, fmt.Errorf("--verdict: %q is none of %v", v, flows.Verdicts)
		}
	}
	f.services, f.namespaces, f.verdicts, f.reasons = o.services, o.namespaces, o.verdicts, o.reasons
	f.policies, f.protocols = o.policies, o.protocols
	if o.since > 0 {
		f.since = now.Add(-o.since)
	}
	return f, nil
}
