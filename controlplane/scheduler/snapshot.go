// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// snapshot is the cluster as decisions see it: all nodes with the sums over their pods, including
// pods that were assumed (decided on, not yet seen bound). It only changes by differences. It has
// one owner at a time; see Scheduler.mu.
type snapshot struct {
	byName map[string]*node
	nodes  []*node // those with an object, in no order; the search starts at a moving place
	pods   map[types.UID]*pod
	// imageNodes counts the nodes that have an image.
	imageNodes map[string]int
	// priorities counts pods by priority.
	priorities map[int32]int
	topology   *topology
	workloads  *workloads
	storage    *storage
	profiles   Profiles
	// next is where the search for the next pod starts, so that all nodes are looked at in turn.
	next int
}

func newSnapshot() *snapshot {
	return &snapshot{
		byName: map[string]*node{}, pods: map[types.UID]*pod{}, imageNodes: map[string]int{}, priorities: map[int32]int{},
		topology: newTopology(), workloads: newWorkloads(), storage: newStorage(), profiles: DefaultProfiles(),
	}
}

func (s *snapshot) node(name string) *node {
	n := s.byName[name]
	if n == nil {
		n = newNode(name)
		s.byName[name] = n
	}
	return n
}

func (s *snapshot) setNode(object *v1.Node) *node {
	n := s.node(object.Name)
	s.countImages(n, -1)
	if regroups(n.object, object) {
		s.topology.regroup(n, func() { n.set(object) })
	} else {
		n.set(object)
	}
	s.countImages(n, +1)
	if n.position < 0 {
		n.position = len(s.nodes)
		s.nodes = append(s.nodes, n)
	}
	return n
}

// removeNode keeps the sums while pods still name the node: it may come back before they are gone.
func (s *snapshot) removeNode(name string) {
	n := s.byName[name]
	if n == nil {
		return
	}
	if n.position >= 0 {
		last := len(s.nodes) - 1
		s.nodes[n.position] = s.nodes[last]
		s.nodes[n.position].position = n.position
		s.nodes[last] = nil
		s.nodes = s.nodes[:last]
		n.position = -1
	}
	s.countImages(n, -1)
	n.images = nil
	s.topology.regroup(n, func() { n.object = nil })
	s.drop(n)
}

func (s *snapshot) countImages(n *node, delta int) {
	for name := range n.images {
		if s.imageNodes[name] += delta; s.imageNodes[name] == 0 {
			delete(s.imageNodes, name)
		}
	}
}

func (s *snapshot) drop(n *node) {
	if n.object == nil && len(n.pods) == 0 && len(n.nominated) == 0 {
		delete(s.byName, n.name)
	}
}

// setPod accounts a pod on the node it names, instead of whatever was accounted for it before:
// an assumption, an older version, another node. A nomination must have been taken back.
func (s *snapshot) setPod(p *pod, nodeName string) {
	s.removePod(p.uid)
	p.node = nodeName
	s.pods[p.uid] = p
	s.priorities[p.priority]++
	s.topology.hold(p)
	s.place(p, s.node(nodeName))
	p.on = s.byName[nodeName]
}

// place and displace are also what decisions try for a moment, to see what would be.
func (s *snapshot) place(p *pod, n *node) {
	n.add(p)
	s.topology.count(p, n, +1)
	s.storage.count(p, +1)
}

func (s *snapshot) displace(p *pod, n *node) {
	n.remove(p)
	s.topology.count(p, n, -1)
	s.storage.count(p, -1)
}

// removePod returns the node that the pod was on, if any.
func (s *snapshot) removePod(uid types.UID) *node {
	p := s.pods[uid]
	if p == nil {
		return nil
	}
	delete(s.pods, uid)
	if s.priorities[p.priority]--; s.priorities[p.priority] == 0 {
		delete(s.priorities, p.priority)
	}
	n := p.on
	s.displace(p, n)
	s.topology.release(p)
	p.on = nil
	s.drop(n)
	return n
}

// nominate reserves room for p on a node against pods of lower or equal priority; an empty name
// only takes an earlier nomination back.
func (s *snapshot) nominate(p *pod, nodeName string) {
	if n := s.byName[p.nominated]; n != nil && n.nominated[p.uid] == p {
		delete(n.nominated, p.uid)
		s.topology.release(p)
		s.drop(n)
	}
	if p.nominated = nodeName; nodeName == "" {
		return
	}
	n := s.node(nodeName)
	if old := n.nominated[p.uid]; old != nil {
		s.topology.release(old) // an older version of the pod
	}
	if n.nominated == nil {
		n.nominated = map[types.UID]*pod{}
	}
	n.nominated[p.uid] = p
	s.topology.hold(p)
}

// anyBelow says whether any pod in the cluster has a lower priority.
func (s *snapshot) anyBelow(priority int32) bool {
	for other := range s.priorities {
		if other < priority {
			return true
		}
	}
	return false
}
