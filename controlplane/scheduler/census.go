// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"

	v1 "k8s.io/api/core/v1"
)

// domains are the values of one topology key over the nodes that count, numbered, so that censuses
// are arrays. They follow every node that comes, changes or goes.
type domains struct {
	id       string // equal for domains of the same nodes by the same key
	key      string
	also     []string         // other keys that a node must have
	eligible func(*node) bool // nil: any node that has the keys

	numbers map[string]int32 // by value
	values  []string         // by number
	nodes   []int32          // by number: how many nodes have the value
	free    []int32          // numbers to use again
	count   int              // values that at least one node has
	at      []int32          // by node.slot: the number of the node's value, or none

	users int // censuses of these domains
}

const none = -1

func (d *domains) counts(n *node) bool {
	if n.object == nil {
		return false
	}
	if _, ok := n.object.Labels[d.key]; !ok {
		return false
	}
	return hasKeys(n.object, d.also) && (d.eligible == nil || d.eligible(n))
}

func hasKeys(object *v1.Node, keys []string) bool {
	for _, key := range keys {
		if _, ok := object.Labels[key]; !ok {
			return false
		}
	}
	return true
}

// update follows a node whose object was set or taken away. Pods on the node must not be counted
// meanwhile.
func (d *domains) update(n *node) {
	for len(d.at) <= n.slot {
		d.at = append(d.at, none)
	}
	if number := d.at[n.slot]; number != none {
		d.at[n.slot] = none
		if d.nodes[number]--; d.nodes[number] == 0 {
			d.count--
			delete(d.numbers, d.values[number])
			d.values[number] = ""
			d.free = append(d.free, number)
		}
	}
	if !d.counts(n) {
		return
	}
	value := n.object.Labels[d.key]
	number, ok := d.numbers[value]
	if !ok {
		if last := len(d.free) - 1; last >= 0 {
			number, d.free = d.free[last], d.free[:last]
			d.values[number] = value
		} else {
			number = int32(len(d.values))
			d.values, d.nodes = append(d.values, value), append(d.nodes, 0)
		}
		d.numbers[value] = number
		d.count++
	}
	d.nodes[number]++
	d.at[n.slot] = number
}

// domainOf is the number of the domain that a node belongs to by its label, even if the node itself
// does not count; none if it has no label, or the only nodes with that value do not count.
func (d *domains) domainOf(n *node) int32 {
	if n.slot < len(d.at) && d.at[n.slot] != none {
		return d.at[n.slot]
	}
	if value, ok := n.object.Labels[d.key]; ok {
		if number, ok := d.numbers[value]; ok {
			return number
		}
	}
	return none
}

// A census counts pods in each of some domains.
type census struct {
	of       *domains
	pods     []int32 // by number of the domain
	total    int     // pods in all of them
	occupied int     // domains with any
	// levels[k] says how many domains have exactly k pods, k > 0; least is the first that is not 0.
	// Only kept where the emptiest domain matters.
	ranked bool
	levels []int32
	least  int
}

// count adds delta (+1 or -1) for a pod on n.
func (c *census) count(n *node, delta int32) {
	if n.slot >= len(c.of.at) {
		return
	}
	number := c.of.at[n.slot]
	if number == none {
		return
	}
	if int(number) >= len(c.pods) {
		c.pods = slices.Grow(c.pods, len(c.of.values)-len(c.pods))[:len(c.of.values)]
	}
	before := c.pods[number]
	after := before + delta
	c.pods[number] = after
	c.total += int(delta)
	switch {
	case before == 0:
		c.occupied++
	case after == 0:
		c.occupied--
	}
	if !c.ranked {
		return
	}
	for int(max(before, after)) >= len(c.levels) {
		c.levels = append(c.levels, 0)
	}
	if before > 0 {
		c.levels[before]--
	}
	if after > 0 {
		c.levels[after]++
		if c.least == 0 || int(after) < c.least {
			c.least = int(after)
		}
	}
	if c.occupied == 0 {
		c.least = 0
		return
	}
	for c.levels[c.least] == 0 {
		c.least++
	}
}

// in is how many pods there are in n's domain.
func (c *census) in(n *node) int {
	number := c.of.domainOf(n)
	if number == none || int(number) >= len(c.pods) {
		return 0
	}
	return int(c.pods[number])
}

// fewest is how many pods the emptiest domain has.
func (c *census) fewest() int {
	if c.occupied < c.of.count {
		return 0
	}
	return c.least
}
