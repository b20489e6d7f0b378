// SPDX-License-Identifier: Apache-2.0

// Package nodeipam gives every node its pod ranges, one for each address family, out of the cluster's.
//
// Allocator is the whole bookkeeping and touches nothing else: ranges are numbered blocks of equal size.
// What nodes already have is the only state; nothing else is stored.
package nodeipam

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
)

// ErrFull is returned when a cluster range has no block left.
var ErrFull = errors.New("no pod range left: delete nodes or start with a larger cluster range")

// Pool hands out blocks of one cluster range.
type Pool struct {
	cluster  netip.Prefix
	nodeBits int
	used     []uint64 // one bit a block
	blocks   int
	next     int // where to look first, so that a block that was just freed rests
}

// NewPool divides cluster into blocks of nodeBits prefix length.
func NewPool(cluster netip.Prefix, nodeBits int) (*Pool, error) {
	cluster = cluster.Masked()
	if !cluster.IsValid() || nodeBits < cluster.Bits() || nodeBits > cluster.Addr().BitLen() {
		return nil, fmt.Errorf("cluster range %s cannot be divided into /%d: choose a longer mask", cluster, nodeBits)
	}
	n := nodeBits - cluster.Bits()
	if n > 16 {
		return nil, fmt.Errorf("cluster range %s divided into /%d is more than 65536 node ranges: choose a shorter mask", cluster, nodeBits)
	}
	blocks := 1 << n
	return &Pool{cluster: cluster, nodeBits: nodeBits, used: make([]uint64, (blocks+63)/64), blocks: blocks}, nil
}

// Allocate takes a free block.
func (p *Pool) Allocate() (netip.Prefix, error) {
	for i := range p.blocks {
		n := (p.next + i) % p.blocks
		if p.used[n/64] == ^uint64(0) && n%64 == 0 && n+64 <= p.blocks {
			continue
		}
		if p.used[n/64]&(1<<(n%64)) == 0 {
			p.used[n/64] |= 1 << (n % 64)
			p.next = (n + 1) % p.blocks
			return p.block(n), nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("%s: %w", p.cluster, ErrFull)
}

// Occupy marks whatever blocks overlap prefix as taken. It reports whether all of them were free.
func (p *Pool) Occupy(prefix netip.Prefix) bool {
	free := true
	p.each(prefix, func(n int) {
		free = free && p.used[n/64]&(1<<(n%64)) == 0
		p.used[n/64] |= 1 << (n % 64)
	})
	return free
}

// Release gives the blocks of prefix back.
func (p *Pool) Release(prefix netip.Prefix) {
	p.each(prefix, func(n int) { p.used[n/64] &^= 1 << (n % 64) })
}

// Free counts blocks that are left.
func (p *Pool) Free() int {
	free := p.blocks
	for _, word := range p.used {
		free -= bits.OnesCount64(word)
	}
	return free
}

// each calls f with the number of every block that prefix overlaps.
func (p *Pool) each(prefix netip.Prefix, f func(n int)) {
	if !prefix.IsValid() || !prefix.Overlaps(p.cluster) {
		return
	}
	prefix = prefix.Masked()
	if prefix.Bits() <= p.cluster.Bits() {
		for n := range p.blocks {
			f(n)
		}
		return
	}
	first := p.number(prefix.Addr())
	count := 1
	if prefix.Bits() < p.nodeBits {
		count = 1 << (p.nodeBits - prefix.Bits())
	}
	for n := first; n < first+count; n++ {
		f(n)
	}
}

// number is the block that holds an address of the cluster range: the bits between the two prefix lengths.
func (p *Pool) number(addr netip.Addr) int {
	bytes, n := addr.AsSlice(), 0
	for bit := p.cluster.Bits(); bit < p.nodeBits; bit++ {
		n = n<<1 | int(bytes[bit/8]>>(7-bit%8)&1)
	}
	return n
}

func (p *Pool) block(n int) netip.Prefix {
	bytes := p.cluster.Addr().AsSlice()
	for bit := p.nodeBits - 1; bit >= p.cluster.Bits(); bit-- {
		bytes[bit/8] |= byte(n&1) << (7 - bit%8)
		n >>= 1
	}
	addr, _ := netip.AddrFromSlice(bytes)
	return netip.PrefixFrom(addr, p.nodeBits)
}

// Allocator holds a pool for each cluster range and remembers who has what.
type Allocator struct {
	pools  []*Pool
	owners map[string][]netip.Prefix
}

// NewAllocator divides each cluster range by the mask of its family.
func NewAllocator(clusters []netip.Prefix, maskIPv4, maskIPv6 int) (*Allocator, error) {
	a := &Allocator{owners: map[string][]netip.Prefix{}}
	for _, cluster := range clusters {
		mask := maskIPv4
		if cluster.Addr().Is6() {
			mask = maskIPv6
		}
		pool, err := NewPool(cluster, mask)
		if err != nil {
			return nil, err
		}
		a.pools = append(a.pools, pool)
	}
	return a, nil
}

// Occupy records that a node has these ranges already. It reports whether nobody else had any of them.
func (a *Allocator) Occupy(node string, ranges []netip.Prefix) bool {
	if _, known := a.owners[node]; known || len(ranges) == 0 {
		return true
	}
	free := true
	for _, r := range ranges {
		for _, pool := range a.pools {
			free = pool.Occupy(r) && free
		}
	}
	a.owners[node] = ranges
	return free
}

// Allocate gives a node one range of every pool; asked again it gives the same. Either all pools give or none.
func (a *Allocator) Allocate(node string) ([]netip.Prefix, error) {
	if ranges, ok := a.owners[node]; ok {
		return ranges, nil
	}
	var ranges []netip.Prefix
	for _, pool := range a.pools {
		r, err := pool.Allocate()
		if err != nil {
			for i, taken := range ranges {
				a.pools[i].Release(taken)
			}
			return nil, err
		}
		ranges = append(ranges, r)
	}
	a.owners[node] = ranges
	return ranges, nil
}

// Release takes a node's ranges back, save what another node also has.
func (a *Allocator) Release(node string) {
	ranges := a.owners[node]
	delete(a.owners, node)
	for _, r := range ranges {
		for _, pool := range a.pools {
			pool.Release(r)
		}
	}
	for _, others := range a.owners {
		for _, other := range others {
			for _, r := range ranges {
				if other.Overlaps(r) {
					for _, pool := range a.pools {
						pool.Occupy(other)
					}
				}
			}
		}
	}
}
