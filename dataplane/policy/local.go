// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"

	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/maps"
)

// Local is a pod of this node.
type Local struct {
	types.NamespacedName
	UID types.UID
}

type local struct {
	Local
	pod     *Pod // as it was last seen
	sets    [2]*set
	refused [2]refusal
	has     maps.PolicySets // in the kernel, or on its way there
}

// refusal says why a direction is closed although policies would let something through.
type refusal struct {
	policies []*Policy
	why      string
}

// Inherit says what a slot has that an earlier process gave to a pod. It stays in force until the pod is attached
// again, or the slot detached: without it a table that knows of no pods yet would open all of them. All slots are inherited
// before the first pod is attached: while the table knows of none that is isolated, nothing is looked up.
func (t *Table) Inherit(slot uint32, has maps.PolicySets) { t.inherited[slot] = has }

// Attach gives a slot to a pod of this node. has is what the kernel has there.
func (t *Table) Attach(slot uint32, pod Local, has maps.PolicySets) {
	before := len(t.log.actions)
	t.resolveLocal(slot, t.local(slot, pod, has))
	t.settle(before)
}

// Expect is Attach while policies are not known yet: an adopted pod keeps what the kernel has, others are
// closed. ResolveAll ends that.
func (t *Table) Expect(slot uint32, pod Local, has maps.PolicySets, adopted bool) {
	before := len(t.log.actions)
	if l := t.local(slot, pod, has); !adopted {
		t.switchTo(slot, l, maps.PolicySets{Ingress: maps.PolicyClosed, Egress: maps.PolicyClosed})
	}
	t.settle(before)
}

func (t *Table) local(slot uint32, pod Local, has maps.PolicySets) *local {
	delete(t.inherited, slot)
	l, ok := t.locals[slot]
	if ok && l.Local != pod {
		t.release(l)
		ok = false
	}
	if !ok {
		l = &local{Local: pod, has: has}
		t.locals[slot] = l
	}
	return l
}

// Detach takes a pod's slot back, and closes it for the next.
func (t *Table) Detach(slot uint32) {
	l, ok := t.locals[slot]
	_, inherited := t.inherited[slot]
	if !ok && !inherited {
		return
	}
	before := len(t.log.actions)
	delete(t.inherited, slot)
	if ok {
		delete(t.locals, slot)
		t.release(l)
	}
	t.settle(before)
}

func (t *Table) release(l *local) {
	for d := range l.sets {
		t.unuse(l.sets[d])
		l.sets[d] = nil
	}
}

// refresh takes what is known of a pod now. One that was deleted by force may still run: it stays what it was.
func (t *Table) refresh(l *local) {
	if pod := t.cluster.Pod(l.NamespacedName); pod != nil && (l.UID == "" || l.UID == pod.UID) {
		l.pod = pod
	}
}

// judging gives the policies of one direction; known is false where nobody knows yet which select the pod.
func (t *Table) judging(d direction, l *local) (policies []*Policy, known bool) {
	if len(t.policies[l.Namespace]) == 0 && len(t.clusterwide) == 0 {
		return nil, true
	}
	namespace := t.cluster.Namespace(l.Namespace)
	if l.pod == nil || namespace == nil && len(t.clusterwide) > 0 {
		return nil, false
	}
	return t.selecting(d, l.pod, namespace), true
}

func (t *Table) resolveLocal(slot uint32, l *local) {
	t.refresh(l)
	var sets [2]*set
	var want [2]uint32
	for d := ingress; d <= egress; d++ {
		l.refused[d] = refusal{}
		policies, known := t.judging(d, l)
		if !known {
			want[d] = maps.PolicyClosed
			continue
		}
		sets[d], want[d] = t.use(d, policies, l)
	}
	t.switchTo(slot, l, maps.PolicySets{Ingress: want[ingress], Egress: want[egress]})
	old := l.sets
	l.sets = sets
	for d := range old {
		t.unuse(old[d])
	}
}

func (t *Table) switchTo(slot uint32, l *local, want maps.PolicySets) {
	if l.has != want {
		l.has = want
		t.do(Action{Switch: &Switch{slot, want}})
	}
}

// use finds or makes the set of policies for one of the node's pods.
func (t *Table) use(d direction, policies []*Policy, l *local) (*set, uint32) {
	if len(policies) == 0 {
		return nil, 0
	}
	for _, p := range policies {
		if p.problem != nil {
			l.refused[d] = refusal{[]*Policy{p}, p.problem.Error()}
			return nil, maps.PolicyClosed
		}
	}
	key, tiers := setKey(d, policies, l.pod, t.cluster)
	if s, ok := t.sets[key]; ok {
		s.users++
		return s, s.number
	}
	s, rules := newSet(key, tiers, d, policies, l.pod, t.cluster)
	for tier, rules := range s.places {
		if len(rules) > maps.TierRules {
			l.refused[d] = refusal{policies, fmt.Sprintf("%d %s rules of one tier (%d) judge it; %d fit", len(rules), d, tier, maps.TierRules)}
			return nil, maps.PolicyClosed
		}
	}
	counter := t.counter.set%0xfffffe + 1
	s.number, s.users = t.epoch|counter, 1
	c := s.plan(rules, nil)
	if !t.fits(s, c) {
		l.refused[d] = refusal{policies, fmt.Sprintf(
			"the %s rules of all policies that select it need %d entries and %d IP blocks; %d fit one pod, and %d and %d the node, which has %d and %d already",
			d, c.size, len(c.points), t.limits.Set, t.limits.Entries, t.limits.Blocks, t.entries, t.blocks)}
		return nil, maps.PolicyClosed
	}
	t.counter.set, t.sets[key] = counter, s
	t.name(s, l.Namespace)
	t.do(Action{Count: s.number})
	t.apply(s, c)
	return s, s.number
}
