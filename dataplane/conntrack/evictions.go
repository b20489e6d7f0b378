// SPDX-License-Identifier: Apache-2.0

package conntrack

// ByProtocol is a number for each of the two maps; UDP's also holds what is neither.
type ByProtocol struct{ TCP, UDP uint64 }

// Tally is what the programs did to the maps of flows since these were made.
type Tally struct{ Added, Removed, Failed ByProtocol }

// evictions adds up how many flows were driven out by others. The kernel tells nobody of that: it is what was noted, less
// what was forgotten, less what is there. Flows come and go while they are listed, so each pass gives a bound
// from below, and the highest is kept.
type evictions struct{ most ByProtocol }

// add takes a pass: the tallies from before and after the flows were listed, and how many were found.
func (e *evictions) add(before, after Tally, found ByProtocol) ByProtocol {
	e.most.TCP = max(e.most.TCP, atLeast(before.Added.TCP, after.Removed.TCP, found.TCP))
	e.most.UDP = max(e.most.UDP, atLeast(before.Added.UDP, after.Removed.UDP, found.UDP))
	return e.most
}

// atLeast so many were driven out by the time that removed was read: each flow that was there when added was read has been
// found, or was removed, or driven out since. What came since only lowers it.
func atLeast(added, removed, found uint64) uint64 {
	if gone := removed + found; added > gone {
		return added - gone
	}
	return 0
}
