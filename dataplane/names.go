// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// formerPods is how many addresses are remembered after their pods are gone: events about them may still be
// unread.
const formerPods = 512

// names of what is on this node. The zero value is ready.
type names struct {
	mu      sync.Mutex
	pods    map[netip.Addr]namedPod
	devices map[uint32]types.NamespacedName
	cookies map[uint64]types.NamespacedName // of network namespaces
	paths   map[uint64]string               // of network namespaces, by cookie
	former  []netip.Addr
	node    map[netip.Addr]bool // the node's own
}

type namedPod struct {
	types.NamespacedName
	gone bool
}

func (n *names) add(e Endpoint) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pods == nil {
		n.pods, n.devices = map[netip.Addr]namedPod{}, map[uint32]types.NamespacedName{}
		n.cookies, n.paths = map[uint64]types.NamespacedName{}, map[uint64]string{}
	}
	name := types.NamespacedName{Namespace: e.Namespace, Name: e.Name}
	n.devices[uint32(e.Ifindex)] = name
	if e.NetnsCookie != 0 {
		n.cookies[e.NetnsCookie] = name
		n.paths[e.NetnsCookie] = e.NetNS
	}
	for _, a := range e.Addrs {
		n.pods[a.Unmap()] = namedPod{name, false}
	}
}

func (n *names) setNode(addrs []netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.node = map[netip.Addr]bool{}
	for _, a := range addrs {
		n.node[a] = true
	}
}

func (n *names) remove(e Endpoint) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.devices, uint32(e.Ifindex))
	delete(n.cookies, e.NetnsCookie)
	delete(n.paths, e.NetnsCookie)
	for _, a := range e.Addrs {
		a = a.Unmap()
		if p, ok := n.pods[a]; ok && p.Namespace == e.Namespace && p.Name == e.Name {
			p.gone = true
			n.pods[a] = p
			n.former = append(n.former, a)
		}
	}
	for len(n.former) > formerPods {
		if n.pods[n.former[0]].gone {
			delete(n.pods, n.former[0])
		}
		n.former = n.former[1:]
	}
}

// netns is where the network namespace of a pod is, and whose it is.
func (n *names) netns(cookie uint64) (path, pod string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.paths[cookie], n.cookies[cookie].String()
}

// namespaces are the cookies of the network namespaces of pods.
func (n *names) namespaces() map[uint64]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := make(map[uint64]bool, len(n.paths))
	for cookie := range n.paths {
		all[cookie] = true
	}
	return all
}

// addresses is how many pods of the node have.
func (n *names) addresses() (count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.pods {
		if !p.gone {
			count++
		}
	}
	return count
}

// flowNames is what the node knows of the numbers in events.
type flowNames struct{ d *Dataplane }

func (f flowNames) Pod(a netip.Addr) (namespace, name string, ok bool) {
	f.d.names.mu.Lock()
	defer f.d.names.mu.Unlock()
	p, ok := f.d.names.pods[a]
	return p.Namespace, p.Name, ok
}

func (f flowNames) Device(ifindex uint32) (namespace, name string, ok bool) {
	f.d.names.mu.Lock()
	defer f.d.names.mu.Unlock()
	p, ok := f.d.names.devices[ifindex]
	return p.Namespace, p.Name, ok
}

func (f flowNames) Namespace(cookie uint64) (namespace, name string, ok bool) {
	f.d.names.mu.Lock()
	defer f.d.names.mu.Unlock()
	p, ok := f.d.names.cookies[cookie]
	return p.Namespace, p.Name, ok || cookie == f.d.loader.NetnsCookie()
}

func (f flowNames) IsNode(a netip.Addr) bool {
	f.d.names.mu.Lock()
	defer f.d.names.mu.Unlock()
	return f.d.names.node[a]
}

func (f flowNames) Service(id uint32) (namespace, name string, ok bool) {
	key, ok := f.d.services.Name(id)
	namespace, name, _ = strings.Cut(key, "/")
	return namespace, name, ok
}

func (f flowNames) Policies(set, rule uint32, namespace, pod, direction string) (policies []string, why string) {
	return f.d.policies.Denial(set, rule, types.NamespacedName{Namespace: namespace, Name: pod}, direction)
}

// readFlow gives an event its names.
func (d *Dataplane) readFlow(e *maps.FlowEvent, now flows.Moment) flows.Flow {
	return flows.Read(e, d.cfg.NodeName, flowNames{d}, now)
}
