// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/dataplane/flows"
)

// peerNames finds out whose addresses are that a node does not know itself: pods and nodes elsewhere. A node
// keeps no list of all pods of the cluster; the API has one.
type peerNames struct {
	client kubernetes.Interface

	mu      sync.Mutex
	read    time.Time
	known   map[netip.Addr]flows.Peer
	unknown map[netip.Addr]bool // not even after reading anew
}

// readAgain bounds how often unknown addresses make the API list all pods.
const readAgain = 2 * time.Second

// name fills in a peer's names if nobody did.
func (n *peerNames) name(ctx context.Context, p *flows.Peer) error {
	if p.Pod != "" || p.Node != "" || !p.Address.IsValid() {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	known, ok := n.known[p.Address]
	if !ok && !n.unknown[p.Address] && time.Since(n.read) > readAgain {
		if err := n.list(ctx); err != nil {
			return err
		}
		if known, ok = n.known[p.Address]; !ok {
			n.unknown[p.Address] = true
		}
	}
	if ok {
		p.Namespace, p.Pod, p.Node = known.Namespace, known.Pod, known.Node
	}
	return nil
}

func (n *peerNames) list(ctx context.Context) error {
	pods, err := n.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return fmt.Errorf("list pods, whose names are to be shown: %w", err)
	}
	nodes, err := n.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return fmt.Errorf("list nodes, whose names are to be shown: %w", err)
	}
	n.read, n.known, n.unknown = time.Now(), map[netip.Addr]flows.Peer{}, map[netip.Addr]bool{}
	for i := range nodes.Items {
		for _, a := range nodes.Items[i].Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil {
				n.known[addr] = flows.Peer{Node: nodes.Items[i].Name}
			}
		}
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			if addr, err := netip.ParseAddr(ip.IP); err == nil {
				n.known[addr] = flows.Peer{Namespace: p.Namespace, Pod: p.Name}
			}
		}
	}
	return nil
}
