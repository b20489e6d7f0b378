// SPDX-License-Identifier: Apache-2.0

// Package policy turns NetworkPolicies into what the kernel programs judge packets by.
package policy

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skep.io/skep/dataplane/maps"
)

// direction of traffic as the selected pod sees it.
type direction int

const (
	ingress direction = iota
	egress
)

func (d direction) String() string { return [...]string{"ingress", "egress"}[d] }

// Policy is a NetworkPolicy or a ClusterNetworkPolicy, understood.
type Policy struct {
	name     types.NamespacedName
	revision uint64          // another one for other content
	spec     any             // a pointer to that of the API object
	tier     maps.Tier       // 0 for NetworkPolicies
	priority int32           // in its tier, the lowest first
	subject  labels.Selector // of namespaces; nil for NetworkPolicies, which have their own
	selects  labels.Selector
	isolates [2]bool
	rules    [2][]rule
	problem  error // what could not be understood: then nothing is let through
}

// rule lets its peers use its ports, or does what its action is.
type rule struct {
	tier   maps.Tier // and the rest of these lines are of ClusterNetworkPolicies only
	place  int       // in all rules of the tier that judge a pod, from 1 on
	action maps.TierAction
	nodes  []labels.Selector

	anyPeer bool
	pods    []podPeer
	blocks  []block
	anyPort bool
	ports   []portRule
}

type podPeer struct {
	namespace  string          // when namespaces is nil
	namespaces labels.Selector // by labels
	pods       labels.Selector
}

type block struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

// portRule is a range, or a name that the pod on the receiving side gives a meaning.
type portRule struct {
	proto uint8 // 0, with a name, is any
	ports portRange
	name  string
}

func (p *Policy) same(spec any) bool { return reflect.DeepEqual(p.spec, spec) }

// understand never fails: a policy with a part that makes no sense isolates and allows nothing.
func understand(np *networkingv1.NetworkPolicy) *Policy {
	p := &Policy{name: types.NamespacedName{Namespace: np.Namespace, Name: np.Name}, spec: &np.Spec}
	var err error
	if p.selects, err = metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err != nil {
		p.selects, p.problem = labels.Everything(), fmt.Errorf("podSelector: %w", err)
	}
	// Types are defaulted by the API server; an object from before that is read as it would be.
	p.isolates[ingress] = len(np.Spec.PolicyTypes) == 0
	p.isolates[egress] = len(np.Spec.PolicyTypes) == 0 && len(np.Spec.Egress) > 0
	for _, t := range np.Spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			p.isolates[ingress] = true
		case networkingv1.PolicyTypeEgress:
			p.isolates[egress] = true
		default:
			p.isolates = [2]bool{true, true}
			p.problem = fmt.Errorf("policyTypes: %q is neither Ingress nor Egress", t)
		}
	}
	add := func(d direction, i int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
		r, err := p.rule(peers, ports)
		if err != nil {
			p.problem = fmt.Errorf("%s[%d]: %w", d, i, err)
			return
		}
		p.rules[d] = append(p.rules[d], r)
	}
	if p.isolates[ingress] {
		for i, r := range np.Spec.Ingress {
			add(ingress, i, r.From, r.Ports)
		}
	}
	if p.isolates[egress] {
		for i, r := range np.Spec.Egress {
			add(egress, i, r.To, r.Ports)
		}
	}
	return p
}

func (p *Policy) rule(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) (rule, error) {
	r := rule{anyPeer: len(peers) == 0, anyPort: len(ports) == 0}
	for i, peer := range peers {
		if peer.IPBlock != nil {
			b, err := blockOf(peer.IPBlock)
			if err != nil {
				return r, fmt.Errorf("peer %d: %w", i, err)
			}
			r.blocks = append(r.blocks, b)
			continue
		}
		pods, err := p.podPeer(peer)
		if err != nil {
			return r, fmt.Errorf("peer %d: %w", i, err)
		}
		r.pods = append(r.pods, pods)
	}
	for i, port := range ports {
		pr, err := portOf(port)
		if err != nil {
			return r, fmt.Errorf("port %d: %w", i, err)
		}
		r.ports = append(r.ports, pr)
	}
	return r, nil
}

func (p *Policy) podPeer(peer networkingv1.NetworkPolicyPeer) (out podPeer, err error) {
	out = podPeer{namespace: p.name.Namespace, pods: labels.Everything()}
	if peer.NamespaceSelector == nil && peer.PodSelector == nil {
		return out, fmt.Errorf("neither podSelector, namespaceSelector nor ipBlock")
	}
	if peer.NamespaceSelector != nil {
		if out.namespaces, err = metav1.LabelSelectorAsSelector(peer.NamespaceSelector); err != nil {
			return out, fmt.Errorf("namespaceSelector: %w", err)
		}
	}
	if peer.PodSelector != nil {
		if out.pods, err = metav1.LabelSelectorAsSelector(peer.PodSelector); err != nil {
			return out, fmt.Errorf("podSelector: %w", err)
		}
	}
	return out, nil
}

func blockOf(b *networkingv1.IPBlock) (out block, err error) {
	if out.cidr, err = parsePrefix(b.CIDR); err != nil {
		return out, fmt.Errorf("cidr: %w", err)
	}
	for _, s := range b.Except {
		e, err := parsePrefix(s)
		if err != nil {
			return out, fmt.Errorf("except: %w", err)
		}
		out.except = append(out.except, e)
	}
	return out, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), err
}

func portOf(p networkingv1.NetworkPolicyPort) (out portRule, err error) {
	proto := corev1.ProtocolTCP
	if p.Protocol != nil {
		proto = *p.Protocol
	}
	if out.proto, err = protocol(proto); err != nil {
		return out, err
	}
	switch {
	case p.Port == nil:
		out.ports = portRange{0, 65535}
	case p.Port.Type == intstr.String:
		out.name = p.Port.StrVal
	case p.Port.IntVal < 1 || p.Port.IntVal > 65535:
		return out, fmt.Errorf("%d is no port", p.Port.IntVal)
	case p.EndPort != nil && (*p.EndPort < p.Port.IntVal || *p.EndPort > 65535):
		return out, fmt.Errorf("endPort %d does not end a range from %d", *p.EndPort, p.Port.IntVal)
	case p.EndPort != nil:
		out.ports = portRange{uint16(p.Port.IntVal), uint16(*p.EndPort)}
	default:
		out.ports = portRange{uint16(p.Port.IntVal), uint16(p.Port.IntVal)}
	}
	return out, nil
}

func protocol(p corev1.Protocol) (uint8, error) {
	switch p {
	case corev1.ProtocolTCP:
		return maps.TCP, nil
	case corev1.ProtocolUDP:
		return maps.UDP, nil
	case corev1.ProtocolSCTP:
		return maps.SCTP, nil
	}
	return 0, fmt.Errorf("protocol %q is none of TCP, UDP and SCTP", p)
}

// matches says whether the rule has the pod as a peer by selectors.
func (r *rule) matches(pod *Pod, namespace labels.Set) bool {
	for i := range r.pods {
		p := &r.pods[i]
		if p.namespaces == nil && p.namespace != pod.Namespace || p.namespaces != nil && !p.namespaces.Matches(namespace) {
			continue
		}
		if p.pods.Matches(pod.Labels) {
			return true
		}
	}
	return false
}

// named says whether a port has a name for a number.
func (r *rule) named() bool {
	return slices.ContainsFunc(r.ports, func(p portRule) bool { return p.name != "" })
}

func (p *Policy) named(d direction) bool {
	return slices.ContainsFunc(p.rules[d], func(r rule) bool { return r.named() })
}

// open adds the rule's ports to out. Names mean what target, the pod on the receiving side, gives them;
// it is nil for addresses that are no pod's. named tells whether only those are wanted.
func (r *rule) open(out *ports, target *Pod, named bool) {
	if r.anyPort {
		out.all = out.all || !named
		return
	}
	for _, p := range r.ports {
		if p.name == "" {
			if !named {
				out.add(p.proto, p.ports)
			}
			continue
		}
		if target == nil {
			continue
		}
		for _, c := range target.Ports {
			if c.Name == p.name && (p.proto == 0 || c.Proto == p.proto) {
				out.add(c.Proto, portRange{c.Port, c.Port})
			}
		}
	}
}
