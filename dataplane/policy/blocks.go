// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// v4InV6 is where a table of 16-byte addresses holds IPv4.
var (
	v4InV6 = netip.MustParsePrefix("::ffff:0:0/96")
	anyV4  = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
)

// blocks cuts the addresses along every block and exception of rules: the longest of its prefixes that holds an address
// tells which rules the address matches. One that matches no rules shadows a shorter one.
type blocks struct {
	held, exempt map[netip.Prefix][]owner
	cuts         map[netip.Prefix]int // how many blocks and exceptions need this prefix
	lengths      [2][129]int          // how many of them have this length, by family
}

type owner struct {
	rule  *rule
	block int
}

func newBlocks() *blocks {
	return &blocks{held: map[netip.Prefix][]owner{}, exempt: map[netip.Prefix][]owner{}, cuts: map[netip.Prefix]int{}}
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return 1
}

// prefixes that a rule needs; one may come more than once.
func prefixes(r *rule) (out []netip.Prefix) {
	for i := range r.blocks {
		out = append(out, r.blocks[i].cidr)
		out = append(out, r.blocks[i].except...)
	}
	for _, p := range out {
		if p.Addr().Is6() && p.Contains(v4InV6.Addr()) { // so large that IPv4 must be cut out of it
			return append(out, anyV4)
		}
	}
	return out
}

func (b *blocks) add(r *rule) {
	for i := range r.blocks {
		o := owner{r, i}
		b.held[r.blocks[i].cidr] = append(b.held[r.blocks[i].cidr], o)
		for _, e := range r.blocks[i].except {
			b.exempt[e] = append(b.exempt[e], o)
		}
	}
	b.count(r, 1)
}

func (b *blocks) remove(r *rule) {
	without := func(m map[netip.Prefix][]owner, p netip.Prefix, o owner) {
		m[p] = slices.DeleteFunc(m[p], func(x owner) bool { return x == o })
		if len(m[p]) == 0 {
			delete(m, p)
		}
	}
	for i := range r.blocks {
		o := owner{r, i}
		without(b.held, r.blocks[i].cidr, o)
		for _, e := range r.blocks[i].except {
			without(b.exempt, e, o)
		}
	}
	b.count(r, -1)
}

func (b *blocks) count(r *rule, n int) {
	for _, p := range prefixes(r) {
		b.lengths[family(p)][p.Bits()] += n
		if b.cuts[p] += n; b.cuts[p] == 0 {
			delete(b.cuts, p)
		}
	}
}

// rules are those that the addresses of a prefix match, without the ones that longer prefixes hold.
func (b *blocks) rules(p netip.Prefix) (out []*rule) {
	var in []owner
	not := map[owner]bool{}
	for n := 0; n <= p.Bits(); n++ {
		if b.lengths[family(p)][n] == 0 {
			continue
		}
		around := netip.PrefixFrom(p.Addr(), n).Masked()
		in = append(in, b.held[around]...)
		for _, o := range b.exempt[around] {
			not[o] = true
		}
	}
	for _, o := range in {
		if !not[o] && (len(out) == 0 || out[len(out)-1] != o.rule) {
			out = append(out, o.rule)
		}
	}
	return out
}

// point is one of the prefixes, and what its addresses are taken for.
type point struct {
	prefix netip.Prefix
	class  *class // nil: no rule's
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func comparePoint(a point, p netip.Prefix) int { return comparePrefixes(a.prefix, p) }

// cut gives the points after rules have changed, from those before, in order. Without a class are those that are new;
// stale ones, by their place, may match other rules than before.
func (b *blocks) cut(before []point, changed []*rule) (after []point, gone []point, stale []int) {
	touched := map[netip.Prefix]bool{}
	for _, r := range changed {
		for _, p := range prefixes(r) {
			touched[p] = true
		}
	}
	var created []netip.Prefix
	vanished := map[netip.Prefix]bool{}
	for p := range touched {
		_, was := slices.BinarySearchFunc(before, p, comparePoint)
		switch is := b.cuts[p] > 0; {
		case is && !was:
			created = append(created, p)
		case was && !is:
			vanished[p] = true
		}
	}
	slices.SortFunc(created, comparePrefixes)
	after = make([]point, 0, len(before)+len(created))
	marks := make([]bool, 0, cap(after))
	for len(before) > 0 || len(created) > 0 {
		switch {
		case len(before) == 0 || len(created) > 0 && comparePoint(before[0], created[0]) > 0:
			after, marks = append(after, point{prefix: created[0]}), append(marks, true)
			created = created[1:]
		case len(vanished) > 0 && vanished[before[0].prefix]:
			gone, before = append(gone, before[0]), before[1:]
		default:
			after, marks = append(after, before[0]), append(marks, false)
			before = before[1:]
		}
	}
	for _, r := range changed {
		for i := range r.blocks {
			cidr := r.blocks[i].cidr
			first, _ := slices.BinarySearchFunc(after, cidr, comparePoint)
			for n := first; n < len(after) && cidr.Contains(after[n].prefix.Addr()); n++ {
				marks[n] = true
			}
		}
	}
	for i, m := range marks {
		if m {
			stale = append(stale, i)
		}
	}
	return after, gone, stale
}
