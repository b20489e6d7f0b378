// SPDX-License-Identifier: Apache-2.0

package loadbalancer

import (
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api/v1alpha1"
)

// PoolChange is a pool's new status and what to say about it.
type PoolChange struct {
	Pool   *v1alpha1.AddressPool
	Status v1alpha1.AddressPoolStatus
	Write  bool // whether Status differs from what the pool has
	Events []PoolEvent
}

// PoolEvent is a warning.
type PoolEvent struct{ Reason, Message string }

// poolChanges says what the pools have left once all Services have their addresses.
func (p *planner) poolChanges() []PoolChange {
	var out []PoolChange
	shared := overlaps(p.pools)
	for _, one := range p.pools {
		out = append(out, p.poolChange(one, shared[one.Name]))
	}
	return out
}

func (p *planner) poolChange(in pool, others []string) PoolChange {
	status := v1alpha1.AddressPoolStatus{Conditions: slices.Clone(in.Status.Conditions)}
	var empty []string
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		c := p.count(in, family)
		if c == nil {
			continue
		}
		if family == corev1.IPv4Protocol {
			status.IPv4 = c
		} else {
			status.IPv6 = c
		}
		status.Addresses = v1alpha1.AddressCount{
			Total: saturated(status.Addresses.Total, c.Total), Used: saturated(status.Addresses.Used, c.Used), Free: saturated(status.Addresses.Free, c.Free),
		}
		if c.Free == 0 {
			empty = append(empty, string(family))
		}
	}
	change := PoolChange{Pool: in.AddressPool}
	set := func(kind string, holds bool, reason, message string) (became bool) {
		c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: in.Generation}
		if holds {
			c.Status = metav1.ConditionTrue
		}
		before := meta.FindStatusCondition(status.Conditions, kind)
		became = before == nil || before.Status != c.Status
		meta.SetStatusCondition(&status.Conditions, c)
		return became
	}
	warn := func(reason, message string) { change.Events = append(change.Events, PoolEvent{reason, message}) }
	if in.flaw == "" {
		set(v1alpha1.PoolReady, true, "Valid", "every address may be given to a Service")
	} else if set(v1alpha1.PoolReady, false, badPool, in.flaw) {
		warn(badPool, in.flaw)
	}
	text := fmt.Sprintf("no %s address is free: add addresses, or delete Services", strings.Join(empty, " and no "))
	if len(empty) == 0 {
		set(v1alpha1.PoolExhausted, false, "AddressesFree", "addresses are free")
	} else if set(v1alpha1.PoolExhausted, true, "NoAddressFree", text) {
		warn(exhausted, text)
	}
	if len(others) > 0 {
		set(v1alpha1.PoolOverlapping, true, "SharedAddresses", "has addresses of "+strings.Join(others, ", ")+", too: each is given out once")
	} else {
		set(v1alpha1.PoolOverlapping, false, "OwnAddresses", "no other pool has any of its addresses")
	}
	change.Status = status
	change.Write = !apiequality.Semantic.DeepEqual(status, in.Status)
	return change
}

// count is nil where a pool has no addresses of the family.
func (p *planner) count(in pool, family corev1.IPFamily) *v1alpha1.AddressCount {
	ranges := merged(in.ranges, family)
	if len(ranges) == 0 {
		return nil
	}
	total := new(big.Int)
	for _, r := range ranges {
		total.Add(total, size(r))
	}
	used := int64(0)
	for a := range p.used {
		if slices.ContainsFunc(ranges, func(r v1alpha1.Range) bool { return r.Contains(a) }) {
			used++
		}
	}
	return &v1alpha1.AddressCount{Total: clamp(total), Used: used, Free: clamp(new(big.Int).Sub(total, big.NewInt(used)))}
}

func size(r v1alpha1.Range) *big.Int {
	first, last := new(big.Int).SetBytes(r.First.AsSlice()), new(big.Int).SetBytes(r.Last.AsSlice())
	return last.Add(last.Sub(last, first), big.NewInt(1))
}

func clamp(n *big.Int) int64 {
	if !n.IsInt64() {
		return math.MaxInt64
	}
	return n.Int64()
}

func saturated(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// merged are the ranges of a family in order, with each address once.
func merged(ranges []v1alpha1.Range, family corev1.IPFamily) (out []v1alpha1.Range) {
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b v1alpha1.Range) int { return a.First.Compare(b.First) })
	for _, r := range sorted {
		if familyOf(r.First) != family {
			continue
		}
		if n := len(out); n > 0 && !out[n-1].Last.Less(r.First) {
			if out[n-1].Last.Less(r.Last) {
				out[n-1].Last = r.Last
			}
			continue
		}
		out = append(out, r)
	}
	return out
}

// overlaps names, for each pool, the others that have some of its addresses.
func overlaps(pools []pool) map[string][]string {
	type span struct {
		v1alpha1.Range
		of string
	}
	var all []span
	for _, p := range pools {
		for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
			for _, r := range merged(p.ranges, family) {
				all = append(all, span{r, p.Name})
			}
		}
	}
	slices.SortFunc(all, func(a, b span) int { return a.First.Compare(b.First) })
	out := map[string][]string{}
	note := func(a, b string) {
		if !slices.Contains(out[a], b) {
			out[a] = append(out[a], b)
		}
	}
	var open []span // that may hold what comes next
	for _, s := range all {
		open = slices.DeleteFunc(open, func(o span) bool { return !o.Contains(s.First) })
		for _, o := range open {
			note(o.of, s.of)
			note(s.of, o.of)
		}
		open = append(open, s)
	}
	for _, names := range out {
		slices.Sort(names)
	}
	return out
}
