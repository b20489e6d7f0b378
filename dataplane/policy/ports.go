// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"math/bits"
	"slices"

	"skep.io/skep/dataplane/maps"
)

// portRange is inclusive.
type portRange struct{ first, last uint16 }

// ports is what a peer may use. The zero value is nothing.
type ports struct {
	all     bool // every protocol, also those without ports
	byProto map[uint8][]portRange
}

func (p *ports) empty() bool { return !p.all && len(p.byProto) == 0 }

func (p *ports) add(proto uint8, r portRange) {
	if p.byProto == nil {
		p.byProto = map[uint8][]portRange{}
	}
	p.byProto[proto] = append(p.byProto[proto], r)
}

// merge joins ranges that overlap or touch.
func merge(rs []portRange) []portRange {
	rs = slices.Clone(rs)
	slices.SortFunc(rs, func(a, b portRange) int { return cmp.Compare(a.first, b.first) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && uint32(r.first) <= uint32(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, r.last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// entries are the fewest that let peer use these ports: a prefix for each aligned power of two.
func (p *ports) entries(set, peer uint32) []maps.PolicyEntry {
	if p.all {
		return []maps.PolicyEntry{{Key: maps.PolicyKey{Bits: maps.PolicyBitsPeer, Set: set, Peer: peer}, Verdict: maps.PolicyAllow}}
	}
	var out []maps.PolicyEntry
	for proto, rs := range p.byProto {
		for _, r := range merge(rs) {
			for _, key := range r.keys(set, peer, proto) {
				out = append(out, maps.PolicyEntry{Key: key, Verdict: maps.PolicyAllow})
			}
		}
	}
	return out
}

// keys are the fewest prefixes that hold exactly the range.
func (r portRange) keys(set, peer uint32, proto uint8) (out []maps.PolicyKey) {
	for first := uint32(r.first); first <= uint32(r.last); {
		size := uint32(1) << min(bits.TrailingZeros32(first|1<<16), bits.Len32(uint32(r.last)-first+1)-1)
		out = append(out, maps.PolicyKey{
			Bits: maps.PolicyBitsProto + 16 - uint32(bits.TrailingZeros32(size)),
			Set:  set, Peer: peer, Proto: proto, Port: maps.PortOf(uint16(first)),
		})
		first += size
	}
	return out
}
