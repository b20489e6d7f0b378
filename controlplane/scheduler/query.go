// SPDX-License-Identifier: Apache-2.0

package scheduler

// A query is one pod's question to the snapshot, asked of many nodes: what is the same for all of
// them is looked up once. It holds for as long as the snapshot is only changed by place and
// displace.
type query struct {
	pod      *pod
	profile  *profile
	snapshot *snapshot
	failed   int // the filter that rejected the last node that was rejected

	resolved bool // what follows is filled; most pods are rejected, or woken, without
	hard     []spreadTally
	together []*tally // pods that all required affinity terms mean, by each term's key
	apart    []*tally // pods that required anti-affinity terms mean
	against  []*term  // required anti-affinity terms of other pods that mean this one
	leanings []leaning

	soft []spreadTally // filled by resolveScores

	volumesResolved bool
	volumes         podVolumes
}

// leaning is a preference by domain: for each pod counted, weight.
type leaning struct {
	of     *census
	weight int64
}

// set starts a new question and keeps the space of the last one.
func (q *query) set(p *pod, s *snapshot) {
	*q = query{
		pod: p, profile: s.profiles.of(p.object), snapshot: s,
		hard: q.hard[:0], together: q.together[:0], apart: q.apart[:0], against: q.against[:0], leanings: q.leanings[:0], soft: q.soft[:0],
	}
}

// resolve looks up what filters ask about other pods.
func (q *query) resolve() {
	if q.resolved {
		return
	}
	q.resolved = true
	p, t := q.pod, q.snapshot.topology
	for i := range p.hard {
		q.hard = append(q.hard, p.hard[i].tally(p, t))
	}
	if len(p.together) > 0 {
		for i := range p.affinity {
			if a := &p.affinity[i]; a.kind == requiredTogether {
				q.together = append(q.together, t.ask(p.together, false, false, a.key, nil, "", nil))
			}
		}
	}
	for i := range p.affinity {
		if a := &p.affinity[i]; a.kind == requiredApart {
			q.apart = append(q.apart, a.tally(t))
		}
	}
	t.against(p, func(other *term) {
		switch {
		case other.kind == requiredApart:
			q.against = append(q.against, other)
		case other.kind == requiredTogether:
			q.leanings = append(q.leanings, leaning{&other.census, q.profile.hardAffinity})
		default:
			q.leanings = append(q.leanings, leaning{&other.census, other.kind.signed()})
		}
	})
}

// resolveScores looks up what only scores ask.
func (q *query) resolveScores() {
	q.resolve()
	p, t := q.pod, q.snapshot.topology
	soft := p.soft
	if len(p.object.Spec.TopologySpreadConstraints) == 0 {
		soft = q.profile.defaultConstraints(q.snapshot.workloads.selector(p))
	}
	for i := range soft {
		q.soft = append(q.soft, soft[i].tally(p, t))
	}
	for i := range p.affinity {
		if a := &p.affinity[i]; !a.kind.required {
			q.leanings = append(q.leanings, leaning{&a.tally(t).census, a.kind.signed()})
		}
	}
}
