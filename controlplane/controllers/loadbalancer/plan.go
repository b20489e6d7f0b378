// SPDX-License-Identifier: Apache-2.0

// Package loadbalancer gives Services of type LoadBalancer their addresses: from AddressPools, each
// announced by one node, or else those of the nodes.
package loadbalancer

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/api"
	"skep.io/skep/api/v1alpha1"
)

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Services []*corev1.Service
	Pools    []*v1alpha1.AddressPool
	Nodes    []*corev1.Node
	// LocalTo says which nodes have a ready pod of a Service.
	LocalTo func(*corev1.Service) map[string]bool
	// Reserved are ports of the nodes that no Service may take from what the nodes do themselves, with who does.
	Reserved map[int32]string
}

// Change is a Service's new status and what to say about it.
type Change struct {
	Service *corev1.Service
	Status  corev1.ServiceStatus
	Write   bool // whether Status differs from what the Service has
	// Problem is why an address is missing; empty if none is.
	Reason, Problem string
}

// Reasons of events.
const (
	noPool    = "NoAddressPool"
	exhausted = "AddressPoolExhausted"
	taken     = "AddressUnavailable"
	portTaken = "NodePortTaken"
	badPool   = "InvalidAddressPool"
	assigned  = "AddressAssigned"
)

// Decisions of a Plan.
type Decisions struct {
	Services []Change
	Pools    []PoolChange
}

// Plan decides on the addresses of all Services at once, as they must not have the same ones. A Service keeps
// what it has as long as it may have it; whoever was there first comes first.
func Plan(s Snapshot) Decisions {
	p := &planner{Snapshot: s, used: map[netip.Addr]types.NamespacedName{}, ports: map[portKey]types.NamespacedName{}}
	p.readPools()
	var mine []*corev1.Service
	var out []Change
	for _, svc := range s.Services {
		if isMine(svc) {
			mine = append(mine, svc)
		} else if svc.Spec.Type != corev1.ServiceTypeLoadBalancer && (len(svc.Status.LoadBalancer.Ingress) > 0 || announcer(svc) != "") {
			out = append(out, change(svc, nil, "", "", ""))
		}
	}
	slices.SortStableFunc(mine, func(a, b *corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(string(a.UID), string(b.UID)))
	})
	// First what Services have and may keep, so that a newcomer with an older date takes nothing away.
	kept := make([][]netip.Addr, len(mine))
	for i, svc := range mine {
		if p.fromPool(svc) {
			kept[i] = p.keep(svc)
		}
	}
	for i, svc := range mine {
		out = append(out, p.decide(svc, kept[i]))
	}
	return Decisions{out, p.poolChanges()}
}

type portKey struct {
	port  int32
	proto corev1.Protocol
}

type pool struct {
	*v1alpha1.AddressPool
	ranges   []v1alpha1.Range
	selector labels.Selector
	flaw     string
}

type planner struct {
	Snapshot
	pools []pool
	used  map[netip.Addr]types.NamespacedName
	ports map[portKey]types.NamespacedName // of the nodes
}

func nameOf(svc *corev1.Service) types.NamespacedName {
	return types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}
}

// isMine leaves Services of foreign classes alone.
func isMine(svc *corev1.Service) bool {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || svc.DeletionTimestamp != nil {
		return false
	}
	c := svc.Spec.LoadBalancerClass
	return c == nil || *c == api.LoadBalancerClassPool || *c == api.LoadBalancerClassNode
}

func (p *planner) readPools() {
	for _, in := range p.Pools {
		out := pool{AddressPool: in, selector: labels.Everything()}
		for _, s := range in.Spec.Addresses {
			r, err := v1alpha1.ParseRange(s)
			if err != nil {
				out.flaw = err.Error()
				continue
			}
			out.ranges = append(out.ranges, r)
		}
		if in.Spec.ServiceSelector != nil {
			selector, err := metav1.LabelSelectorAsSelector(in.Spec.ServiceSelector)
			if err != nil {
				out.flaw, selector = err.Error(), labels.Nothing()
			}
			out.selector = selector
		}
		p.pools = append(p.pools, out)
	}
	slices.SortFunc(p.pools, func(a, b pool) int { return strings.Compare(a.Name, b.Name) })
}

func (p *planner) fromPool(svc *corev1.Service) bool {
	if c := svc.Spec.LoadBalancerClass; c != nil {
		return *c == api.LoadBalancerClassPool
	}
	return len(p.pools) > 0
}

// candidates are the pools that a Service may have addresses of; asked says that it named what it wants.
func (p *planner) candidates(svc *corev1.Service, asked bool) []pool {
	name := svc.Annotations[api.AddressPoolAnnotation]
	var out []pool
	for _, c := range p.pools {
		if !c.selector.Matches(labels.Set(svc.Labels)) || name != "" && c.Name != name {
			continue
		}
		if name == "" && !asked && c.Spec.AutoAssign != nil && !*c.Spec.AutoAssign {
			continue
		}
		out = append(out, c)
	}
	return out
}

// requested are the addresses that a Service names, and which of them are none.
func requested(svc *corev1.Service) (addrs []netip.Addr, bad string) {
	list := svc.Annotations[api.AddressesAnnotation]
	if list == "" {
		list = svc.Spec.LoadBalancerIP
	}
	for _, s := range strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' }) {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Sprintf("%q is no address", s)
		}
		addrs = append(addrs, a.Unmap())
	}
	return addrs, ""
}

func families(svc *corev1.Service) []corev1.IPFamily { return svc.Spec.IPFamilies }

func familyOf(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

func has(pools []pool, a netip.Addr) bool {
	return slices.ContainsFunc(pools, func(p pool) bool {
		return slices.ContainsFunc(p.ranges, func(r v1alpha1.Range) bool { return r.Contains(a) })
	})
}

// keep claims those addresses of a Service's status that it still may have.
func (p *planner) keep(svc *corev1.Service) (kept []netip.Addr) {
	want, _ := requested(svc)
	pools := p.candidates(svc, len(want) > 0)
	for _, in := range svc.Status.LoadBalancer.Ingress {
		a, err := netip.ParseAddr(in.IP)
		if err != nil || !slices.Contains(families(svc), familyOf(a)) || !has(pools, a) {
			continue
		}
		if len(want) > 0 && !slices.Contains(want, a) || slices.ContainsFunc(kept, func(k netip.Addr) bool { return familyOf(k) == familyOf(a) }) {
			continue
		}
		if _, ok := p.used[a]; !ok {
			p.used[a] = nameOf(svc)
			kept = append(kept, a)
		}
	}
	return kept
}

func (p *planner) decide(svc *corev1.Service, kept []netip.Addr) Change {
	if !p.fromPool(svc) {
		return p.nodeAddresses(svc)
	}
	addrs, reason, problem := p.allocate(svc, kept)
	node := ""
	if len(addrs) > 0 {
		node = p.elect(svc)
	}
	return change(svc, addrs, node, reason, problem)
}

// allocate completes what a Service keeps, family by family in the order it asks for.
func (p *planner) allocate(svc *corev1.Service, kept []netip.Addr) (addrs []netip.Addr, reason, problem string) {
	want, bad := requested(svc)
	if bad != "" {
		return nil, taken, bad
	}
	pools := p.candidates(svc, len(want) > 0)
	if len(pools) == 0 {
		if name := svc.Annotations[api.AddressPoolAnnotation]; name != "" {
			return nil, noPool, fmt.Sprintf("there is no AddressPool %q that selects this Service", name)
		}
		return nil, noPool, "no AddressPool selects this Service: create one, or name one in the annotation " + api.AddressPoolAnnotation
	}
	for _, family := range families(svc) {
		if i := slices.IndexFunc(kept, func(a netip.Addr) bool { return familyOf(a) == family }); i >= 0 {
			addrs = append(addrs, kept[i])
			continue
		}
		a, r, why := p.one(svc, family, want, pools)
		if why != "" {
			reason, problem = r, why
			continue
		}
		if a.IsValid() {
			p.used[a] = nameOf(svc)
			addrs = append(addrs, a)
		}
	}
	return addrs, reason, problem
}

// one finds an address of a family.
func (p *planner) one(svc *corev1.Service, family corev1.IPFamily, want []netip.Addr, pools []pool) (a netip.Addr, reason, problem string) {
	if len(want) > 0 {
		i := slices.IndexFunc(want, func(a netip.Addr) bool { return familyOf(a) == family })
		if i < 0 {
			return a, "", "" // it named one of the other family only
		}
		a = want[i]
		if owner, ok := p.used[a]; ok {
			return a, taken, fmt.Sprintf("address %s is Service %s's", a, owner)
		}
		if !has(pools, a) {
			return a, taken, fmt.Sprintf("address %s is in no AddressPool that selects this Service", a)
		}
		return a, "", ""
	}
	known := false
	for _, c := range pools {
		for _, r := range c.ranges {
			if familyOf(r.First) != family {
				continue
			}
			known = true
			for a := r.First; r.Contains(a); a = a.Next() {
				if _, ok := p.used[a]; !ok {
					return a, "", ""
				}
			}
		}
	}
	var names []string
	for _, c := range pools {
		names = append(names, c.Name)
		if c.flaw != "" {
			return a, badPool, fmt.Sprintf("AddressPool %s: %s", c.Name, c.flaw)
		}
	}
	switch {
	case known:
		return a, exhausted, fmt.Sprintf("no %s address is free in AddressPool %s: add addresses, or delete Services", family, strings.Join(names, ", "))
	case svc.Spec.IPFamilyPolicy != nil && *svc.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack && len(families(svc)) > 1:
		return a, "", ""
	}
	return a, noPool, fmt.Sprintf("AddressPool %s has no %s addresses", strings.Join(names, ", "), family)
}

// elect picks the node that announces a Service's addresses: the one that does, as long as it can.
func (p *planner) elect(svc *corev1.Service) string {
	var able []string
	for _, n := range p.serving(svc) {
		able = append(able, n.Name)
	}
	if now := announcer(svc); slices.Contains(able, now) {
		return now
	}
	// Services spread over nodes, and a node's going moves only what it had (rendezvous hashing).
	best, most := "", uint64(0)
	for _, name := range able {
		h := fnv.New64a()
		_, _ = h.Write([]byte(name + "\x00" + string(svc.UID) + svc.Namespace + "/" + svc.Name))
		if v := mix(h.Sum64()); best == "" || v > most {
			best, most = name, v
		}
	}
	return best
}

// mix spreads what FNV leaves in the low bits (the finalizer of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// serving are the nodes that clients may send a Service's traffic to.
func (p *planner) serving(svc *corev1.Service) []*corev1.Node {
	local := map[string]bool(nil)
	if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		local = p.LocalTo(svc)
	}
	var out []*corev1.Node
	for _, n := range p.Nodes {
		_, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]
		if excluded || n.DeletionTimestamp != nil || !ready(n) {
			continue
		}
		if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && !local[n.Name] {
			continue
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func ready(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// nodeAddresses makes the nodes' addresses the Service's, at the Service's ports, unless another has these.
func (p *planner) nodeAddresses(svc *corev1.Service) Change {
	for _, port := range svc.Spec.Ports {
		if who, ok := p.Reserved[port.Port]; ok && port.Protocol != corev1.ProtocolUDP {
			return change(svc, nil, "", portTaken, fmt.Sprintf("port %d of the nodes is the %s's: choose another port, or create an AddressPool", port.Port, who))
		}
		if owner, ok := p.ports[portKey{port.Port, port.Protocol}]; ok {
			return change(svc, nil, "", portTaken, fmt.Sprintf("port %d of the nodes is Service %s's: choose another port, or create an AddressPool", port.Port, owner))
		}
	}
	for _, port := range svc.Spec.Ports {
		p.ports[portKey{port.Port, port.Protocol}] = nameOf(svc)
	}
	var addrs []netip.Addr
	for _, family := range families(svc) {
		for _, n := range p.serving(svc) {
			addrs = append(addrs, addressOf(n, family)...)
		}
	}
	return change(svc, addrs, "", "", "")
}

// addressOf is a node's external address of a family, or else its internal one.
func addressOf(n *corev1.Node, family corev1.IPFamily) []netip.Addr {
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, in := range n.Status.Addresses {
			if a, err := netip.ParseAddr(in.Address); err == nil && in.Type == kind && familyOf(a.Unmap()) == family {
				return []netip.Addr{a.Unmap()}
			}
		}
	}
	return nil
}

// announcer is the node that announces a Service's addresses, as its status says.
func announcer(svc *corev1.Service) string {
	if c := meta.FindStatusCondition(svc.Status.Conditions, api.AnnouncedCondition); c != nil && c.Status == metav1.ConditionTrue {
		return c.Message
	}
	return ""
}

// change makes the status of a Service with these addresses, which node announces if it is not empty.
func change(svc *corev1.Service, addrs []netip.Addr, node, reason, problem string) Change {
	status := svc.Status.DeepCopy()
	status.LoadBalancer.Ingress = nil
	for _, a := range addrs {
		mode := corev1.LoadBalancerIPModeVIP
		status.LoadBalancer.Ingress = append(status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a.String(), IPMode: &mode})
	}
	if node == "" {
		meta.RemoveStatusCondition(&status.Conditions, api.AnnouncedCondition)
	} else {
		meta.SetStatusCondition(&status.Conditions, metav1.Condition{
			Type: api.AnnouncedCondition, Status: metav1.ConditionTrue, Reason: "Elected", Message: node, ObservedGeneration: svc.Generation,
		})
	}
	return Change{Service: svc, Status: *status, Write: differs(&svc.Status, status), Reason: reason, Problem: problem}
}

// differs leaves out when and for which generation a condition was set.
func differs(a, b *corev1.ServiceStatus) bool {
	said := func(s *corev1.ServiceStatus) (status metav1.ConditionStatus, message string) {
		if c := meta.FindStatusCondition(s.Conditions, api.AnnouncedCondition); c != nil {
			return c.Status, c.Message
		}
		return "", ""
	}
	s1, m1 := said(a)
	s2, m2 := said(b)
	return s1 != s2 || m1 != m2 || !apiequality.Semantic.DeepEqual(a.LoadBalancer.Ingress, b.LoadBalancer.Ingress)
}
