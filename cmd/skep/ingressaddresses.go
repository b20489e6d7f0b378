// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
)

// readyAddresses lists where the cluster's ingress answers.
func readyAddresses(factory informers.SharedInformerFactory) func() []netip.Addr {
	nodes := factory.Core().V1().Nodes().Lister()
	return func() []netip.Addr {
		all, err := nodes.List(labels.Everything())
		if err != nil {
			return nil // a selector that matches everything cannot be wrong
		}
		return ingressAddresses(all)
	}
}

// ingressAddresses are those of the nodes that are Ready; if none is, of all: clients lose nothing by
// trying, and whoever follows the status is not made to forget it for the moment of a restart.
func ingressAddresses(nodes []*corev1.Node) []netip.Addr {
	var ready, all []netip.Addr
	for _, n := range nodes {
		for _, a := range n.Status.Addresses {
			addr, err := netip.ParseAddr(a.Address)
			if err != nil || a.Type != corev1.NodeInternalIP {
				continue
			}
			all = append(all, addr)
			if nodeState(*n) == "Ready" {
				ready = append(ready, addr)
			}
		}
	}
	if len(ready) == 0 {
		return all
	}
	return ready
}
