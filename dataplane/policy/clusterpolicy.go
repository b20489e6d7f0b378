// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"skep.io/skep/api/clusterpolicy"
	"skep.io/skep/dataplane/maps"
)

// understandCluster never fails: a rule with a part that cannot be honoured matches nothing if it accepts, and denies
// everything if not, as the API's documentation asks of implementations. clusterpolicy.Problems tells of it.
func understandCluster(o *v1beta1.ClusterNetworkPolicy) *Policy {
	p := &Policy{
		name: types.NamespacedName{Name: o.Name}, spec: &o.Spec, tier: maps.TierAdmin, priority: o.Spec.Priority,
		selects: labels.Everything(), subject: labels.Everything(),
	}
	if o.Spec.Tier == v1beta1.BaselineTier {
		p.tier = maps.TierBaseline
	}
	unknown := clusterpolicy.Subject(&o.Spec.Subject) != nil
	switch s := &o.Spec.Subject; {
	case unknown:
	case s.Namespaces != nil:
		p.subject = selectorOf(s.Namespaces)
	default:
		p.subject, p.selects = selectorOf(&s.Pods.NamespaceSelector), selectorOf(&s.Pods.PodSelector)
	}
	add := func(d direction, a v1beta1.ClusterNetworkPolicyRuleAction, err error, r func() rule) {
		action, ok := actions[a]
		switch {
		case (err != nil || unknown) && a == v1beta1.ClusterNetworkPolicyRuleActionAccept, unknown && a == v1beta1.ClusterNetworkPolicyRuleActionPass:
			// It matches nothing; the place of those after it is the same.
		case err != nil || !ok:
			p.rules[d] = append(p.rules[d], rule{anyPeer: true, anyPort: true, action: maps.TierDeny})
		default:
			one := r()
			one.action = action
			p.rules[d] = append(p.rules[d], one)
		}
		p.isolates[d] = true
	}
	for i := range o.Spec.Ingress {
		r := &o.Spec.Ingress[i]
		add(ingress, r.Action, clusterpolicy.Ingress(r), func() rule { return ingressRule(r) })
	}
	for i := range o.Spec.Egress {
		r := &o.Spec.Egress[i]
		add(egress, r.Action, clusterpolicy.Egress(r), func() rule { return egressRule(r) })
	}
	return p
}

var actions = map[v1beta1.ClusterNetworkPolicyRuleAction]maps.TierAction{
	v1beta1.ClusterNetworkPolicyRuleActionAccept: maps.TierAccept,
	v1beta1.ClusterNetworkPolicyRuleActionDeny:   maps.TierDeny,
	v1beta1.ClusterNetworkPolicyRuleActionPass:   maps.TierPass,
}

// selectorOf is for selectors that were found to be valid.
func selectorOf(s *metav1.LabelSelector) labels.Selector {
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return out
}

func ingressRule(r *v1beta1.ClusterNetworkPolicyIngressRule) (out rule) {
	for i := range r.From {
		out.pods = append(out.pods, peerPods(r.From[i].Namespaces, r.From[i].Pods))
	}
	out.protocols(r.Protocols)
	return out
}

func egressRule(r *v1beta1.ClusterNetworkPolicyEgressRule) (out rule) {
	for i := range r.To {
		switch p := &r.To[i]; {
		case p.Nodes != nil:
			out.nodes = append(out.nodes, selectorOf(p.Nodes))
		case len(p.Networks) > 0:
			for _, n := range p.Networks {
				if cidr, err := parsePrefix(string(n)); err == nil { // it was found to be valid
					out.blocks = append(out.blocks, block{cidr: cidr})
				}
			}
		default:
			out.pods = append(out.pods, peerPods(p.Namespaces, p.Pods))
		}
	}
	out.protocols(r.Protocols)
	return out
}

func peerPods(namespaces *metav1.LabelSelector, pods *v1beta1.NamespacedPod) podPeer {
	if namespaces != nil {
		return podPeer{namespaces: selectorOf(namespaces), pods: labels.Everything()}
	}
	return podPeer{namespaces: selectorOf(&pods.NamespaceSelector), pods: selectorOf(&pods.PodSelector)}
}

func (r *rule) protocols(in []v1beta1.ClusterNetworkPolicyProtocol) {
	r.anyPort = len(in) == 0
	for i := range in {
		switch p := &in[i]; {
		case p.TCP != nil:
			r.ports = append(r.ports, portRule{proto: maps.TCP, ports: rangeOf(p.TCP.DestinationPort)})
		case p.UDP != nil:
			r.ports = append(r.ports, portRule{proto: maps.UDP, ports: rangeOf(p.UDP.DestinationPort)})
		case p.SCTP != nil:
			r.ports = append(r.ports, portRule{proto: maps.SCTP, ports: rangeOf(p.SCTP.DestinationPort)})
		default:
			r.ports = append(r.ports, portRule{name: p.DestinationNamedPort})
		}
	}
}

func rangeOf(p *v1beta1.Port) portRange {
	switch {
	case p == nil:
		return portRange{0, 65535}
	case p.Range != nil:
		return portRange{uint16(p.Range.Start), uint16(p.Range.End)}
	}
	return portRange{uint16(p.Number), uint16(p.Number)}
}

// SetClusterPolicy makes a ClusterNetworkPolicy known, or its new content. Returns whether the content is another.
func (t *Table) SetClusterPolicy(o *v1beta1.ClusterNetworkPolicy) bool {
	if !t.LearnCluster(o) {
		return false
	}
	t.ResolveAll()
	return true
}

// LearnCluster is SetClusterPolicy without consequences before ResolveAll.
func (t *Table) LearnCluster(o *v1beta1.ClusterNetworkPolicy) bool {
	old := t.clusterwide[o.Name]
	if old != nil && old.same(&o.Spec) {
		return false
	}
	p := understandCluster(o)
	t.revision++
	p.revision = t.revision
	t.clusterwide[o.Name] = p
	return true
}

// DeleteClusterPolicy forgets one. Returns whether it was known.
func (t *Table) DeleteClusterPolicy(name string) bool {
	if t.clusterwide[name] == nil {
		return false
	}
	delete(t.clusterwide, name)
	t.ResolveAll()
	return true
}

// SetNodes looks again at what rules say of nodes, whose labels or addresses may have changed.
func (t *Table) SetNodes() {
	for _, p := range t.clusterwide {
		for _, r := range p.rules[egress] {
			if len(r.nodes) > 0 {
				t.ResolveAll()
				return
			}
		}
	}
}

// selecting gives the policies that judge one direction of a pod, in the order in which they are asked. Those of the
// same tier and priority, which the API leaves to the implementation, are asked by name.
func (t *Table) selecting(d direction, pod *Pod, namespace labels.Set) (out []*Policy) {
	for _, p := range t.policies[pod.Namespace] {
		if p.isolates[d] && p.selects.Matches(pod.Labels) {
			out = append(out, p)
		}
	}
	for _, p := range t.clusterwide {
		if p.isolates[d] && p.subject.Matches(namespace) && p.selects.Matches(pod.Labels) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *Policy) int {
		return cmp.Or(cmp.Compare(a.order(), b.order()), cmp.Compare(a.priority, b.priority), cmp.Compare(a.name.Name, b.name.Name))
	})
	return out
}

// order of tiers: what administrators decide, what namespaces decide, and what holds where nobody did.
func (p *Policy) order() int {
	switch p.tier {
	case maps.TierAdmin:
		return 0
	case maps.TierBaseline:
		return 2
	}
	return 1
}

// String is how drops and metrics name a policy.
func (p *Policy) String() string {
	switch p.tier {
	case maps.TierAdmin:
		return string(v1beta1.AdminTier) + "/" + p.name.Name
	case maps.TierBaseline:
		return string(v1beta1.BaselineTier) + "/" + p.name.Name
	}
	return p.name.Namespace + "/" + p.name.Name
}

// nodeBlocks are the addresses of the nodes that a rule names.
func nodeBlocks(c Cluster, selectors []labels.Selector) (out []block) {
	for _, s := range selectors {
		for _, a := range c.Nodes(s) {
			out = append(out, block{cidr: netip.PrefixFrom(a, a.BitLen())})
		}
	}
	return out
}
