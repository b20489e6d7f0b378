// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func TestPoolHandsOutAll(t *testing.T) {
	for _, c := range []struct {
		prefix string
		want   int
	}{
		{"10.42.0.0/24", 253}, {"10.42.0.0/28", 13}, {"10.42.0.0/23", 506}, {"10.42.0.0/32", 1}, {"fd00::/124", 14}, {"fd00::/64", maxScan - 2},
	} {
		p := newPool(netip.MustParsePrefix(c.prefix))
		n := 0
		for {
			a, err := p.next()
			if err != nil {
				if !errors.Is(err, ErrNoAddress) {
					t.Errorf("%s: %v", c.prefix, err)
				}
				break
			}
			if !p.prefix.Contains(a) {
				t.Fatalf("%s: %s is outside", c.prefix, a)
			}
			n++
		}
		if n != c.want {
			t.Errorf("%s: %d addresses, want %d", c.prefix, n, c.want)
		}
	}
}

// TestPoolProperties: an address in use is never handed out, and one that was released comes again
// only after all others.
func TestPoolProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := newPool(netip.MustParsePrefix(rapid.SampledFrom([]string{"10.42.3.0/27", "fd00:1::/123"}).Draw(t, "range")))
		var held []netip.Addr
		var released []netip.Addr
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			if len(held) > 0 && rapid.Bool().Draw(t, "release") {
				i := rapid.IntRange(0, len(held)-1).Draw(t, "which")
				a := held[i]
				p.release(a)
				held = append(held[:i], held[i+1:]...)
				released = append(released, a)
				continue
			}
			a, err := p.next()
			if err != nil {
				continue
			}
			for _, h := range held {
				if h == a {
					t.Fatalf("%s is in use", a)
				}
			}
			if len(released) > 0 && released[len(released)-1] == a && len(p.used) < 14 {
				t.Fatalf("%s was released a moment ago and others are free", a)
			}
			held = append(held, a)
		}
	})
}

func TestSysctlKey(t *testing.T) {
	for in, want := range map[string]string{
		"kernel.shm_rmid_forced": "kernel/shm_rmid_forced", "net/ipv4/conf/eth0.1/rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"net.ipv4.conf.eth0/1.rp_filter": "net/ipv4/conf/eth0.1/rp_filter", "plain": "plain",
	} {
		if got := sysctlKey(in); got != want {
			t.Errorf("sysctlKey(%q) = %q, want %q", in, got, want)
		}
	}
	for _, bad := range []string{"kernel.hostname", "vm.swappiness", "net/../kernel/hostname"} {
		if checkSysctl(bad, Spec{}) == nil {
			t.Errorf("%s accepted", bad)
		}
	}
}
