// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/maps"
)

// formerSets is how many sets are remembered after they are gone.
const formerSets = 256

type formerSet struct {
	number uint32
	info   SetInfo
}

// Reasons why a pod is closed.
const (
	NotInForce  = "policy-not-in-force" // a policy that makes no sense, or does not fit
	NotYetKnown = "policy-not-known-yet"
)

// Denial names the policies of a set that denied a connection of one of the node's pods. why says what else
// is the matter; without it, none of the policies lets the connection pass, or one of an administrator denies it: rule
// is its tier and place, else 0; with maps.AnyRule all are named.
func (c *Controller) Denial(set, rule uint32, pod types.NamespacedName, direction string) (policies []string, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.table.Denial(set, rule, pod, direction)
}

// Denial is the Controller's.
func (t *Table) Denial(set, rule uint32, pod types.NamespacedName, direction string) (policies []string, why string) {
	if set == maps.PolicyClosed {
		for _, slot := range sortedSlots(t.locals) {
			l := t.locals[slot]
			for d := ingress; d <= egress; d++ {
				if l.NamespacedName != pod || d.String() != direction {
					continue
				}
				for _, p := range l.refused[d].policies {
					policies = append(policies, p.String())
				}
			}
		}
		if len(policies) == 0 {
			return nil, NotYetKnown
		}
		return policies, NotInForce
	}
	info, ok := t.info[set]
	for i := range t.former {
		if t.former[i].number == set && !ok {
			info = t.former[i].info
		}
	}
	tier, place := maps.RuleOf(rule)
	if names := info.Places[tier]; rule != 0 && place > 0 && place <= len(names) {
		return []string{names[place-1]}, ""
	}
	if rule != 0 && rule != maps.AnyRule { // there was no room for a pod's rules
		why = NotInForce
	}
	for _, name := range info.Policies {
		switch {
		case !strings.Contains(name, "/"):
			policies = append(policies, info.Namespace+"/"+name)
		case rule != 0:
			policies = append(policies, name)
		}
	}
	return policies, why
}
