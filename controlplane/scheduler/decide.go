// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"math/rand/v2"
)

const (
	// enough nodes that fit are compared with each other, so that a decision costs the same in a
	// cluster of any size; the search goes on where it stopped, so all nodes get their turn.
	enough = 100
	// patience bounds how many nodes are looked at once at least one is known to fit.
	patience = 1000
)

// searcher holds the scratch space of decisions, so that one allocates next to nothing.
type searcher struct {
	feasible []*node
	total    []int64
	parts    [scoreCount][]int64
	choice   choice // how the last node was chosen
	why      []string
	random   *rand.Rand
	query    query
}

func newSearcher(seed uint64) *searcher {
	x := &searcher{
		feasible: make([]*node, 0, enough),
		total:    make([]int64, enough),
		why:      make([]string, 0, 8),
		random:   rand.New(rand.NewPCG(seed, seed)),
	}
	for i := range x.parts {
		x.parts[i] = make([]int64, enough)
	}
	return x
}

// decide picks the node for a pod, or says why there is none. It leaves the snapshot as it was, apart
// from the place where the next search starts and the tallies that are kept for the next pod.
func (x *searcher) decide(p *pod, s *snapshot) (*node, *diagnosis) {
	if len(s.nodes) == 0 {
		return nil, &diagnosis{}
	}
	if p.conflict {
		return nil, &diagnosis{nodes: len(s.nodes), whole: reasonAffinityConflict}
	}
	q := x.ask(p, s)
	if fault := q.podVolumes().fault; fault != "" {
		return nil, &diagnosis{nodes: len(s.nodes), whole: fault, blockers: blockerOf("VolumeBinding")}
	}
	// Where room was made for this pod it goes, if it fits.
	if n := s.byName[p.nominated]; n != nil && n.object != nil {
		if v, _ := x.check(q, n); v == fits {
			x.choice = choice{way: keptRoom}
			return n, nil
		}
	}
	x.search(q)
	if len(x.feasible) == 0 {
		return nil, x.diagnose(q)
	}
	return x.best(q), nil
}

// ask starts the question of where a pod could go; it ends the last one.
func (x *searcher) ask(p *pod, s *snapshot) *query {
	x.query.set(p, s)
	return &x.query
}

// search fills x.feasible.
func (x *searcher) search(q *query) {
	p, s := q.pod, q.snapshot
	x.feasible = x.feasible[:0]
	if p.nodeNames != nil {
		for name := range p.nodeNames {
			if n := s.byName[name]; n != nil && n.object != nil {
				if v, _ := x.check(q, n); v == fits && len(x.feasible) < enough {
					x.feasible = append(x.feasible, n)
				}
			}
		}
		return
	}
	start := s.next % len(s.nodes)
	for looked := range s.nodes {
		at := start + looked
		if at >= len(s.nodes) {
			at -= len(s.nodes)
		}
		if v, _ := x.check(q, s.nodes[at]); v == fits {
			x.feasible = append(x.feasible, s.nodes[at])
		}
		if len(x.feasible) == enough || (len(x.feasible) > 0 && looked >= patience) {
			s.next = at + 1
			return
		}
	}
}

// check runs the filters, counting as present the pods that wait for room on the node by right of
// an equal or higher priority. Where these are what lets the pod in, it must fit without them, too:
// they may never come.
func (x *searcher) check(q *query, n *node) (verdict, []string) {
	x.why = x.why[:0]
	if len(n.nominated) > 0 {
		if v, why := x.checkNominated(q, n); v != fits {
			x.why = why
			return v, why
		}
	}
	v, why := runFilters(q, n, x.why)
	x.why = why
	return v, why
}

func (x *searcher) checkNominated(q *query, n *node) (verdict, []string) {
	q.resolve() // tallies must not be counted while pods are there only for a moment
	for _, other := range n.nominated {
		if other.uid != q.pod.uid && other.priority >= q.pod.priority {
			q.snapshot.place(other, n)
			defer q.snapshot.displace(other, n)
		}
	}
	return runFilters(q, n, x.why)
}

// best scores the feasible nodes; among equals it takes one at random.
func (x *searcher) best(q *query) *node {
	x.choice = choice{way: onlyChoice, nodes: len(q.snapshot.nodes), compared: len(x.feasible)}
	if q.pod.nodeNames != nil {
		x.choice.nodes = len(q.pod.nodeNames) // no others were in question
	}
	if len(x.feasible) == 1 {
		return x.feasible[0]
	}
	total, parts := x.total[:len(x.feasible)], x.parts
	for i := range parts {
		parts[i] = parts[i][:len(total)]
	}
	runScores(q, x.feasible, total, &parts)
	chosen, ties := 0, 1
	for i := 1; i < len(total); i++ {
		switch {
		case total[i] > total[chosen]:
			chosen, ties = i, 1
		case total[i] == total[chosen]:
			if ties++; x.random.IntN(ties) == 0 {
				chosen = i
			}
		}
	}
	x.choice.between(x.feasible, chosen, total, &parts)
	return x.feasible[chosen]
}

// diagnose asks every node again, now for the reasons: the common, successful way does not collect
// them.
func (x *searcher) diagnose(q *query) *diagnosis {
	p, s := q.pod, q.snapshot
	d := &diagnosis{nodes: len(s.nodes), reasons: map[string]int{}}
	ask := func(n *node) {
		v, why := x.check(q, n)
		for _, reason := range why {
			d.reasons[reason]++
		}
		if v != fits {
			d.blockers |= 1 << q.failed
		}
		if v == rejected {
			d.resolvable = append(d.resolvable, n)
		}
	}
	if p.nodeNames == nil {
		for _, n := range s.nodes {
			ask(n)
		}
		return d
	}
	asked := 0
	for name := range p.nodeNames {
		if n := s.byName[name]; n != nil && n.object != nil {
			ask(n)
			asked++
		}
	}
	if others := len(s.nodes) - asked; others > 0 {
		d.reasons[reasonNotNamed] += others
	}
	return d
}
