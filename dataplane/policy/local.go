// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"slices"

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
// again, or the slot detached: without it a table that knows of no pods yet would open all of them.
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

func (t *Table) resolveLocal(slot uint32, l *local) {
	// A pod that was deleted by force may still run: it stays what it was.
	if pod := t.cluster.Pod(l.NamespacedName); pod != nil && (l.UID == "" || l.UID == pod.UID) {
		l.pod = pod
	}
	var sets [2]*set
	var want [2]uint32
	policies := t.policies[l.Namespace]
	for d := ingress; d <= egress; d++ {
		l.refused[d] = refusal{}
		switch {
		case len(policies) == 0:
		case l.pod == nil: // which of the policies select it, nobody knows yet
			want[d] = maps.PolicyClosed
		default:
			sets[d], want[d] = t.use(d, selecting(policies, d, l.pod), l)
		}
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

func selecting(policies map[string]*Policy, d direction, pod *Pod) (out []*Policy) {
	for _, p := range policies {
		if p.isolates[d] && p.selects.Matches(pod.Labels) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *Policy) int { return cmp.Compare(a.name.Name, b.name.Name) })
	return out
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
	key := setKey(d, policies, l.pod)
	if s, ok := t.sets[key]; ok {
		s.users++
		return s, s.number
	}
	s := newSet(0, key, d, policies, l.pod)
	keys, blocks := s.base()
	if len(keys) > t.limits.Set || len(blocks) > t.limits.Set || t.entries+len(keys) > t.limits.Entries {
		l.refused[d] = refusal{policies, fmt.Sprintf(
			"the %s rules of all policies that select it need %d entries and %d IP blocks; %d fit one pod, and %d the node, which has %d already",
			d, len(keys), len(blocks), t.limits.Set, t.limits.Entries, t.entries)}
		return nil, maps.PolicyClosed
	}
	t.counter.set = t.counter.set%0xfffffe + 1
	s.number, s.users = t.epoch|t.counter.set, 1
	t.sets[key] = s
	t.info[s.number] = SetInfo{d.String(), l.Namespace, s.names()}
	t.write(s)
	return s, s.number
}
