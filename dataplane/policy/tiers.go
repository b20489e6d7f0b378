// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"

	"skep.io/skep/dataplane/maps"
)

// contribution is what one rule says of a peer that it names.
type contribution struct {
	says  maps.PolicyVerdict
	ports ports
}

// contributes adds a rule that names a peer; target gives names of ports a meaning, named as in rule.open.
func (s *set) contributes(out []contribution, r *rule, target *Pod, named bool) []contribution {
	c := contribution{says: s.silent().Allowed()}
	if r.tier != 0 {
		c.says = maps.TierRule(r.tier, r.place, r.action)
	}
	r.open(&c.ports, target, named)
	if c.ports.empty() {
		return out
	}
	return append(out, c)
}

// silent is what the set says where no rule does.
func (s *set) silent() maps.PolicyVerdict {
	if s.isolated {
		return maps.PolicySilent.Isolated()
	}
	return maps.PolicySilent
}

// verdicts are the entries of a peer: of each protocol and port the joined contributions of all rules. What is said
// of every protocol is one entry, and others are where they differ from it.
func (s *set) verdicts(peer uint32, from []contribution, always bool) []maps.PolicyEntry {
	all := s.silent()
	byProto := map[uint8]bool{}
	for _, c := range from {
		if c.ports.all {
			all = all.Join(c.says)
		}
		for proto := range c.ports.byProto {
			byProto[proto] = true
		}
	}
	var out []maps.PolicyEntry
	if always || all != s.silent() {
		out = append(out, maps.PolicyEntry{Key: maps.PolicyKey{Bits: maps.PolicyBitsPeer, Set: s.number, Peer: peer}, Verdict: all})
	}
	for proto := range byProto {
		for _, p := range pieces(proto, all, from) {
			if p.says == all {
				continue
			}
			for _, key := range p.portRange.keys(s.number, peer, proto) {
				out = append(out, maps.PolicyEntry{Key: key, Verdict: p.says})
			}
		}
	}
	return out
}

type piece struct {
	portRange
	says maps.PolicyVerdict
}

// pieces cuts a protocol's ports where what is said of them changes.
func pieces(proto uint8, all maps.PolicyVerdict, from []contribution) (out []piece) {
	cuts := []uint32{0, 1 << 16}
	for _, c := range from {
		for _, r := range c.ports.byProto[proto] {
			cuts = append(cuts, uint32(r.first), uint32(r.last)+1)
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	for i := range len(cuts) - 1 {
		p := piece{portRange{uint16(cuts[i]), uint16(cuts[i+1] - 1)}, all}
		for _, c := range from {
			if slices.ContainsFunc(c.ports.byProto[proto], func(r portRange) bool { return r.first <= p.first && p.last <= r.last }) {
				p.says = p.says.Join(c.says)
			}
		}
		if n := len(out); n > 0 && out[n-1].says == p.says {
			out[n-1].last = p.last
			continue
		}
		out = append(out, p)
	}
	return out
}

// closed is the entry of an identity for which there is no room: nothing of it is known, so nothing may pass.
func (s *set) closed(identity uint32) []maps.PolicyEntry {
	return []maps.PolicyEntry{{
		Key:     maps.PolicyKey{Bits: maps.PolicyBitsPeer, Set: s.number, Peer: identity},
		Verdict: maps.TierRule(maps.TierAdmin, 0, maps.TierDeny).Join(s.silent()),
	}}
}
