// SPDX-License-Identifier: Apache-2.0

// Package model says, as plainly as possible, what networking.k8s.io/v1 NetworkPolicies and
// policy.networking.k8s.io/v1beta1 ClusterNetworkPolicies mean. Tests compare
// with it what the kernel's maps and programs make of them.
package model

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// Cluster is everything that policies speak of.
type Cluster struct {
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy

	ClusterPolicies []*v1beta1.ClusterNetworkPolicy
	Nodes           []*corev1.Node
}

// Connection is a first packet. Proto is empty for protocols without ports.
type Connection struct {
	From, To netip.Addr
	Proto    corev1.Protocol
	Port     int32
}

// Egress says whether the pod that a connection comes from may make it; anybody but a pod may.
func (c *Cluster) Egress(conn Connection) bool {
	from := c.pod(conn.From)
	if from == nil || conn.From == conn.To {
		return true
	}
	tier := func(t v1beta1.Tier) v1beta1.ClusterNetworkPolicyRuleAction {
		return c.tier(t, from, egressRules, conn, conn.To, c.pod(conn.To))
	}
	switch tier(v1beta1.AdminTier) {
	case accept:
		return true
	case deny:
		return false
	}
	isolated := false
	for _, p := range c.selecting(from, networkingv1.PolicyTypeEgress) {
		isolated = true
		for _, r := range p.Spec.Egress {
			if c.byBlock(r.To, conn.To) && ports(r.Ports, conn, nil) ||
				c.bySelector(p, r.To, conn.To) && ports(r.Ports, conn, c.pod(conn.To)) {
				return true
			}
		}
	}
	return !isolated && tier(v1beta1.BaselineTier) != deny
}

// Ingress says whether the pod that a connection goes to may get it; anybody but a pod may.
func (c *Cluster) Ingress(conn Connection) bool {
	to := c.pod(conn.To)
	if to == nil || conn.From == conn.To {
		return true
	}
	tier := func(t v1beta1.Tier) v1beta1.ClusterNetworkPolicyRuleAction {
		return c.tier(t, to, ingressRules, conn, conn.From, to)
	}
	switch tier(v1beta1.AdminTier) {
	case accept:
		return true
	case deny:
		return false
	}
	isolated := false
	for _, p := range c.selecting(to, networkingv1.PolicyTypeIngress) {
		isolated = true
		for _, r := range p.Spec.Ingress {
			if (c.byBlock(r.From, conn.From) || c.bySelector(p, r.From, conn.From)) && ports(r.Ports, conn, to) {
				return true
			}
		}
	}
	return !isolated && tier(v1beta1.BaselineTier) != deny
}

func (c *Cluster) pod(a netip.Addr) *corev1.Pod {
	for _, p := range c.Pods {
		for _, ip := range p.Status.PodIPs {
			if ip.IP == a.String() {
				return p
			}
		}
	}
	return nil
}

func (c *Cluster) selecting(pod *corev1.Pod, direction networkingv1.PolicyType) (out []*networkingv1.NetworkPolicy) {
	for _, p := range c.Policies {
		for _, t := range p.Spec.PolicyTypes {
			if t == direction && p.Namespace == pod.Namespace && selects(&p.Spec.PodSelector, pod.Labels) {
				out = append(out, p)
			}
		}
	}
	return out
}

func selects(s *metav1.LabelSelector, l map[string]string) bool {
	selector, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && selector.Matches(labels.Set(l))
}

func (c *Cluster) byBlock(peers []networkingv1.NetworkPolicyPeer, a netip.Addr) bool {
	for _, peer := range peers {
		if peer.IPBlock != nil && inBlock(peer.IPBlock, a) {
			return true
		}
	}
	return false
}

// bySelector holds for everybody if no peers are given.
func (c *Cluster) bySelector(p *networkingv1.NetworkPolicy, peers []networkingv1.NetworkPolicyPeer, a netip.Addr) bool {
	for _, peer := range peers {
		if peer.IPBlock == nil && c.isPeer(p, peer, a) {
			return true
		}
	}
	return len(peers) == 0
}

func inBlock(b *networkingv1.IPBlock, a netip.Addr) bool {
	if !netip.MustParsePrefix(b.CIDR).Contains(a) {
		return false
	}
	for _, e := range b.Except {
		if netip.MustParsePrefix(e).Contains(a) {
			return false
		}
	}
	return true
}

func (c *Cluster) isPeer(p *networkingv1.NetworkPolicy, peer networkingv1.NetworkPolicyPeer, a netip.Addr) bool {
	pod := c.pod(a)
	if pod == nil || peer.PodSelector != nil && !selects(peer.PodSelector, pod.Labels) {
		return false
	}
	if peer.NamespaceSelector == nil {
		return pod.Namespace == p.Namespace
	}
	for _, ns := range c.Namespaces {
		if ns.Name == pod.Namespace {
			return selects(peer.NamespaceSelector, ns.Labels)
		}
	}
	return false
}

// ports: a name means what the pod that is connected to gives it. That is nil where an IP block alone makes
// it a peer of an egress rule: blocks are for what is not a pod, and names are pods'.
func ports(ports []networkingv1.NetworkPolicyPort, conn Connection, to *corev1.Pod) bool {
	if len(ports) == 0 {
		return true
	}
	for _, p := range ports {
		proto := corev1.ProtocolTCP
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		if proto != conn.Proto {
			continue
		}
		switch {
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if named(to, p.Port.StrVal, conn) {
				return true
			}
		case p.EndPort != nil:
			if conn.Port >= p.Port.IntVal && conn.Port <= *p.EndPort {
				return true
			}
		case conn.Port == p.Port.IntVal:
			return true
		}
	}
	return false
}

func named(pod *corev1.Pod, name string, conn Connection) bool {
	if pod == nil {
		return false
	}
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == name && p.Protocol == conn.Proto && p.ContainerPort == conn.Port {
				return true
			}
		}
	}
	return false
}
