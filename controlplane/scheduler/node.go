// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// amounts is a vector of resources of a node: what it can give, or what its pods take.
type amounts struct {
	milliCPU, memory, ephemeral int64
	extended                    map[v1.ResourceName]int64 // nil when there are none
}

// node is a Node with the sums over the pods that are on it. Every change to a pod or node changes
// these sums by the difference; nothing here is ever computed anew from a list.
type node struct {
	name   string
	object *v1.Node // nil while pods name a node that is not (or no longer) there

	position int // in snapshot.nodes; -1 while object is nil
	slot     int // in topology.bySlot; none while object is nil

	allocatable amounts
	maxPods     int
	hard        []v1.Taint // NoSchedule and NoExecute
	soft        []v1.Taint // PreferNoSchedule
	images      map[string]int64

	pods      map[types.UID]*pod
	requested amounts
	// scored sums count pods without requests with assumed ones.
	scoredCPU, scoredMemory int64
	ports                   map[hostPort]int
	// nominated pods wait for room that preemption is making here.
	nominated map[types.UID]*pod
}

func newNode(name string) *node {
	return &node{name: name, position: -1, slot: none, pods: map[types.UID]*pod{}}
}

// set takes over a new version of the object.
func (n *node) set(object *v1.Node) {
	n.object = object
	n.allocatable = amounts{}
	n.maxPods = 0
	for name, quantity := range object.Status.Allocatable {
		switch name {
		case v1.ResourceCPU:
			n.allocatable.milliCPU = quantity.MilliValue()
		case v1.ResourceMemory:
			n.allocatable.memory = quantity.Value()
		case v1.ResourceEphemeralStorage:
			n.allocatable.ephemeral = quantity.Value()
		case v1.ResourcePods:
			n.maxPods = int(quantity.Value())
		default:
			if n.allocatable.extended == nil {
				n.allocatable.extended = map[v1.ResourceName]int64{}
			}
			n.allocatable.extended[name] = quantity.Value()
		}
	}
	n.hard, n.soft = nil, nil
	for _, taint := range object.Spec.Taints {
		switch taint.Effect {
		case v1.TaintEffectNoSchedule, v1.TaintEffectNoExecute:
			n.hard = append(n.hard, taint)
		case v1.TaintEffectPreferNoSchedule:
			n.soft = append(n.soft, taint)
		}
	}
	n.images = make(map[string]int64, len(object.Status.Images))
	for _, image := range object.Status.Images {
		for _, name := range image.Names {
			n.images[name] = image.SizeBytes
		}
	}
}

// add and remove account a pod; sign is +1 or -1.
func (n *node) account(p *pod, sign int64) {
	r := &p.requests
	n.requested.milliCPU += sign * r.milliCPU
	n.requested.memory += sign * r.memory
	n.requested.ephemeral += sign * r.ephemeral
	for i := range r.extended {
		if n.requested.extended == nil {
			n.requested.extended = map[v1.ResourceName]int64{}
		}
		name := r.extended[i].name
		if n.requested.extended[name] += sign * r.extended[i].amount; n.requested.extended[name] == 0 {
			delete(n.requested.extended, name)
		}
	}
	n.scoredCPU += sign * r.scoredCPU
	n.scoredMemory += sign * r.scoredMemory
	for _, port := range p.ports {
		if n.ports == nil {
			n.ports = map[hostPort]int{}
		}
		if n.ports[port] += int(sign); n.ports[port] == 0 {
			delete(n.ports, port)
		}
	}
}

func (n *node) add(p *pod) {
	n.pods[p.uid] = p
	n.account(p, +1)
}

func (n *node) remove(p *pod) {
	delete(n.pods, p.uid)
	n.account(p, -1)
}

// matters says whether the difference between two versions of a Node can change where a pod fits.
// Heartbeats and most of the status do not.
func matters(before, after *v1.Node) bool {
	if before.Spec.Unschedulable != after.Spec.Unschedulable ||
		!maps.Equal(before.Labels, after.Labels) ||
		!sameTaints(before.Spec.Taints, after.Spec.Taints) ||
		len(before.Status.Allocatable) != len(after.Status.Allocatable) {
		return true
	}
	for name, quantity := range before.Status.Allocatable {
		if other, ok := after.Status.Allocatable[name]; !ok || quantity.Cmp(other) != 0 {
			return true
		}
	}
	return false
}

func sameTaints(before, after []v1.Taint) bool {
	return slices.EqualFunc(before, after, func(a, b v1.Taint) bool { return a.MatchTaint(&b) && a.Value == b.Value })
}
