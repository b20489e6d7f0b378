// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"container/list"
	"maps"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// askedLimit bounds the tallies that are kept for pods to come. One that was dropped is made anew,
// from the pods of its namespaces, when it is asked for again.
const askedLimit = 2048

// topology is the part of the snapshot that knows how pods are spread over the values of node
// labels. A decision asks it for tallies (pods that a selector means, by domain) and for the terms of
// pods that are there already; both follow every change by its difference.
type topology struct {
	domains map[string]*domains
	// asked are the tallies that decisions have asked for, the least recently used at the back.
	asked   map[string]*tally
	recent  *list.List
	byLabel finder[*tally]
	limit   int
	// terms are the affinity terms of pods that are placed or nominated.
	terms      map[string]*term
	termsByPod finder[*term]
	// namespaces holds the labels of namespaces.
	namespaces map[string]map[string]string
	// pods are those placed or nominated, by namespace.
	pods map[string]map[types.UID]*pod
	// bySlot are the nodes that have an object, for domains to come.
	bySlot []*node
	free   []int
}

func newTopology() *topology {
	return &topology{
		domains: map[string]*domains{}, asked: map[string]*tally{}, recent: list.New(), limit: askedLimit,
		terms: map[string]*term{}, namespaces: map[string]map[string]string{}, pods: map[string]map[types.UID]*pod{},
	}
}

// A tally counts the pods that all of some selectors mean.
type tally struct {
	census
	id        string
	selectors []podSelector
	// living leaves out pods that are terminating.
	living bool
	use    *list.Element
	gone   bool // dropped; pods may still refer to it
}

// termKind says what a term wants, and how much.
type termKind struct {
	apart    bool
	required bool
	weight   int64 // of preferred terms
}

// A term is an affinity term that placed pods have, with the number of these pods by domain.
type term struct {
	census
	id       string
	kind     termKind
	selector podSelector
	holders  int // pods, placed or nominated
}

// means evaluates with the labels that the pod's namespace has now.
func (t *topology) means(s *podSelector, p *pod) bool {
	return s.means(p.key.Namespace, t.namespaces[p.key.Namespace], p.object.Labels)
}

func (t *topology) meanAll(selectors []podSelector, p *pod) bool {
	for i := range selectors {
		if !t.means(&selectors[i], p) {
			return false
		}
	}
	return len(selectors) > 0
}

// join gives a node a slot when its object comes, and update follows its changes.
func (t *topology) join(n *node) {
	if last := len(t.free) - 1; last >= 0 {
		n.slot, t.free = t.free[last], t.free[:last]
		t.bySlot[n.slot] = n
		return
	}
	n.slot = len(t.bySlot)
	t.bySlot = append(t.bySlot, n)
}

func (t *topology) leave(n *node) {
	t.bySlot[n.slot] = nil
	t.free = append(t.free, n.slot)
	n.slot = none
}

// regroup runs change, which changes n's object, and moves n's pods to its new domains.
func (t *topology) regroup(n *node, change func()) {
	for _, p := range n.pods {
		t.count(p, n, -1)
	}
	change()
	if n.slot == none {
		if n.object == nil {
			return
		}
		t.join(n)
	}
	for _, d := range t.domains {
		d.update(n)
	}
	if n.object == nil {
		t.leave(n)
		return
	}
	for _, p := range n.pods {
		t.count(p, n, +1)
	}
}

// hold makes a pod countable: its terms and the tallies that it belongs to are known from here on.
func (t *topology) hold(p *pod) {
	namespace := p.key.Namespace
	if t.pods[namespace] == nil {
		t.pods[namespace] = map[types.UID]*pod{}
	}
	t.pods[namespace][p.uid] = p
	p.tallies = p.tallies[:0]
	t.byLabel.candidates(namespace, p.object.Labels, func(a *tally) {
		if (!a.living || p.object.DeletionTimestamp == nil) && t.meanAll(a.selectors, p) {
			p.tallies = append(p.tallies, a)
		}
	})
	p.terms = p.terms[:0]
	for i := range p.affinity {
		a := &p.affinity[i]
		known := t.terms[a.id]
		if known == nil {
			known = &term{id: a.id, kind: a.kind, selector: a.selector, census: census{of: t.domainsOf(a.key, nil, "", nil)}}
			t.terms[a.id] = known
			t.termsByPod.put(&known.selector, known)
		}
		known.holders++
		p.terms = append(p.terms, known)
	}
}

func (t *topology) release(p *pod) {
	namespace := p.key.Namespace
	if t.pods[namespace][p.uid] == p {
		if delete(t.pods[namespace], p.uid); len(t.pods[namespace]) == 0 {
			delete(t.pods, namespace)
		}
	}
	for _, known := range p.terms {
		if known.holders--; known.holders == 0 {
			delete(t.terms, known.id)
			t.termsByPod.drop(&known.selector, known)
			t.done(known.of)
		}
	}
	p.terms, p.tallies = nil, nil
}

// count adds or takes away a held pod on a node.
func (t *topology) count(p *pod, n *node, delta int32) {
	if n.slot == none {
		return
	}
	for _, known := range p.terms {
		known.count(n, delta)
	}
	for i := 0; i < len(p.tallies); {
		if p.tallies[i].gone {
			last := len(p.tallies) - 1
			p.tallies[i], p.tallies[last] = p.tallies[last], nil
			p.tallies = p.tallies[:last]
			continue
		}
		p.tallies[i].count(n, delta)
		i++
	}
}

// ask returns the tally of the pods that all selectors mean over the domains, which it counts the
// first time.
func (t *topology) ask(selectors []podSelector, living, ranked bool, key string, also []string, eligibleID string, eligible func(*node) bool) *tally {
	id := tallyID(selectors, living, ranked, key, also, eligibleID)
	if known := t.asked[id]; known != nil {
		t.recent.MoveToFront(known.use)
		return known
	}
	for len(t.asked) >= t.limit {
		t.forget(t.recent.Back().Value.(*tally))
	}
	a := &tally{id: id, selectors: selectors, living: living, census: census{of: t.domainsOf(key, also, eligibleID, eligible), ranked: ranked}}
	a.use = t.recent.PushFront(a)
	t.asked[id] = a
	t.byLabel.put(&a.selectors[0], a)
	t.eachMeant(&a.selectors[0], func(p *pod) {
		if living && p.object.DeletionTimestamp != nil || !t.meanAll(a.selectors, p) {
			return
		}
		p.tallies = append(p.tallies, a)
		if p.on != nil && p.on.slot != none {
			a.count(p.on, +1)
		}
	})
	return a
}

func tallyID(selectors []podSelector, living, ranked bool, key string, also []string, eligibleID string) string {
	var b strings.Builder
	if living {
		b.WriteByte('l')
	}
	if ranked {
		b.WriteByte('r')
	}
	for i := range selectors {
		b.WriteByte(';')
		b.WriteString(selectors[i].key)
	}
	b.WriteByte('|')
	writeDomainsID(&b, key, also, eligibleID)
	return b.String()
}

func writeDomainsID(b *strings.Builder, key string, also []string, eligibleID string) {
	b.WriteString(key)
	for _, other := range also {
		b.WriteByte(',')
		b.WriteString(other)
	}
	b.WriteByte('|')
	b.WriteString(eligibleID)
}

// eachMeant visits the held pods of the selector's namespaces.
func (t *topology) eachMeant(s *podSelector, visit func(*pod)) {
	if s.byNamespace == nil {
		for _, namespace := range s.namespaces {
			for _, p := range t.pods[namespace] {
				visit(p)
			}
		}
		return
	}
	for _, pods := range t.pods {
		for _, p := range pods {
			visit(p)
		}
	}
}

func (t *topology) forget(a *tally) {
	a.gone = true
	delete(t.asked, a.id)
	t.recent.Remove(a.use)
	t.byLabel.drop(&a.selectors[0], a)
	t.done(a.of)
}

// domainsOf returns domains that stay until as many users are done with them.
func (t *topology) domainsOf(key string, also []string, eligibleID string, eligible func(*node) bool) *domains {
	var b strings.Builder
	writeDomainsID(&b, key, also, eligibleID)
	id := b.String()
	d := t.domains[id]
	if d == nil {
		d = &domains{id: id, key: key, also: also, eligible: eligible, numbers: map[string]int32{}}
		for _, n := range t.bySlot {
			if n != nil {
				d.update(n)
			}
		}
		t.domains[id] = d
	}
	d.users++
	return d
}

func (t *topology) done(d *domains) {
	if d.users--; d.users == 0 {
		delete(t.domains, d.id)
	}
}

// setNamespace follows the labels of a namespace; they are nil when it has none or is gone. Tallies that select
// namespaces by labels are counted anew when they are asked for again.
func (t *topology) setNamespace(name string, labels map[string]string) {
	if labels == nil {
		delete(t.namespaces, name)
	} else {
		t.namespaces[name] = labels
	}
	for _, a := range t.asked {
		for i := range a.selectors {
			if s := &a.selectors[i]; s.byNamespace != nil && !s.everywhere {
				t.forget(a)
				break
			}
		}
	}
}

// against calls found for each term of placed pods that means p.
func (t *topology) against(p *pod, found func(*term)) {
	t.termsByPod.candidates(p.key.Namespace, p.object.Labels, func(known *term) {
		if t.means(&known.selector, p) {
			found(known)
		}
	})
}

// regroups says whether a new version of a node may belong to other domains.
func regroups(before, after *v1.Node) bool {
	return before == nil || !maps.Equal(before.Labels, after.Labels) || !sameTaints(before.Spec.Taints, after.Spec.Taints)
}
