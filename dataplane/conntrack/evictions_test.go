// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"math/rand/v2"
	"testing"
)

func TestEvictions(t *testing.T) {
	var e evictions
	tally := func(added, removed uint64) Tally {
		return Tally{Added: ByProtocol{added, 0}, Removed: ByProtocol{removed, 0}}
	}
	for i, pass := range []struct {
		before, after Tally
		found, want   uint64
	}{
		{tally(10, 2), tally(10, 2), 8, 0},   // all are there
		{tally(30, 2), tally(30, 2), 20, 8},  // some are not
		{tally(30, 2), tally(40, 12), 20, 8}, // many came and went meanwhile: nothing new is known
		{tally(60, 12), tally(60, 12), 20, 28},
	} {
		if got := e.add(pass.before, pass.after, ByProtocol{pass.found, 0}); got != (ByProtocol{pass.want, 0}) {
			t.Errorf("pass %d: %+v, want %d", i, got, pass.want)
		}
	}
}

// TestEvictionsNeverTooMany: flows that come, end and are driven out while they are listed are never counted twice, and all are
// counted once nothing happens.
func TestEvictionsNeverTooMany(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		var e evictions
		var done Tally
		var evicted uint64
		there := map[int]bool{}
		next := 0
		step := func() {
			switch n := r.IntN(3); {
			case n == 0 && len(there) > 0:
				for id := range there { // any
					delete(there, id)
					break
				}
				done.Removed.UDP++
			case n == 1 && len(there) > 20:
				for id := range there {
					delete(there, id)
					break
				}
				evicted++
			default:
				there[next] = true
				next++
				done.Added.UDP++
			}
		}
		list := func(busy bool) ByProtocol {
			before := done
			found := map[int]bool{}
			// Half of the table is read, things happen, then the other half.
			for _, half := range []int{0, 1} {
				for id := range there {
					if id%2 == half {
						found[id] = true
					}
				}
				for range r.IntN(40) {
					if busy {
						step()
					}
				}
			}
			return e.add(before, done, ByProtocol{0, uint64(len(found))})
		}
		for range 30 {
			for range r.IntN(60) {
				step()
			}
			if got := list(true); got.UDP > evicted {
				t.Fatalf("seed %d: %d were driven out, %d are counted", seed, evicted, got.UDP)
			}
		}
		if got := list(false); got.UDP != evicted {
			t.Fatalf("seed %d: %d were driven out, in the end %d are counted", seed, evicted, got.UDP)
		}
	}
}
