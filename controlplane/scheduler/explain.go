// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"strings"
)

// A choice is how a node was chosen, to be told with the pod's binding.
type choice struct {
	way             way
	nodes           int // of the cluster
	compared        int // that fit
	next            string
	score, nextBest int64
	// parts are what each score gave the chosen node and the next, with its weight.
	parts [scoreCount]struct{ chosen, next int64 }
}

// way is why the node won.
type way uint8

const (
	onlyChoice  way = iota // of the nodes that were looked at, no other fits
	keptRoom               // pods of lower priority left it for this one
	best                   // by its score
	bestOfEqual            // others have the same score: it was drawn
)

// between notes the chosen node's scores and those of the best other.
func (c *choice) between(nodes []*node, chosen int, total []int64, parts *[scoreCount][]int64) {
	next := -1
	for i := range total {
		if i != chosen && (next < 0 || total[i] > total[next]) {
			next = i
		}
	}
	c.way, c.next, c.score, c.nextBest = best, nodes[next].name, total[chosen], total[next]
	if c.score == c.nextBest {
		c.way = bestOfEqual
	}
	for i := range parts {
		c.parts[i].chosen, c.parts[i].next = parts[i][chosen], parts[i][next]
	}
}

// String is what follows upstream's words on the event of a binding; nothing where there was nothing to choose.
func (c *choice) String() string {
	switch {
	case c.way == keptRoom:
		return ", where room was made for it"
	case c.way == onlyChoice && c.nodes > 1:
		return fmt.Sprintf(", the only one that fits of %d", c.nodes)
	case c.way == onlyChoice:
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, ", with a score of %d the best of %d that fit; ", c.score, c.compared)
	if c.way == bestOfEqual {
		fmt.Fprintf(&b, "%s has the same", c.next)
	} else {
		fmt.Fprintf(&b, "next is %s with %d", c.next, c.nextBest)
	}
	separator := " ("
	for i := range scores {
		if part := c.parts[i]; part.chosen != part.next {
			fmt.Fprintf(&b, "%s%s %d, there %d", separator, scores[i].name, part.chosen, part.next)
			separator = "; "
		}
	}
	if separator == "; " {
		b.WriteByte(')')
	}
	return b.String()
}
