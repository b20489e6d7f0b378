// SPDX-License-Identifier: Apache-2.0

package job

import (
	"cmp"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// Indexes is a set of completion indexes: spans in order that neither overlap nor touch. Its size is that of what
// has gaps, not of what it holds; a Job may have 100,000 completions.
type Indexes []span

type span struct{ first, last int }

// ParseIndexes reads what String writes ("1,3-5,7"), and keeps what is below a bound. Parts that are no numbers or
// intervals are passed over: they can only come from somebody who wrote into a status by hand.
func ParseIndexes(text string, below int) Indexes {
	var spans Indexes
	for part := range strings.SplitSeq(text, ",") {
		from, to, interval := strings.Cut(part, "-")
		first, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		last := first
		if interval {
			if last, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		if last = min(last, below-1); first >= 0 && first <= last {
			spans = append(spans, span{first, last})
		}
	}
	return merged(spans)
}

func merged(spans Indexes) Indexes {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var out Indexes
	for _, s := range spans {
		if n := len(out); n > 0 && s.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// With returns the set with more added.
func (x Indexes) With(more ...int) Indexes {
	spans := slices.Grow(slices.Clone(x), len(more))
	for _, i := range more {
		spans = append(spans, span{i, i})
	}
	return merged(spans)
}

// Union returns what is in x or y.
func (x Indexes) Union(y Indexes) Indexes { return merged(slices.Concat(x, y)) }

// Has tells whether i is in the set.
func (x Indexes) Has(i int) bool {
	at, found := slices.BinarySearchFunc(x, i, func(s span, i int) int { return cmp.Compare(s.first, i) })
	return found || at > 0 && x[at-1].last >= i
}

// Len is how many indexes are in the set.
func (x Indexes) Len() (n int) {
	for _, s := range x {
		n += s.last - s.first + 1
	}
	return n
}

// Common is how many indexes are in both x and y.
func (x Indexes) Common(y Indexes) (n int) {
	for i, j := 0, 0; i < len(x) && j < len(y); {
		n += max(0, min(x[i].last, y[j].last)-max(x[i].first, y[j].first)+1)
		if x[i].last < y[j].last {
			i++
		} else {
			j++
		}
	}
	return n
}

// Missing are the indexes below a bound that are not in the set, in order.
func (x Indexes) Missing(below int) iter.Seq[int] {
	return func(yield func(int) bool) {
		next := 0
		for _, s := range append(slices.Clone(x), span{below, below}) {
			for ; next < min(s.first, below); next++ {
				if !yield(next) {
					return
				}
			}
			next = s.last + 1
		}
	}
}

// String writes the set as status.completedIndexes has it: three or more in a row as an interval.
func (x Indexes) String() string {
	var b strings.Builder
	for _, s := range x {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(s.first))
		switch {
		case s.last > s.first+1:
			b.WriteByte('-')
			b.WriteString(strconv.Itoa(s.last))
		case s.last > s.first:
			b.WriteByte(',')
			b.WriteString(strconv.Itoa(s.last))
		}
	}
	return b.String()
}
