// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// v4InV6 is where a table of 16-byte addresses holds IPv4.
var v4InV6 = netip.MustParsePrefix("::ffff:0:0/96")

// region is a prefix without the longer ones beside it, and the rules whose blocks hold it.
type region struct {
	prefix netip.Prefix
	rules  []int
}

// regions cuts the addresses along every block and exception of rules, so that the longest prefix of an
// address tells which rules it matches. A region of no rules shadows a shorter one.
func regions(rules []rule) []region {
	type owner struct{ rule, block int }
	held, exempt := map[netip.Prefix][]owner{}, map[netip.Prefix][]owner{}
	points := map[netip.Prefix]bool{}
	for i := range rules {
		for j, b := range rules[i].blocks {
			o := owner{i, j}
			held[b.cidr] = append(held[b.cidr], o)
			points[b.cidr] = true
			for _, e := range b.except {
				exempt[e] = append(exempt[e], o)
				points[e] = true
			}
		}
	}
	out := make([]region, 0, len(points))
	mapped := false // an IPv6 block so large that IPv4 must be cut out of it
	for p := range points {
		if p.Addr().Is6() && p.Contains(v4InV6.Addr()) {
			mapped = true
		}
		in, not := map[owner]bool{}, map[owner]bool{}
		for n := 0; n <= p.Bits(); n++ {
			around := netip.PrefixFrom(p.Addr(), n).Masked()
			for _, o := range held[around] {
				in[o] = true
			}
			for _, o := range exempt[around] {
				not[o] = true
			}
		}
		r := region{prefix: p}
		for o := range in {
			if !not[o] {
				r.rules = append(r.rules, o.rule)
			}
		}
		slices.Sort(r.rules)
		r.rules = slices.Compact(r.rules)
		out = append(out, r)
	}
	if any4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0); mapped && !points[any4] {
		out = append(out, region{prefix: any4})
	}
	slices.SortFunc(out, func(a, b region) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})
	return out
}

// class names the regions that match the same rules.
func (r *region) class() string { return fmt.Sprint(r.rules) }
