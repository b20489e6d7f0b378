// SPDX-License-Identifier: Apache-2.0

package sandbox

import "skep.io/skep/node/idmap"

// firstIDs is where the first range of ids begins: the host's own are below (kubelet: userns_manager.go).
const firstIDs = idmap.Length

// nextIDs finds the first id of a range that no pod has. Ranges are handed out in turn, so that what a pod leaves behind
// outside of its volumes does not at once belong to another. last is 0 if none was handed out.
func nextIDs(last uint32, ranges int, taken map[uint32]bool) (first uint32, ok bool) {
	start := 0
	if last >= firstIDs {
		start = int(last-firstIDs)/idmap.Length + 1
	}
	for i := range ranges {
		first = firstIDs + uint32((start+i)%ranges)*idmap.Length
		if !taken[first] {
			return first, true
		}
	}
	return 0, false
}
