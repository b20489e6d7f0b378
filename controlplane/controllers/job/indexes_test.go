// SPDX-License-Identifier: Apache-2.0

package job

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestParseIndexes(t *testing.T) {
	for _, tt := range []struct {
		text string
		n    int
		want string
	}{
		{"", 9, ""},
		{"0,2-4,7", 9, "0,2-4,7"},
		{"0,2-4,7", 4, "0,2,3"},
		{"1-2", 9, "1,2"},
		{"1,2,3", 9, "1-3"},
		{"5,1", 9, "1,5"},                       // nobody writes this, but it means something
		{"x,1-y,-3,4-2,6,,99999999999", 9, "6"}, // nor this
		{"3-8", 3, ""},
	} {
		if got := ParseIndexes(tt.text, tt.n).String(); got != tt.want {
			t.Errorf("ParseIndexes(%q, %d) = %q, want %q", tt.text, tt.n, got, tt.want)
		}
	}
}

// Indexes are a set, whatever they look like inside.
func TestIndexesAreSets(t *testing.T) {
	const n = 20
	draw := func(t *rapid.T, name string) ([]int, Indexes) {
		list := rapid.SliceOfDistinct(rapid.IntRange(0, n-1), rapid.ID[int]).Draw(t, name)
		x := Indexes(nil).With(list...)
		slices.Sort(list)
		return list, x
	}
	rapid.Check(t, func(t *rapid.T) {
		a, x := draw(t, "a")
		b, y := draw(t, "b")
		before := x.String()
		both, common := append(slices.Clone(a), b...), 0
		for i := range n {
			if x.Has(i) != slices.Contains(a, i) || x.Union(y).Has(i) != slices.Contains(both, i) || x.With(b...).Has(i) != slices.Contains(both, i) {
				t.Fatalf("%v and %v: wrong about %d", x, y, i)
			}
			if x.Has(i) && y.Has(i) {
				common++
			}
		}
		missing := slices.Collect(x.Missing(n))
		if x.Len() != len(a) || x.Common(y) != common || len(missing) != n-len(a) || slices.ContainsFunc(missing, x.Has) || !slices.IsSorted(missing) {
			t.Fatalf("%v: length %d, in common with %v %d, missing %v", x, x.Len(), y, x.Common(y), missing)
		}
		if x.String() != before || ParseIndexes(before, n).String() != before {
			t.Fatalf("%q became %q, or is read as %v", before, x, ParseIndexes(before, n))
		}
	})
}
