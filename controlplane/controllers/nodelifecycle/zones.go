// SPDX-License-Identifier: Apache-2.0

package nodelifecycle

import (
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/node/topology"
)

// State of a zone decides how fast its nodes' pods may be evicted.
type State int

// The states of a zone: well, many nodes gone, all nodes gone.
const (
	Normal State = iota
	PartialDisruption
	FullDisruption
)

const (
	// evictionRate is how many nodes a second and zone may lose their pods; slowRate in a large zone under
	// partial disruption. In a small one nobody is evicted then.
	evictionRate = 0.1
	slowRate     = 0.01
	largeZone    = 50
	// unhealthyShare of a zone's nodes, and more than two of them, make a partial disruption.
	unhealthyShare = 0.55
)

// excludeLabel takes a node out of the count of disrupted nodes.
const excludeLabel = "node.kubernetes.io/exclude-disruption"

// ZoneState judges a zone by how many of its nodes are ready.
func ZoneState(ready, notReady int) State {
	switch {
	case ready == 0 && notReady > 0:
		return FullDisruption
	case notReady > 2 && float64(notReady)/float64(ready+notReady) >= unhealthyShare:
		return PartialDisruption
	default:
		return Normal
	}
}

// EvictionRate is how many nodes of a zone a second may get a NoExecute taint.
func EvictionRate(state State, nodes int, allDisrupted bool) rate.Limit {
	switch {
	case allDisrupted:
		return 0
	case state != PartialDisruption:
		return evictionRate
	case nodes > largeZone:
		return slowRate
	default:
		return 0
	}
}

// zones counts nodes by zone. Its methods are called with the controller's lock held.
type zones struct {
	nodes map[string]nodeState
	zones map[string]*zone
}

// nodeState is how a node was counted; the zero one of a node that was not.
type nodeState struct {
	counted bool
	zone    string
	ready   bool
}

type zone struct {
	ready, notReady int
	limiter         *rate.Limiter
}

func newZones() *zones {
	return &zones{nodes: map[string]nodeState{}, zones: map[string]*zone{}}
}

// set records a node and reports whether that changed what may be done to any node.
func (z *zones) set(node *corev1.Node, now time.Time) bool {
	c := conditionOf(node, corev1.NodeReady)
	_, excluded := node.Labels[excludeLabel]
	cur := nodeState{counted: !excluded, zone: topology.GetZoneKey(node), ready: c != nil && c.Status == corev1.ConditionTrue}
	if z.nodes[node.Name] == cur {
		return false
	}
	return z.change(now, func() {
		z.count(z.nodes[node.Name], -1)
		z.nodes[node.Name] = cur
		z.count(cur, +1)
	})
}

func (z *zones) remove(name string, now time.Time) bool {
	return z.change(now, func() {
		z.count(z.nodes[name], -1)
		delete(z.nodes, name)
	})
}

func (z *zones) count(n nodeState, by int) {
	if !n.counted {
		return
	}
	if z.zones[n.zone] == nil {
		z.zones[n.zone] = &zone{limiter: rate.NewLimiter(evictionRate, 1)}
	}
	if n.ready {
		z.zones[n.zone].ready += by
	} else {
		z.zones[n.zone].notReady += by
	}
}

// change applies f and adjusts the zones' rates; it reports whether a rate or the disruption of all changed.
func (z *zones) change(now time.Time, f func()) bool {
	before := z.allDisrupted()
	f()
	all := z.allDisrupted()
	changed := before != all
	for _, zone := range z.zones {
		limit := EvictionRate(ZoneState(zone.ready, zone.notReady), zone.ready+zone.notReady, all)
		if zone.limiter.Limit() != limit {
			zone.limiter.SetLimitAt(now, limit)
			changed = true
		}
	}
	return changed
}

// allDisrupted tells that every zone has lost all its nodes.
func (z *zones) allDisrupted() bool {
	any := false
	for _, zone := range z.zones {
		if zone.ready > 0 {
			return false
		}
		any = any || zone.notReady > 0
	}
	return any
}

// mayEvict takes one eviction from the zone's allowance or says how long to wait for it; wait is negative if
// only a change of the zone's state can bring one.
func (z *zones) mayEvict(node string, now time.Time) (ok bool, wait time.Duration) {
	zone := z.zones[z.nodes[node].zone]
	if zone == nil {
		// All nodes of the zone are excluded from the count, so nothing bounds it.
		return true, 0
	}
	if zone.limiter.Limit() == 0 {
		return false, -1
	}
	r := zone.limiter.ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
		return false, wait
	}
	return true, 0
}
