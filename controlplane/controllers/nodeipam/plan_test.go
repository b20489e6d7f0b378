// SPDX-License-Identifier: Apache-2.0

package nodeipam

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func prefixes(s ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, x := range s {
		p = append(p, netip.MustParsePrefix(x))
	}
	return p
}

func TestDefaultRanges(t *testing.T) {
	a, err := NewAllocator(prefixes("10.42.0.0/16", "fd73:6b65:7042::/48"), 24, 64)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"[10.42.0.0/24 fd73:6b65:7042::/64]", "[10.42.1.0/24 fd73:6b65:7042:1::/64]", "[10.42.2.0/24 fd73:6b65:7042:2::/64]"} {
		got, err := a.Allocate(fmt.Sprint("n", i))
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%v %v, want %s", got, err, want)
		}
	}
	again, _ := a.Allocate("n1")
	if fmt.Sprint(again) != "[10.42.1.0/24 fd73:6b65:7042:1::/64]" {
		t.Errorf("asked again: %v", again)
	}
	// A block that was freed rests while there are others.
	a.Release("n0")
	if got, _ := a.Allocate("n3"); got[0].String() != "10.42.3.0/24" {
		t.Errorf("after a release %v", got)
	}
	// After a restart, what nodes have is theirs.
	b, _ := NewAllocator(prefixes("10.42.0.0/16", "fd73:6b65:7042::/48"), 24, 64)
	b.Occupy("n0", prefixes("10.42.0.0/24", "fd73:6b65:7042::/64"))
	if got, _ := b.Allocate("n9"); fmt.Sprint(got) != "[10.42.1.0/24 fd73:6b65:7042:1::/64]" {
		t.Errorf("after a restart %v", got)
	}
}

func TestFull(t *testing.T) {
	a, err := NewAllocator(prefixes("10.0.0.0/23", "fd00::/62"), 24, 64)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if _, err := a.Allocate(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Allocate("2"); !errors.Is(err, ErrFull) {
		t.Errorf("error %v", err)
	}
	if free := a.pools[1].Free(); free != 2 {
		t.Errorf("%d IPv6 blocks are free: the one of the failed allocation leaked", free)
	}
	a.Release("0")
	if got, err := a.Allocate("2"); err != nil || got[0].String() != "10.0.0.0/24" {
		t.Errorf("%v %v", got, err)
	}
}

func TestBadMasks(t *testing.T) {
	for _, tt := range []struct {
		cluster string
		mask    int
	}{{"10.0.0.0/24", 16}, {"10.0.0.0/24", 33}, {"fd00::/32", 64}, {"fd00::/64", 129}} {
		if _, err := NewPool(netip.MustParsePrefix(tt.cluster), tt.mask); err == nil {
			t.Errorf("%s divided into /%d is accepted", tt.cluster, tt.mask)
		}
	}
}

// However nodes come, go and return with ranges of their own, no two ever have overlapping ones, and nothing is
// lost.
func TestRangesNeverOverlap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		clusters := prefixes("10.1.0.0/20", "fd00:1::/58")
		a, err := NewAllocator(clusters, 24, 64)
		if err != nil {
			t.Fatal(err)
		}
		have := map[string][]netip.Prefix{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			node := fmt.Sprint("n", rapid.IntRange(0, 20).Draw(t, "node"))
			switch rapid.IntRange(0, 2).Draw(t, "step") {
			case 0:
				got, err := a.Allocate(node)
				if errors.Is(err, ErrFull) {
					if a.pools[0].Free() != 0 && a.pools[1].Free() != 0 {
						t.Fatal("full with blocks free")
					}
					continue
				}
				have[node] = got
			case 1:
				a.Release(node)
				delete(have, node)
			case 2: // restart
				if a, err = NewAllocator(clusters, 24, 64); err != nil {
					t.Fatal(err)
				}
				for n, ranges := range have {
					if !a.Occupy(n, ranges) {
						t.Fatalf("%s's ranges %v are taken", n, ranges)
					}
				}
			}
			for n, ranges := range have {
				for i, r := range ranges {
					if !clusters[i].Contains(r.Addr()) || r.Masked() != r {
						t.Fatalf("%s has %s outside %s", n, r, clusters[i])
					}
					for other, others := range have {
						if other != n && others[i].Overlaps(r) {
							t.Fatalf("%s has %s, %s has %s", n, r, other, others[i])
						}
					}
				}
			}
			if want := 16 - len(have); a.pools[0].Free() != want {
				t.Fatalf("%d free, want %d", a.pools[0].Free(), want)
			}
		}
	})
}

// A node may have come with a range of another size, or outside the cluster's; both must not break anything.
func TestForeignRanges(t *testing.T) {
	a, _ := NewAllocator(prefixes("10.1.0.0/22"), 24, 64)
	a.Occupy("wide", prefixes("10.1.0.0/23"))
	a.Occupy("narrow", prefixes("10.1.2.128/25"))
	a.Occupy("outside", prefixes("192.168.0.0/24"))
	if got, err := a.Allocate("n"); err != nil || got[0].String() != "10.1.3.0/24" {
		t.Errorf("%v %v", got, err)
	}
	if a.Occupy("twin", prefixes("10.1.2.0/24")) {
		t.Error("an overlap goes unnoticed")
	}
	a.Release("narrow")
	if a.pools[0].Free() != 0 {
		t.Error("a range was freed that another node has too")
	}
}
