// SPDX-License-Identifier: Apache-2.0

package model

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

const (
	accept = v1beta1.ClusterNetworkPolicyRuleActionAccept
	deny   = v1beta1.ClusterNetworkPolicyRuleActionDeny
)

// tier asks the rules of one tier in their order; the first that matches decides. Empty: none does.
func (c *Cluster) tier(t v1beta1.Tier, subject *corev1.Pod, rules func(*v1beta1.ClusterNetworkPolicy) []clusterRule, conn Connection, peer netip.Addr, target *corev1.Pod) v1beta1.ClusterNetworkPolicyRuleAction {
	var policies []*v1beta1.ClusterNetworkPolicy
	for _, p := range c.ClusterPolicies {
		if p.Spec.Tier == t && c.isSubject(&p.Spec.Subject, subject) {
			policies = append(policies, p)
		}
	}
	slices.SortFunc(policies, func(a, b *v1beta1.ClusterNetworkPolicy) int {
		return cmp.Or(cmp.Compare(a.Spec.Priority, b.Spec.Priority), cmp.Compare(a.Name, b.Name))
	})
	for _, p := range policies {
		for _, r := range rules(p) {
			switch {
			case r.broken && r.action == accept:
			case r.broken:
				return deny
			case slices.ContainsFunc(r.peers, func(one clusterPeer) bool { return c.isClusterPeer(one, peer) }) && clusterPorts(r.protocols, conn, target):
				return r.action
			}
		}
	}
	return ""
}

// clusterRule is a rule of either direction.
type clusterRule struct {
	action    v1beta1.ClusterNetworkPolicyRuleAction
	peers     []clusterPeer
	protocols []v1beta1.ClusterNetworkPolicyProtocol
	broken    bool
}

type clusterPeer = v1beta1.ClusterNetworkPolicyEgressPeer

func ingressRules(p *v1beta1.ClusterNetworkPolicy) (out []clusterRule) {
	for _, r := range p.Spec.Ingress {
		one := clusterRule{action: r.Action, protocols: r.Protocols}
		for _, peer := range r.From {
			one.add(clusterPeer{Namespaces: peer.Namespaces, Pods: peer.Pods})
		}
		out = append(out, one)
	}
	return out
}

func egressRules(p *v1beta1.ClusterNetworkPolicy) (out []clusterRule) {
	for _, r := range p.Spec.Egress {
		one := clusterRule{action: r.Action, protocols: r.Protocols}
		for _, peer := range r.To {
			one.add(peer)
		}
		out = append(out, one)
	}
	return out
}

func (r *clusterRule) add(p clusterPeer) {
	r.broken = r.broken || p.Namespaces == nil && p.Pods == nil && p.Nodes == nil && len(p.Networks) == 0
	r.peers = append(r.peers, p)
}

func (c *Cluster) namespace(name string) map[string]string {
	for _, ns := range c.Namespaces {
		if ns.Name == name {
			return ns.Labels
		}
	}
	return nil
}

func (c *Cluster) isSubject(s *v1beta1.ClusterNetworkPolicySubject, pod *corev1.Pod) bool {
	return c.selectsPod(s.Namespaces, s.Pods, pod)
}

func (c *Cluster) selectsPod(namespaces *metav1.LabelSelector, pods *v1beta1.NamespacedPod, pod *corev1.Pod) bool {
	switch {
	case pod == nil:
		return false
	case namespaces != nil:
		return selects(namespaces, c.namespace(pod.Namespace))
	case pods != nil:
		return selects(&pods.NamespaceSelector, c.namespace(pod.Namespace)) && selects(&pods.PodSelector, pod.Labels)
	}
	return false
}

func (c *Cluster) isClusterPeer(p clusterPeer, a netip.Addr) bool {
	for _, n := range p.Networks {
		if netip.MustParsePrefix(string(n)).Contains(a) {
			return true
		}
	}
	for _, n := range c.Nodes {
		for _, own := range n.Status.Addresses {
			if p.Nodes != nil && own.Address == a.String() && selects(p.Nodes, n.Labels) {
				return true
			}
		}
	}
	return c.selectsPod(p.Namespaces, p.Pods, c.pod(a))
}

func clusterPorts(protocols []v1beta1.ClusterNetworkPolicyProtocol, conn Connection, target *corev1.Pod) bool {
	in := func(p *v1beta1.Port) bool {
		switch {
		case p == nil:
			return true
		case p.Range != nil:
			return conn.Port >= p.Range.Start && conn.Port <= p.Range.End
		}
		return conn.Port == p.Number
	}
	for _, p := range protocols {
		switch {
		case p.TCP != nil && conn.Proto == corev1.ProtocolTCP && in(p.TCP.DestinationPort),
			p.UDP != nil && conn.Proto == corev1.ProtocolUDP && in(p.UDP.DestinationPort),
			p.SCTP != nil && conn.Proto == corev1.ProtocolSCTP && in(p.SCTP.DestinationPort),
			p.DestinationNamedPort != "" && named(target, p.DestinationNamedPort, conn):
			return true
		}
	}
	return len(protocols) == 0
}
