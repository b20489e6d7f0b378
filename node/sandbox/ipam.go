// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"net/netip"
	"slices"
)

// maxScan bounds how many addresses of one range are ever handed out: IPv6 ranges are larger than
// any node's number of pods.
const maxScan = 1 << 16

// pool hands out the addresses of one range in turn, so that an address is used again as late as
// possible: whoever still holds an old pod's address does not meet a new pod there.
// It has no lock; Sandboxes serialises.
type pool struct {
	prefix  netip.Prefix
	last    netip.Addr // handed out last; invalid at first
	used    map[netip.Addr]bool
	resting []netip.Addr // released last, newest at the end: handed out only when nothing else is free
}

// restingPlaces is how many released addresses rest.
const restingPlaces = 16

func newPool(prefix netip.Prefix) *pool {
	return &pool{prefix: prefix.Masked(), used: map[netip.Addr]bool{}}
}

// next returns a free address.
func (p *pool) next() (netip.Addr, error) {
	a, ok := p.scan()
	if !ok && len(p.resting) > 0 {
		a, ok = p.resting[0], true
	}
	if !ok {
		return netip.Addr{}, fmt.Errorf("%w: all %d usable addresses of %s are in use", ErrNoAddress, len(p.used), p.prefix)
	}
	p.resting = slices.DeleteFunc(p.resting, func(r netip.Addr) bool { return r == a })
	p.used[a], p.last = true, a
	return a, nil
}

// scan goes once round the range, beginning after the last address.
func (p *pool) scan() (netip.Addr, bool) {
	first := p.prefix.Addr()
	a := p.last
	if !a.IsValid() || !p.prefix.Contains(a) {
		a = first
	}
	for range maxScan {
		a = a.Next()
		if !a.IsValid() || !p.prefix.Contains(a) || offset(first, a) >= maxScan {
			a = first
		}
		if !reserved(p.prefix, a) && !p.used[a] && !slices.Contains(p.resting, a) {
			return a, true
		}
		if a == p.last {
			break
		}
	}
	return netip.Addr{}, false
}

func (p *pool) release(a netip.Addr) {
	if !p.used[a] {
		return
	}
	delete(p.used, a)
	if p.resting = append(p.resting, a); len(p.resting) > restingPlaces {
		p.resting = p.resting[1:]
	}
}

// offset is a's distance from first in the last 32 bits, which is all that maxScan needs.
func offset(first, a netip.Addr) uint32 {
	x, y := first.As16(), a.As16()
	low := func(b [16]byte) uint32 {
		return uint32(b[12])<<24 | uint32(b[13])<<16 | uint32(b[14])<<8 | uint32(b[15])
	}
	return low(y) - low(x)
}

// reserved addresses are never a pod's: the network's own and its first host (the node's end on
// device skep0), and IPv4's broadcast. Last octets 0, 1 and 255 are left out in every IPv4 range,
// since routers on the way may take them for a network's or a broadcast.
func reserved(prefix netip.Prefix, a netip.Addr) bool {
	first := prefix.Addr()
	if prefix.IsSingleIP() {
		return false
	}
	if a == first || a == first.Next() {
		return true
	}
	if a.Is4() {
		b := a.As4()
		if prefix.Bits() <= 24 && (b[3] == 0 || b[3] == 1 || b[3] == 255) {
			return true
		}
		next := a.Next()
		return !next.IsValid() || !prefix.Contains(next)
	}
	return false
}
