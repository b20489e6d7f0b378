// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"maps"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
)

// blockers is the set of filters that kept a pod off some node, by their place in filters.
type blockers uint32

func blockerOf(name string) blockers {
	return 1 << slices.IndexFunc(filters[:], func(f filter) bool { return f.name == name })
}

func (b blockers) has(names ...string) bool {
	for i := range filters {
		if b&(1<<i) != 0 && slices.Contains(names, filters[i].name) {
			return true
		}
	}
	return false
}

// aboutOthers says whether something else than a change of the node itself may let the pod in: these
// filters look at the pods of whole domains, or at volumes.
func (b blockers) aboutOthers() bool {
	return b.has("PodTopologySpread", "InterPodAffinity", "VolumeRestrictions", "VolumeBinding")
}

// podChange is what happened to a placed pod: before is nil when it came, after when it went.
type podChange struct{ before, after *pod }

// idle says that no other pod's domain counts have changed.
func (c podChange) idle() bool {
	a, b := c.before, c.after
	return a != nil && b != nil && a.node == b.node && maps.Equal(a.object.Labels, b.object.Labels) &&
		(a.object.DeletionTimestamp == nil) == (b.object.DeletionTimestamp == nil)
}

// helpsSpread: a pod that the constraints mean came (where the fewest are) or went.
func (c podChange) helpsSpread(p *pod, t *topology) bool {
	for i := range p.hard {
		selector := &p.hard[i].selector
		counted := func(other *pod) bool {
			return other != nil && other.object.DeletionTimestamp == nil && t.means(selector, other)
		}
		if counted(c.before) != counted(c.after) {
			return true
		}
	}
	return false
}

// helpsAffinity: a pod came that p wants to be near to, or one went that p and it do not want to be
// near each other, or the last that p wanted to be near to, which makes p the first of its kind.
func (c podChange) helpsAffinity(p *pod, t *topology) bool {
	means := func(selectors []podSelector, other *pod) bool { return other != nil && t.meanAll(selectors, other) }
	switch came, was := means(p.together, c.after), means(p.together, c.before); {
	case came && !was:
		return true
	case was && !came && t.meanAll(p.together, p):
		return true
	}
	for i := range p.affinity {
		a := &p.affinity[i]
		if a.kind == requiredApart && c.before != nil && t.means(&a.selector, c.before) && (c.after == nil || !t.means(&a.selector, c.after)) {
			return true
		}
	}
	// The terms of a pod never change, so only its going can end what it has against p.
	return c.before != nil && c.after == nil && slices.ContainsFunc(c.before.affinity, func(a affinityTerm) bool {
		return a.kind == requiredApart && t.means(&a.selector, p)
	})
}

// wakeForPod wakes those that a pod's coming, going or change may help, on whatever node.
func (s *Scheduler) wakeForPod(c podChange, now time.Time) {
	if len(s.queue.watching) == 0 || c.idle() {
		return
	}
	for _, item := range s.queue.watching {
		if item.blockers.has("PodTopologySpread") && c.helpsSpread(item.pod, s.snapshot.topology) ||
			item.blockers.has("InterPodAffinity") && c.helpsAffinity(item.pod, s.snapshot.topology) ||
			item.blockers.has("VolumeRestrictions") && c.after == nil && slices.ContainsFunc(c.before.claims, func(use claimUse) bool { return item.pod.mounts(use.key) }) {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}

// wakeForDomains wakes those that look at the domains which a node has joined or left: before is nil
// when it came, after when it went. Whether they fit on the node itself is for wakeFor.
func (s *Scheduler) wakeForDomains(before, after *v1.Node, pods int, now time.Time) {
	if len(s.queue.watching) == 0 || before != nil && after != nil && !regroups(before, after) {
		return
	}
	for _, item := range s.queue.watching {
		if item.blockers.has("PodTopologySpread") && regroupsSpread(item.pod, before, after, pods) ||
			item.blockers.has("InterPodAffinity") && pods > 0 {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}

// regroupsSpread: the emptiest domain may be gone, or there are as many as minDomains asks for.
func regroupsSpread(p *pod, before, after *v1.Node, pods int) bool {
	for i := range p.hard {
		c := &p.hard[i]
		counts := func(object *v1.Node) bool {
			if object == nil {
				return false
			}
			_, ok := object.Labels[c.key]
			return ok && hasKeys(object, c.also)
		}
		if counts(before) || counts(after) && (pods > 0 || c.minDomains > 1) {
			return true
		}
	}
	return false
}

// wakeForNamespace wakes those whose affinity, or that of others to them, may depend on the labels
// of namespaces.
func (s *Scheduler) wakeForNamespace(now time.Time) {
	for _, item := range s.queue.watching {
		if item.blockers.has("InterPodAffinity") {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}
