// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/dataplane/network"
)

// peers are the other nodes, as the API has them.
type peers struct {
	self    string
	nodes   corelisters.NodeLister
	synced  cache.InformerSynced
	changed chan struct{} // has a value after a change that matters here
}

func newPeers(cfg Config) (*peers, error) {
	nodes := cfg.Informers.Core().V1().Nodes()
	p := &peers{self: cfg.NodeName, nodes: nodes.Lister(), changed: make(chan struct{}, 1)}
	signal := func(any) {
		select {
		case p.changed <- struct{}{}:
		default: // one is waiting to be read
		}
	}
	registration, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: signal, DeleteFunc: signal,
		UpdateFunc: func(old, new any) {
			before, ok := old.(*corev1.Node)
			after, ok2 := new.(*corev1.Node)
			if ok && ok2 && !samePeer(peerOf(before), peerOf(after)) {
				signal(nil)
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watching Nodes: %w", err)
	}
	p.synced = registration.HasSynced
	return p, nil
}

// list is every node but this one. known is false as long as it might lack some.
func (p *peers) list() (out []network.Peer, known bool) {
	if !p.synced() {
		return nil, false
	}
	all, err := p.nodes.List(labels.Everything())
	if err != nil {
		return nil, false
	}
	for _, n := range all {
		if n.Name != p.self {
			out = append(out, peerOf(n))
		}
	}
	return out, true
}

// peerOf reads what matters of a node for its peers. It is pure.
func peerOf(n *corev1.Node) network.Peer {
	p := network.Peer{Name: n.Name}
	for _, a := range n.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			p.Addrs = append(p.Addrs, addr.Unmap())
		}
	}
	for _, s := range n.Spec.PodCIDRs {
		if r, err := netip.ParsePrefix(s); err == nil {
			p.PodCIDRs = append(p.PodCIDRs, r.Masked())
		}
	}
	return p
}

func samePeer(a, b network.Peer) bool {
	return slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.PodCIDRs, b.PodCIDRs)
}

// syncPeersLocked makes the other nodes' pods reachable. Until all nodes are known, what an earlier process
// set up stays: its connections go on.
func (d *Dataplane) syncPeersLocked() error {
	peers, known := d.peers.list()
	if !known || d.podCIDRs == nil {
		return nil
	}
	problems, err := network.Peers(d.cfg.Routing, network.Self{Addrs: d.cfg.NodeIPs, PodCIDRs: d.podCIDRs}, peers)
	for name, problem := range problems {
		if d.told[name] != problem {
			d.cfg.Log.Error("the pods of a node cannot be reached from here", "node", name, "why", problem)
		}
	}
	d.told = maps.Clone(problems)
	if err != nil {
		return fmt.Errorf("other nodes: %w", err)
	}
	return nil
}

// PodMTU is the largest packet that this node's pods may send, in bytes.
func (d *Dataplane) PodMTU() (int, error) { return network.PodMTU(d.cfg.Routing, d.cfg.NodeIPs) }
