// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"cmp"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// A preemption is what makes room for a pod: which pods have to go from which node.
type preemption struct {
	node    *node
	victims []*pod // most important first
	// violations counts victims that a PodDisruptionBudget would rather keep.
	violations int
}

// candidates bounds how many nodes are compared: a tenth of them, at least this many.
const leastCandidates = 100

// preempt finds the node on which the least harm makes room for p, or leaves a note in d that says
// in upstream's words why preemption does not help. doomed are pods whose going is under way. It
// leaves the snapshot as it was.
func (x *searcher) preempt(p *pod, s *snapshot, d *diagnosis, budgets []*policyv1.PodDisruptionBudget,
	doomed map[types.UID]bool, now time.Time) *preemption {
	if policy := p.object.Spec.PreemptionPolicy; policy != nil && *policy == v1.PreemptNever {
		d.note = reasonNeverPreempts
		return nil
	}
	if waitsForVictims(p, s, d, doomed) {
		d.note = reasonVictimsTerminate
		return nil
	}
	outcome := map[string]int{}
	if others := d.nodes - len(d.resolvable); others > 0 {
		outcome[reasonPreemptionUseless] = others
	}
	if !s.anyBelow(p.priority) {
		// The usual case of a full cluster with one priority: no node needs to be looked at.
		if len(d.resolvable) > 0 {
			outcome[reasonNoVictims] = len(d.resolvable)
		}
		d.note = available(d.nodes, "", outcome)
		return nil
	}
	q := x.ask(p, s)
	q.resolve()
	var found []*preemption
	limit := max(leastCandidates, len(s.nodes)/10)
	offset := 0
	if len(d.resolvable) > 0 {
		offset = x.random.IntN(len(d.resolvable))
	}
	for i := range d.resolvable {
		n := d.resolvable[(offset+i)%len(d.resolvable)]
		candidate, why := x.victims(q, n, budgets, now)
		if candidate == nil {
			for _, reason := range why {
				outcome[reason]++
			}
			continue
		}
		if found = append(found, candidate); len(found) >= limit {
			break
		}
	}
	if len(found) == 0 {
		d.note = available(d.nodes, "", outcome)
		return nil
	}
	return slices.MinFunc(found, func(a, b *preemption) int { return leastHarm(a, b, now) })
}

// waitsForVictims: room is being made already on the nominated node, and one more preemption would
// only kill more.
func waitsForVictims(p *pod, s *snapshot, d *diagnosis, doomed map[types.UID]bool) bool {
	n := s.byName[p.nominated]
	if n == nil || !slices.Contains(d.resolvable, n) {
		return false
	}
	for _, other := range n.pods {
		if other.priority < p.priority && (doomed[other.uid] || beingPreempted(other.object)) {
			return true
		}
	}
	return false
}

func beingPreempted(object *v1.Pod) bool {
	if object.DeletionTimestamp == nil {
		return false
	}
	for i := range object.Status.Conditions {
		if c := &object.Status.Conditions[i]; c.Type == v1.DisruptionTarget {
			return c.Status == v1.ConditionTrue && c.Reason == v1.PodReasonPreemptionByScheduler
		}
	}
	return false
}

// victims takes every pod of lower priority off the node for a moment and, if the pod fits then, lets
// back in whichever still leave room: those that a disruption budget protects first, then by
// importance. q must be resolved.
func (x *searcher) victims(q *query, n *node, budgets []*policyv1.PodDisruptionBudget, now time.Time) (*preemption, []string) {
	p, s := q.pod, q.snapshot
	var lower []*pod
	for _, other := range n.pods {
		if other.priority < p.priority {
			lower = append(lower, other)
		}
	}
	if len(lower) == 0 {
		return nil, []string{reasonNoVictims}
	}
	for _, other := range lower {
		s.displace(other, n)
	}
	if v, why := x.check(q, n); v != fits {
		why = slices.Clone(why)
		for _, other := range lower {
			s.place(other, n)
		}
		return nil, why
	}
	importance := func(a, b *pod) int { return moreImportant(a, b, now) }
	slices.SortFunc(lower, importance)
	protected, free := splitByBudget(lower, budgets)
	result := &preemption{node: n}
	keep := func(pods []*pod) (lost int) {
		for _, other := range pods {
			s.place(other, n)
			if v, _ := x.check(q, n); v != fits {
				s.displace(other, n)
				result.victims = append(result.victims, other)
				lost++
			}
		}
		return lost
	}
	result.violations = keep(protected)
	keep(free)
	for _, other := range result.victims {
		s.place(other, n)
	}
	if len(result.victims) == 0 {
		return nil, []string{reasonNoVictims} // it fits as things are: nobody has to go
	}
	slices.SortFunc(result.victims, importance)
	return result, nil
}

// moreImportant orders by priority, then by how long a pod has been running.
func moreImportant(a, b *pod, now time.Time) int {
	if c := cmp.Compare(b.priority, a.priority); c != 0 {
		return c
	}
	return startTime(a.object, now).Compare(startTime(b.object, now))
}

// splitByBudget finds the pods whose going would exceed what a PodDisruptionBudget still allows.
func splitByBudget(pods []*pod, budgets []*policyv1.PodDisruptionBudget) (protected, free []*pod) {
	allowed := make([]int32, len(budgets))
	selectors := make([]labels.Selector, len(budgets))
	for i, budget := range budgets {
		allowed[i] = budget.Status.DisruptionsAllowed
		// A selector that does not parse, or an empty one, protects nothing.
		if selector, err := metav1.LabelSelectorAsSelector(budget.Spec.Selector); err == nil && !selector.Empty() {
			selectors[i] = selector
		}
	}
	for _, p := range pods {
		violates := false
		for i, budget := range budgets {
			if selectors[i] == nil || budget.Namespace != p.key.Namespace || len(p.object.Labels) == 0 ||
				!selectors[i].Matches(labels.Set(p.object.Labels)) {
				continue
			}
			if _, counted := budget.Status.DisruptedPods[p.key.Name]; counted {
				continue
			}
			if allowed[i]--; allowed[i] < 0 {
				violates = true
				break
			}
		}
		if violates {
			protected = append(protected, p)
		} else {
			free = append(free, p)
		}
	}
	return protected, free
}

// leastHarm orders preemptions as Kubernetes does: fewest broken budgets, then the lowest highest
// priority, the lowest sum of priorities, the fewest pods, and the most recently started ones.
func leastHarm(a, b *preemption, now time.Time) int {
	if c := cmp.Compare(a.violations, b.violations); c != 0 {
		return c
	}
	if c := cmp.Compare(a.victims[0].priority, b.victims[0].priority); c != 0 {
		return c
	}
	if c := cmp.Compare(prioritySum(a.victims), prioritySum(b.victims)); c != 0 {
		return c
	}
	if c := cmp.Compare(len(a.victims), len(b.victims)); c != 0 {
		return c
	}
	return earliestStart(b.victims, now).Compare(earliestStart(a.victims, now))
}

// prioritySum moves priorities above zero first, so that many pods of a negative priority do not
// look cheaper than few.
func prioritySum(pods []*pod) (sum int64) {
	for _, p := range pods {
		sum += int64(p.priority) + 1<<31
	}
	return sum
}

// earliestStart is of the most important victims only.
func earliestStart(pods []*pod, now time.Time) time.Time {
	earliest := startTime(pods[0].object, now)
	for _, p := range pods {
		if t := startTime(p.object, now); p.priority == pods[0].priority && t.Before(earliest) {
			earliest = t
		}
	}
	return earliest
}
