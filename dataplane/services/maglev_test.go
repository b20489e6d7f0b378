// SPDX-License-Identifier: Apache-2.0

package services

import (
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"pgregory.net/rapid"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/maps"
)

// drawBackends draws n different addresses of a family, and one more.
func drawBackends(t *rapid.T, n int) []netip.AddrPort {
	seed := rapid.Uint32().Draw(t, "seed")
	v6 := rapid.Bool().Draw(t, "IPv6")
	out := make([]netip.AddrPort, n+1)
	for i := range out {
		k := seed + uint32(i)
		b := [4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}
		a := netip.AddrFrom4(b)
		if v6 {
			whole := [16]byte{0: 0xfd, 12: b[0]}
			copy(whole[12:], b[:])
			a = netip.AddrFrom16(whole)
		}
		out[i] = netip.AddrPortFrom(a, 8080)
	}
	return out
}

func named(backends []netip.AddrPort, size int) []netip.AddrPort {
	out := make([]netip.AddrPort, size)
	for i, b := range Consistent(backends, size) {
		out[i] = backends[b]
	}
	return out
}

// TestConsistent: for any set of backends the table does not depend on their order, their shares differ by at most an
// entry, and one that comes or goes moves its own share and little besides.
func TestConsistent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.OneOf(rapid.IntRange(2, 16), rapid.IntRange(17, 128), rapid.IntRange(129, 600)).Draw(t, "backends")
		all := drawBackends(t, n)
		size := maps.TableSize(n)
		table := named(all[:n], size)

		shuffled := rapid.Permutation(all[:n]).Draw(t, "order")
		if !slices.Equal(named(shuffled, size), table) {
			t.Fatal("the table depends on the order of backends")
		}
		shares := map[netip.AddrPort]int{}
		for _, b := range table {
			shares[b]++
		}
		for _, b := range all[:n] {
			if share := shares[b]; share < size/n || share > size/n+1 {
				t.Fatalf("%s has %d of %d entries, of %d backends", b, share, size, n)
			}
		}
		// What has to move is the share of the one that comes, or goes.
		more := named(all, size)
		needless, gained := 0, 0
		for i := range table {
			switch {
			case more[i] == all[n]:
				gained++
			case more[i] != table[i]:
				needless++
			}
		}
		if needless > size/20 {
			t.Fatalf("with a backend more than %d, %d of %d entries moved besides its own %d", n, needless, size, gained)
		}
	})
}

// TestTableSizes: the sizes are primes, and a thousand NodePort services of two families take some 20 MB.
func TestTableSizes(t *testing.T) {
	for _, n := range []int{2, 16, 17, 128, 129, 32768} {
		size := maps.TableSize(n)
		for d := 2; d*d <= size; d++ {
			if size%d == 0 {
				t.Errorf("the size for %d backends, %d, is divided by %d", n, size, d)
			}
		}
		if size < 2*n-1 {
			t.Errorf("%d entries for %d backends", size, n)
		}
	}
	for _, n := range []int{0, 1, 32769} {
		if size := maps.TableSize(n); size != 0 {
			t.Errorf("a table of %d for %d backends", size, n)
		}
	}
	if bytes := 2000 * tableBlocks(maps.TableSize(16)) * (256 + 64); bytes > 24<<20 {
		t.Errorf("%d bytes", bytes)
	}
}

func BenchmarkConsistent(b *testing.B) {
	backends := addrs(1, 2, 3)
	for range b.N {
		Consistent(backends, maps.TableSize(len(backends)))
	}
}

// TestAlgorithm: what comes from outside chooses by a consistent table unless the Service says otherwise; an
// algorithm that nobody knows is told of.
func TestAlgorithm(t *testing.T) {
	for annotation, want := range map[string]struct {
		inside, outside bool
		told            string
	}{
		"":       {outside: true},
		"maglev": {inside: true, outside: true},
		"random": {},
		"Maglev": {outside: true, told: `annotation skep.io/lb-algorithm: "Maglev" is neither maglev nor random: the default is used`},
	} {
		svc := service(func(s *corev1.Service) {
			s.Spec.Ports[0].NodePort = 30080
			s.Annotations = map[string]string{api.AlgorithmAnnotation: annotation}
		})
		d := Build(svc, []*discoveryv1.EndpointSlice{slice("10.42.0.1", "10.42.0.2")}, Place{})
		if d.Unsupported != want.told {
			t.Errorf("%q: told %q", annotation, d.Unsupported)
		}
		for _, f := range d.Sets[0].Frontends {
			if by := map[uint8]bool{maps.ScopeInternal: want.inside, maps.ScopeExternal: want.outside}[f.Scope]; f.Maglev != by {
				t.Errorf("%q: %s:%d in scope %d by a table: %t", annotation, f.Addr, f.Port, f.Scope, f.Maglev)
			}
		}
		if d.Sets[0].tabled() != want.outside {
			t.Errorf("%q: a table: %t", annotation, d.Sets[0].tabled())
		}
	}
}
