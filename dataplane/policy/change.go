// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"encoding/binary"
	"slices"

	"skep.io/skep/dataplane/maps"
)

// change is what other rules of a set make of what does not depend on pods: of everybody, and of IP blocks. It costs what
// the rules cost that come or go, and not what the others do.
type change struct {
	changed     []*rule // that come or go
	undo        func()
	rules       []*rule // after it
	anybody     []maps.PolicyEntry
	points      []point
	put         []Peer             // points that lead to another class
	gone        []maps.IdentityKey // points that are none any more
	classes     map[*class]int     // how many points more
	peers, size int
}

// plan says what is different with these rules more and those less; commit or undo has to follow.
func (s *set) plan(add, remove []*rule) *change {
	removed := map[*rule]bool{}
	for _, r := range add {
		s.blocks.add(r)
	}
	for _, r := range remove {
		s.blocks.remove(r)
		removed[r] = true
	}
	c := &change{changed: append(slices.Clone(add), remove...), classes: map[*class]int{}, peers: int(s.peers)}
	c.undo = func() {
		for _, r := range add {
			s.blocks.remove(r)
		}
		for _, r := range remove {
			s.blocks.add(r)
		}
	}
	for _, rules := range [][]*rule{s.rules, add} {
		for _, r := range rules {
			if !removed[r] {
				c.rules = append(c.rules, r)
			}
		}
	}
	var anybody []*rule
	for _, r := range c.rules {
		if r.anyPeer {
			anybody = append(anybody, r)
		}
	}
	c.anybody = s.entries(maps.PeerAny, anybody, s.target)
	s.planBlocks(c)
	c.size = len(c.anybody)
	for _, k := range s.classes {
		if k.points+c.classes[k] > 0 {
			c.size += len(k.entries)
		}
	}
	for k := range c.classes {
		if s.classes[k.content] != k {
			c.size += len(k.entries)
		}
	}
	return c
}

// planBlocks finds the points that change their class. They are written with the longest first and deleted with the
// shortest first: so every address is of its class before or of its class after.
func (s *set) planBlocks(c *change) {
	points, gone, stale := s.blocks.cut(s.points, c.changed)
	fresh := map[string]*class{}
	for _, i := range stale {
		p := &points[i]
		was := p.class
		p.class = s.classOf(c, fresh, s.blocks.rules(p.prefix))
		if _, known := slices.BinarySearchFunc(s.points, p.prefix, comparePoint); known && was == p.class {
			continue
		}
		c.count(was, -1)
		c.count(p.class, 1)
		peer := uint32(0)
		if p.class != nil {
			peer = p.class.peer
		}
		c.put = append(c.put, Peer{maps.IdentityKeyOf(s.number, p.prefix), peer})
	}
	for _, p := range gone {
		c.count(p.class, -1)
		c.gone = append(c.gone, maps.IdentityKeyOf(s.number, p.prefix))
	}
	slices.SortStableFunc(c.put, func(a, b Peer) int { return cmp.Compare(b.Key.Bits, a.Key.Bits) })
	slices.SortStableFunc(c.gone, func(a, b maps.IdentityKey) int { return cmp.Compare(a.Bits, b.Bits) })
	c.points = points
}

func (c *change) count(k *class, n int) {
	if k != nil {
		c.classes[k] += n
	}
}

// classOf is the class of addresses that match these rules; nil if they say nothing.
func (s *set) classOf(c *change, fresh map[string]*class, rules []*rule) *class {
	if len(rules) == 0 {
		return nil
	}
	entries := s.entries(0, rules, s.target)
	if len(entries) == 0 {
		return nil
	}
	content := contentOf(entries)
	if k := s.classes[content]; k != nil {
		return k
	}
	if k := fresh[content]; k != nil {
		return k
	}
	k := &class{peer: maps.PeerBlock + uint32(c.peers), content: content, entries: entries}
	c.peers++
	for i := range entries {
		entries[i].Key.Peer = k.peer
	}
	fresh[content] = k
	return k
}

// contentOf is the same for entries that say the same of two peers of a set.
func contentOf(entries []maps.PolicyEntry) string {
	slices.SortFunc(entries, func(a, b maps.PolicyEntry) int {
		return cmp.Or(cmp.Compare(a.Key.Bits, b.Key.Bits), cmp.Compare(a.Key.Proto, b.Key.Proto), cmp.Compare(a.Key.Port.Number(), b.Key.Port.Number()))
	})
	out := make([]byte, 0, 8*len(entries))
	for i := range entries {
		k := &entries[i].Key
		out = append(out, byte(k.Bits), k.Proto)
		out = binary.BigEndian.AppendUint16(out, k.Port.Number())
		out = binary.BigEndian.AppendUint32(out, uint32(entries[i].Verdict))
	}
	return string(out)
}

// commit puts a change into force; fresh and dead are what classes say that are new, and that nothing leads to any more.
func (s *set) commit(c *change) (fresh, dead []maps.PolicyEntry) {
	for k, n := range c.classes {
		if s.classes[k.content] != k {
			fresh = append(fresh, k.entries...)
			s.classes[k.content] = k
		}
		if k.points += n; k.points == 0 {
			dead = append(dead, k.entries...)
			delete(s.classes, k.content)
		}
	}
	s.rules, s.anybody, s.points, s.size, s.peers = c.rules, c.anybody, c.points, c.size, uint32(c.peers)
	return fresh, dead
}

// difference leads from some entries of one peer to others. Each port is judged as before or as after in between, as those
// with the longest prefix are written first, and deleted last.
func difference(before, after []maps.PolicyEntry) (put []maps.PolicyEntry, gone []maps.PolicyKey) {
	was := make(map[maps.PolicyKey]maps.PolicyVerdict, len(before))
	for i := range before {
		was[before[i].Key] = before[i].Verdict
	}
	for i := range after {
		if v, ok := was[after[i].Key]; !ok || v != after[i].Verdict {
			put = append(put, after[i])
		}
		delete(was, after[i].Key)
	}
	for k := range was {
		gone = append(gone, k)
	}
	slices.SortFunc(put, func(a, b maps.PolicyEntry) int { return cmp.Compare(b.Key.Bits, a.Key.Bits) })
	slices.SortFunc(gone, func(a, b maps.PolicyKey) int { return cmp.Compare(a.Bits, b.Bits) })
	return put, gone
}

// fits says whether there is room for a set after a change.
func (t *Table) fits(s *set, c *change) bool {
	return c.size <= t.limits.Set && len(c.points) <= t.limits.Set && t.entries-s.size+c.size <= t.limits.Entries &&
		t.blocks-len(s.points)+len(c.points) <= t.limits.Blocks
}

// apply writes a change of a set. Rules only come, or only go: then a program that reads one entry before and the next
// one after it, still judges as before or as after.
func (t *Table) apply(s *set, c *change) {
	type saying struct {
		of     *identity
		before []maps.PolicyEntry
	}
	var concerned []saying
	for _, id := range t.sortedIdentities() {
		if s.left[id.number] || s.concerns(c.changed, id.pod, id.namespace) {
			concerned = append(concerned, saying{id, s.written(id)})
		}
	}
	put, gone := difference(s.anybody, c.anybody)
	t.entries += c.size - s.size
	t.blocks += len(c.points) - len(s.points)
	fresh, dead := s.commit(c)
	put = append(put, fresh...)
	for _, id := range concerned {
		p, g := difference(id.before, t.admit(s, id.of, len(id.before)))
		put, gone = append(put, p...), append(gone, g...)
	}
	if len(put) > 0 {
		t.do(Action{Allow: put})
	}
	if len(c.put) > 0 {
		t.do(Action{Peers: c.put})
	}
	if len(c.gone)+len(gone) > 0 {
		t.do(Action{Forget: c.gone, Disallow: gone})
	}
	if len(dead) > 0 {
		t.later(Action{Disallow: keysOf(dead)})
	}
	for _, pod := range t.cluster.Pods(s.scope(c.changed)) {
		if _, known := t.pods[pod.key()]; !known && len(s.of(pod, t.cluster.Namespace(pod.Namespace), 0)) > 0 {
			t.track(pod)
		}
	}
}

// move is where the pods of a set go.
type move struct {
	key, tiers string
	policies   []*Policy
	pod        *Pod
	users      int
}

// moveSets changes those sets in place whose pods all go the same way, and only by what NetworkPolicies say.
func (t *Table) moveSets(slots []uint32) {
	moves := map[*set]*move{}
	var sets []*set
	for _, slot := range slots {
		l := t.locals[slot]
		for d, s := range l.sets {
			if s == nil {
				continue
			}
			policies, _ := t.judging(direction(d), l)
			key, tiers := setKey(direction(d), policies, l.pod, t.cluster)
			m := moves[s]
			switch {
			case m == nil:
				moves[s] = &move{key, tiers, policies, l.pod, 1}
				sets = append(sets, s)
			case m.key == key:
				m.users++
			}
		}
	}
	for _, s := range sets {
		if m := moves[s]; m.users == s.users && m.key != s.key && t.sets[m.key] == nil && s.mayMove(m) {
			t.moveSet(s, m)
		}
	}
}

// mayMove: everything but NetworkPolicies stays what it is.
func (s *set) mayMove(m *move) bool {
	if !s.isolated || s.tiers != m.tiers || s.direction == ingress && !slices.Equal(s.target.Ports, m.pod.Ports) {
		return false
	}
	isolated := false
	for _, p := range m.policies {
		if p.problem != nil {
			return false
		}
		isolated = isolated || p.tier == 0
	}
	return isolated
}

// moveSet leaves the set as it was if it does not fit.
func (t *Table) moveSet(s *set, m *move) {
	add, remove := s.rulesOf(without(m.policies, s.policies)), s.rulesOf(without(s.policies, m.policies))
	if len(add) > 0 {
		c := s.plan(add, nil)
		if !t.fits(s, c) {
			c.undo()
			return
		}
		t.apply(s, c)
		if len(remove) > 0 { // what a policy says elsewhere now must not be missed by who looked there before
			t.do(Action{Wait: true})
		}
	}
	if len(remove) > 0 {
		t.apply(s, s.plan(nil, remove))
		t.untrackUseless()
	}
	delete(t.sets, s.key)
	s.key, s.policies = m.key, m.policies
	t.sets[s.key] = s
	t.name(s, m.pod.Namespace)
}

// without gives the NetworkPolicies of a that are not in b.
func without(a, b []*Policy) (out []*Policy) {
	for _, p := range a {
		if p.tier == 0 && !slices.Contains(b, p) {
			out = append(out, p)
		}
	}
	return out
}

func (s *set) rulesOf(policies []*Policy) (out []*rule) {
	for _, p := range policies {
		for i := range p.rules[s.direction] {
			out = append(out, &p.rules[s.direction][i])
		}
	}
	return out
}
