// SPDX-License-Identifier: Apache-2.0

package eviction

import (
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Level is how much there is of something.
type Level struct {
	Available, Capacity int64
}

// Observed is what one look at the node shows; a signal that could not be read is missing.
type Observed struct {
	Now    time.Time
	Levels map[Signal]Level
}

// Policy says what must be left of a node.
type Policy struct {
	// Hard thresholds have pods evicted at once.
	Hard map[Signal]Threshold
	// Soft thresholds have pods evicted once they have been passed for Grace on end, which has all of their signals.
	Soft  map[Signal]Threshold
	Grace map[Signal]time.Duration
	// Transition is how long conditions outlast the shortage that called for them.
	Transition time.Duration
}

// State is what is kept from one look to the next.
type State struct {
	called map[corev1.NodeConditionType]time.Time // when each condition was last called for
	since  map[Signal]time.Time                   // since when a soft threshold is passed
}

// NewState is the state before the first look.
func NewState() *State {
	return &State{called: map[corev1.NodeConditionType]time.Time{}, since: map[Signal]time.Time{}}
}

// Shortage is a threshold that is passed.
type Shortage struct {
	Signal               Signal
	Threshold, Available int64
	Soft                 bool // pods may take their time
}

// Resource is what there is too little of, as events name it.
func (s Shortage) Resource() corev1.ResourceName { return about[s.Signal].resource }

// Look says for which thresholds pods are to be evicted now, the most urgent first, and which conditions the node has:
// those that a shortage calls for, soft ones from their first moment, and for the transition period afterwards, so that
// they do not flap.
func Look(o Observed, p Policy, state *State) (short []Shortage, conditions map[corev1.NodeConditionType]bool) {
	for _, s := range signals {
		l, known := o.Levels[s]
		if !known {
			continue // a soft threshold that was passed goes on being so
		}
		hard, soft := p.Hard[s].Of(l.Capacity), p.Soft[s].Of(l.Capacity)
		if l.Available >= soft {
			delete(state.since, s)
		} else if state.since[s].IsZero() {
			state.since[s] = o.Now
		}
		if l.Available < max(hard, soft) {
			state.called[about[s].condition] = o.Now
		}
		switch {
		case l.Available < hard:
			short = append(short, Shortage{Signal: s, Threshold: hard, Available: l.Available})
		case l.Available < soft && o.Now.Sub(state.since[s]) >= p.Grace[s]:
			short = append(short, Shortage{Signal: s, Threshold: soft, Available: l.Available, Soft: true})
		}
	}
	conditions = map[corev1.NodeConditionType]bool{}
	for c, at := range state.called {
		if !at.Before(o.Now) || o.Now.Sub(at) < p.Transition {
			conditions[c] = true
		}
	}
	return short, conditions
}

// Choose names the pod to evict for a shortage; nil if there is none that may be.
func Choose(s Shortage, pods []*Pod) *Eviction {
	list := make([]*Pod, 0, len(pods))
	for _, p := range pods {
		if !p.critical() {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		return nil
	}
	rank(list, s.Signal)
	return &Eviction{Pod: list[0].UID, Message: message(list[0], s.Signal, s.Threshold, s.Available)}
}
