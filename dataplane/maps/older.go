// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"slices"
)

// Layout of a map's entries: the LayoutVersion they were written under, and their sizes in bytes.
type Layout struct {
	Version    int
	Key, Value uint32
}

// older are layouts of earlier versions whose entries still mean something, by map. Who changes a layout adds the old one
// here, or lets the map be made anew.
var older = []struct {
	maps    []string
	from    Layout
	convert func(key, value []byte) (k, v []byte)
}{
	// Before policies (Flow.Checked): 0 says that none has judged it yet, so its next packet is.
	{[]string{"conntrack_tcp", "conntrack_udp"}, Layout{1, 40, 72}, appendZeros(8)},
}

func appendZeros(n int) func(key, value []byte) (k, v []byte) {
	return func(key, value []byte) ([]byte, []byte) {
		return key, append(slices.Clone(value), make([]byte, n)...)
	}
}

// Converter takes entries of a map from one layout to another; nil if they are not to be understood. It is pure.
func Converter(name string, from, to Layout) func(key, value []byte) (k, v []byte) {
	if from == to {
		return func(key, value []byte) ([]byte, []byte) { return key, value }
	}
	for _, o := range older {
		if !slices.Contains(o.maps, name) || o.from != from {
			continue
		}
		// What was declared leads to today's layout; an entry of other sizes would be refused by the kernel.
		if k, v := o.convert(make([]byte, from.Key), make([]byte, from.Value)); uint32(len(k)) == to.Key && uint32(len(v)) == to.Value {
			return o.convert
		}
	}
	return nil
}
