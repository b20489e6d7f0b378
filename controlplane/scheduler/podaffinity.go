// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"strconv"

	v1 "k8s.io/api/core/v1"
)

const (
	reasonTogether = "node(s) didn't match pod affinity rules"
	reasonApart    = "node(s) didn't match pod anti-affinity rules"
	reasonAgainst  = "node(s) didn't satisfy existing pods anti-affinity rules"
)

var (
	requiredTogether = termKind{required: true}
	requiredApart    = termKind{required: true, apart: true}
)

// signed is the weight of a preferred term, below zero when it keeps apart.
func (k termKind) signed() int64 {
	if k.apart {
		return -k.weight
	}
	return k.weight
}

// affinityTerm is one term of a pod's affinity to other pods.
type affinityTerm struct {
	id       string // equal for terms that ask the same
	kind     termKind
	key      string
	selector podSelector
}

func (a *affinityTerm) tally(t *topology) *tally {
	return t.ask([]podSelector{a.selector}, false, false, a.key, nil, "", nil)
}

// affinityTerms lists a pod's terms. matchLabelKeys and mismatchLabelKeys are in their selectors
// already: the API server merges them when the pod is made (KEP 3633).
func affinityTerms(object *v1.Pod) []affinityTerm {
	affinity := object.Spec.Affinity
	if affinity == nil || affinity.PodAffinity == nil && affinity.PodAntiAffinity == nil {
		return nil
	}
	var terms []affinityTerm
	add := func(t *v1.PodAffinityTerm, kind termKind) {
		namespaces := t.Namespaces
		if len(namespaces) == 0 && t.NamespaceSelector == nil {
			namespaces = []string{object.Namespace}
		}
		selector := newPodSelector(namespaces, parsed(t.NamespaceSelector), parsed(t.LabelSelector))
		terms = append(terms, affinityTerm{
			id:   strconv.FormatInt(kind.signed(), 10) + strconv.FormatBool(kind.apart) + strconv.FormatBool(kind.required) + selector.key + "|" + t.TopologyKey,
			kind: kind, key: t.TopologyKey, selector: selector,
		})
	}
	if a := affinity.PodAffinity; a != nil {
		for i := range a.RequiredDuringSchedulingIgnoredDuringExecution {
			add(&a.RequiredDuringSchedulingIgnoredDuringExecution[i], requiredTogether)
		}
		for i := range a.PreferredDuringSchedulingIgnoredDuringExecution {
			w := &a.PreferredDuringSchedulingIgnoredDuringExecution[i]
			add(&w.PodAffinityTerm, termKind{weight: int64(w.Weight)})
		}
	}
	if a := affinity.PodAntiAffinity; a != nil {
		for i := range a.RequiredDuringSchedulingIgnoredDuringExecution {
			add(&a.RequiredDuringSchedulingIgnoredDuringExecution[i], requiredApart)
		}
		for i := range a.PreferredDuringSchedulingIgnoredDuringExecution {
			w := &a.PreferredDuringSchedulingIgnoredDuringExecution[i]
			add(&w.PodAffinityTerm, termKind{apart: true, weight: int64(w.Weight)})
		}
	}
	return terms
}

// podAffinity checks what the pod requires about others, and what others require about it.
func podAffinity(q *query, n *node, why []string) (verdict, []string) {
	q.resolve()
	if !nearAll(q, n) {
		return unresolvable, append(why, reasonTogether)
	}
	for _, others := range q.apart {
		if others.in(n) > 0 {
			return rejected, append(why, reasonApart)
		}
	}
	for _, others := range q.against {
		if others.in(n) > 0 {
			return rejected, append(why, reasonAgainst)
		}
	}
	return fits, why
}

func nearAll(q *query, n *node) bool {
	near, total := true, 0
	for _, others := range q.together {
		if _, ok := n.object.Labels[others.of.key]; !ok {
			return false
		}
		near = near && others.in(n) > 0
		total += others.total
	}
	// The first of pods that want to be near each other has nobody to be near to.
	return near || total == 0 && q.snapshot.topology.meanAll(q.pod.together, q.pod)
}

func affinityScores(q *query, nodes []*node, raw []int64) {
	clear(raw)
	for _, l := range q.leanings {
		if l.of.total == 0 {
			continue
		}
		for i, n := range nodes {
			raw[i] += l.weight * int64(l.of.in(n))
		}
	}
}

// scaleRange gives the least 0 and the most maxScore; all nothing when they are equal.
func scaleRange(raw []int64) {
	least, most := raw[0], raw[0]
	for _, value := range raw {
		least, most = min(least, value), max(most, value)
	}
	for i, value := range raw {
		if raw[i] = 0; most > least {
			raw[i] = int64(maxScore * (float64(value-least) / float64(most-least)))
		}
	}
}

// together collects the selectors of required affinity: one pod must be meant by all of them.
func together(terms []affinityTerm) []podSelector {
	var all []podSelector
	for i := range terms {
		if terms[i].kind == requiredTogether {
			all = append(all, terms[i].selector)
		}
	}
	return all
}
