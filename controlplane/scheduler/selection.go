// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// podSelector says which pods a spread constraint or an affinity term means: those with some labels, in
// some namespaces.
type podSelector struct {
	namespaces   []string        // sorted
	byNamespace  labels.Selector // namespaces by their labels, beside those that are named; nil: none
	labels       labels.Selector
	key          string // equal for podSelectors that mean the same
	everywhere   bool   // byNamespace is the selector that matches all
	matchesNoPod bool   // whatever its labels
}

func newPodSelector(namespaces []string, byNamespace, podLabels labels.Selector) podSelector {
	s := podSelector{namespaces: slices.Compact(slices.Sorted(slices.Values(namespaces))), labels: podLabels}
	if requirements, selectable := byNamespace.Requirements(); selectable {
		s.byNamespace, s.everywhere = byNamespace, len(requirements) == 0
	}
	_, selectable := podLabels.Requirements()
	s.matchesNoPod = !selectable
	var b strings.Builder
	for _, name := range s.namespaces {
		b.WriteString(name)
		b.WriteByte(',')
	}
	switch {
	case s.everywhere:
		b.WriteByte('*')
	case s.byNamespace != nil:
		b.WriteString(s.byNamespace.String())
	}
	b.WriteByte('/')
	if s.matchesNoPod {
		b.WriteByte('!') // "" is the selector of all
	}
	b.WriteString(podLabels.String())
	s.key = b.String()
	return s
}

// parsed is the selector of a validated object; one that does not parse means no pod.
func parsed(selector *metav1.LabelSelector) labels.Selector {
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return labels.Nothing()
	}
	return s
}

// means says whether a pod in the namespace with those labels is selected. namespaceLabels may be
// nil when the namespace is not known (yet).
func (s *podSelector) means(namespace string, namespaceLabels, podLabels map[string]string) bool {
	if s.matchesNoPod {
		return false
	}
	if !s.everywhere && !slices.Contains(s.namespaces, namespace) &&
		(s.byNamespace == nil || !s.byNamespace.Matches(labels.Set(namespaceLabels))) {
		return false
	}
	return s.labels.Matches(labels.Set(podLabels))
}

// A finder finds those of many selectors that may mean a pod, from one label that each of them
// asks for, without trying all.
type finder[T comparable] struct {
	by map[shelf][]T
}

// shelf is where a selector is filed. An empty namespace stands for all, an empty label for
// selectors that ask for no particular value.
type shelf struct{ namespace, label, value string }

func (f *finder[T]) put(s *podSelector, what T) {
	if f.by == nil {
		f.by = map[shelf][]T{}
	}
	for _, at := range filed(s) {
		f.by[at] = append(f.by[at], what)
	}
}

func (f *finder[T]) drop(s *podSelector, what T) {
	for _, at := range filed(s) {
		list := f.by[at]
		if i := slices.Index(list, what); i >= 0 {
			last := len(list) - 1
			list[i] = list[last]
			clear(list[last:])
			f.by[at] = list[:last]
		}
		if len(f.by[at]) == 0 {
			delete(f.by, at)
		}
	}
}

// candidates calls found once for each of what was put whose selector may mean the pod.
func (f *finder[T]) candidates(namespace string, podLabels map[string]string, found func(T)) {
	if len(f.by) == 0 {
		return
	}
	visit := func(label, value string) {
		for _, what := range f.by[shelf{namespace, label, value}] {
			found(what)
		}
		for _, what := range f.by[shelf{"", label, value}] {
			found(what)
		}
	}
	visit("", "")
	for label, value := range podLabels {
		visit(label, value)
	}
}

// filed lists where a selector is found: under each value of one label that it asks for, since a pod
// has only one of them, in each of its namespaces.
func filed(s *podSelector) []shelf {
	if s.matchesNoPod {
		return nil
	}
	namespaces := s.namespaces
	if s.byNamespace != nil {
		namespaces = []string{""}
	}
	label, values := "", []string{""}
	requirements, _ := s.labels.Requirements()
	for _, r := range requirements {
		if op := r.Operator(); op == selection.In || op == selection.Equals || op == selection.DoubleEquals {
			label, values = r.Key(), r.Values().List() // each once
			break
		}
	}
	var shelves []shelf
	for _, namespace := range namespaces {
		for _, value := range values {
			shelves = append(shelves, shelf{namespace, label, value})
		}
	}
	return shelves
}
