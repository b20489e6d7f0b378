// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
)

// rollOut replaces pods of former templates, as many at a time as the strategy allows. place has seen to it that
// every node has its pods and none too many.
func (p *planner) rollOut() {
	desired := 0
	nodes := make(map[string]bool, len(p.Nodes)) // those that have a pod or should
	for _, node := range p.Nodes {
		if start, _ := p.fit.on(node); start {
			desired++
			nodes[node.Name] = true
		}
	}
	for node := range p.pods {
		nodes[node] = true
	}
	surge, err := util.SurgeCount(p.DaemonSet, desired)
	if err != nil {
		return // validation admits only whole numbers and percentages
	}
	unavailable, err := util.UnavailableCount(p.DaemonSet, desired)
	if err != nil {
		return
	}
	order := slices.Sorted(maps.Keys(nodes))
	if surge > 0 {
		p.surge(order, surge, desired)
		return
	}
	// Neither would mean no rollout at all.
	p.replace(order, max(unavailable, 1))
}

// replace deletes old pods so that no more than limit nodes are without an available one. Where the old pod is not
// available anyway there is nothing to lose.
func (p *planner) replace(nodes []string, limit int) {
	missing := 0
	var candidates []*corev1.Pod
	for _, node := range nodes {
		old, cur, ok := p.pair(node)
		switch {
		case !ok, old == nil && cur == nil, old != nil && cur != nil:
			missing++ // on its way
		case cur != nil:
			if !p.isAvailable(cur) {
				missing++
			}
		case p.isAvailable(old):
			candidates = append(candidates, old)
		default:
			p.delete(old)
			missing++
		}
	}
	p.delete(candidates[:min(len(candidates), max(0, limit-missing))]...)
}

// surge starts new pods beside old ones, no more than limit at a time beside available ones, and deletes an old one
// once the new one is available. A node that the DaemonSet has left keeps its pod until as many as are desired are
// available elsewhere.
func (p *planner) surge(nodes []string, limit, desired int) {
	surging, available := 0, 0
	var candidates []string
	var left []*corev1.Pod
	for _, node := range nodes {
		old, cur, ok := p.pair(node)
		if !ok {
			surging++
			continue
		}
		if old != nil && p.isAvailable(old) || old == nil && cur != nil && p.isAvailable(cur) {
			available++
		}
		switch {
		case old == nil: // nothing to replace
		case cur != nil:
			if p.isAvailable(cur) {
				p.delete(old)
			} else {
				surging++
			}
		case !p.starts(node):
			if p.isAvailable(old) {
				left = append(left, old)
			} else {
				p.delete(old)
			}
		case p.isAvailable(old):
			candidates = append(candidates, node)
		default:
			p.plan.Create = append(p.plan.Create, node)
		}
	}
	p.delete(left[:min(len(left), max(0, available-desired))]...)
	p.plan.Create = append(p.plan.Create, candidates[:min(len(candidates), max(0, limit-surging))]...)
}

func (p *planner) starts(name string) bool {
	node := p.nodes[name]
	if node == nil {
		return false
	}
	start, _ := p.fit.on(node)
	return start
}

// pair finds the old and the new pod of a node among those that stay. It is not ok if there are several of a kind.
func (p *planner) pair(node string) (old, cur *corev1.Pod, ok bool) {
	for _, pod := range p.pods[node] {
		slot := &old
		if p.isUpdated(pod) {
			slot = &cur
		}
		switch {
		case pod.DeletionTimestamp != nil:
		case *slot != nil:
			return nil, nil, false
		default:
			*slot = pod
		}
	}
	return old, cur, true
}
