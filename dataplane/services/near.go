// SPDX-License-Identifier: Apache-2.0

package services

import "slices"

// near leaves out the ready candidates that are meant for other nodes or zones, if every ready one has
// a hint and one is meant for this node or zone: the rules of kube-proxy (KEP-2433, KEP-3015). Those
// that are not ready stay, for when nothing else is left.
func near(all []candidate, here Place) []candidate {
	for _, by := range []struct {
		value string
		hints func(candidate) []string
	}{
		{here.Node, func(c candidate) []string { return c.forNodes }},
		{here.Zone, func(c candidate) []string { return c.forZones }},
	} {
		if by.value == "" {
			continue
		}
		hinted, found := true, false
		for _, c := range all {
			if c.ready {
				hinted = hinted && len(by.hints(c)) > 0
				found = found || slices.Contains(by.hints(c), by.value)
			}
		}
		if !hinted || !found {
			continue
		}
		var out []candidate
		for _, c := range all {
			if !c.ready || slices.Contains(by.hints(c), by.value) {
				out = append(out, c)
			}
		}
		return out
	}
	return all
}
