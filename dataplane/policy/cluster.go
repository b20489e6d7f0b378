// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
)

// cluster is what informers know. Before they are started it is empty.
type cluster struct {
	pods       corelisters.PodLister
	namespaces corelisters.NamespaceLister
	nodes      corelisters.NodeLister // from the beginning
}

func (c *cluster) Nodes(s labels.Selector) (out []netip.Addr) {
	all, err := c.nodes.List(s)
	if err != nil {
		return nil // a cache's list does not fail
	}
	for _, n := range all {
		out = append(out, nodeAddresses(n)...)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func nodeAddresses(n *corev1.Node) (out []netip.Addr) {
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil { // others are names
			out = append(out, ip.Unmap())
		}
	}
	return out
}

func (c *cluster) Pod(name types.NamespacedName) *Pod {
	if c.pods == nil {
		return nil
	}
	pod, err := c.pods.Pods(name.Namespace).Get(name.Name)
	if err != nil {
		return nil // only that it is not there
	}
	return PodOf(pod)
}

func (c *cluster) Pods(namespace string) (out []*Pod) {
	if c.pods == nil {
		return nil
	}
	all, err := c.pods.Pods(namespace).List(labels.Everything())
	if err != nil {
		return nil // a selector that matches everything cannot be wrong
	}
	for _, pod := range all {
		out = append(out, PodOf(pod))
	}
	return out
}

func (c *cluster) Namespace(name string) labels.Set {
	if c.namespaces == nil {
		return nil
	}
	ns, err := c.namespaces.Get(name)
	if err != nil {
		return nil
	}
	if ns.Labels == nil {
		return labels.Set{}
	}
	return ns.Labels
}
