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
	feasible   []*node
	total, raw []int64
	why        []string
	random     *rand.Rand
}

func newSearcher(seed uint64) *searcher {
	return &searcher{
		feasible: make([]*node, 0, enough),
		total:    make([]int64, enough),
		raw:      make([]int64, enough),
		why:      make([]string, 0, 8),
		random:   rand.New(rand.NewPCG(seed, seed)),
	}
}

// decide picks the node for a pod, or says why there is none. It only reads the snapshot, apart
// from moving the place where the next search starts.
func (x *searcher) decide(p *pod, s *snapshot) (*node, *diagnosis) {
	if len(s.nodes) == 0 {
		return nil, &diagnosis{}
	}
	if p.conflict {
		return nil, &diagnosis{nodes: len(s.nodes), whole: reasonAffinityConflict}
	}
	// Where room was made for this pod it goes, if it fits.
	if n := s.byName[p.nominated]; n != nil && n.object != nil {
		if v, _ := x.check(p, n); v == fits {
			return n, nil
		}
	}
	x.search(p, s)
	if len(x.feasible) == 0 {
		return nil, x.diagnose(p, s)
	}
	return x.best(p, s), nil
}

// search fills x.feasible.
func (x *searcher) search(p *pod, s *snapshot) {
	x.feasible = x.feasible[:0]
	if p.nodeNames != nil {
		for name := range p.nodeNames {
			if n := s.byName[name]; n != nil && n.object != nil {
				if v, _ := x.check(p, n); v == fits && len(x.feasible) < enough {
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
		if v, _ := x.check(p, s.nodes[at]); v == fits {
			x.feasible = append(x.feasible, s.nodes[at])
		}
		if len(x.feasible) == enough || (len(x.feasible) > 0 && looked >= patience) {
			s.next = at + 1
			return
		}
	}
}

// check runs the filters, counting as present the pods that wait for room on the node by right of
// an equal or higher priority.
func (x *searcher) check(p *pod, n *node) (verdict, []string) {
	x.why = x.why[:0]
	for _, other := range n.nominated {
		if other.uid != p.uid && other.priority >= p.priority {
			n.add(other)
			defer n.remove(other)
		}
	}
	v, why := runFilters(p, n, x.why)
	x.why = why
	return v, why
}

// best scores the feasible nodes; among equals it takes one at random.
func (x *searcher) best(p *pod, s *snapshot) *node {
	if len(x.feasible) == 1 {
		return x.feasible[0]
	}
	total, raw := x.total[:len(x.feasible)], x.raw[:len(x.feasible)]
	runScores(p, x.feasible, s, total, raw)
	best, ties := 0, 1
	for i := 1; i < len(total); i++ {
		switch {
		case total[i] > total[best]:
			best, ties = i, 1
		case total[i] == total[best]:
			if ties++; x.random.IntN(ties) == 0 {
				best = i
			}
		}
	}
	return x.feasible[best]
}

// diagnose asks every node again, now for the reasons: the common, successful way does not collect
// them.
func (x *searcher) diagnose(p *pod, s *snapshot) *diagnosis {
	d := &diagnosis{nodes: len(s.nodes), reasons: map[string]int{}}
	ask := func(n *node) {
		v, why := x.check(p, n)
		for _, reason := range why {
			d.reasons[reason]++
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
