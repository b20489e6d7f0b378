// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"

	v1 "k8s.io/api/core/v1"
)

// A profile is how pods of one schedulerName are placed: which scores count how much, and what they ask.
// Filters are the same for all profiles, since they keep promises to other pods.
type profile struct {
	schedulerName string
	weights       [scoreCount]int64 // 0: the score is not asked
	// packs prefers nodes of which much is taken already, as MostAllocated does.
	packs bool
	// cpuWeight and memoryWeight are how much each counts in what is free, or taken.
	cpuWeight, memoryWeight int64
	// hardAffinity is what a pod near those that require it to be near counts.
	hardAffinity int64
	// spreads are the constraints of replicas that have none of their own; ownSpreads says that an administrator
	// chose them: nodes without their labels are then left out, as they are for a pod's own.
	spreads    []spreadDefault
	ownSpreads bool
}

// spreadDefault is a constraint that replicas get which have none.
type spreadDefault struct {
	maxSkew int32
	key     string
}

// Profiles are the profiles of one scheduler, by schedulerName.
type Profiles map[string]*profile

// DefaultProfiles are those without a configuration: one, with Kubernetes' defaults.
func DefaultProfiles() Profiles { return Profiles{Name: newProfile(Name)} }

func newProfile(schedulerName string) *profile {
	p := &profile{
		schedulerName: schedulerName, cpuWeight: 1, memoryWeight: 1, hardAffinity: 1,
		// Replicas spread over nodes, and more so over zones.
		spreads: []spreadDefault{{3, v1.LabelHostname}, {5, v1.LabelTopologyZone}},
	}
	for i := range scores {
		p.weights[i] = scores[i].weight
	}
	return p
}

// of is the profile of a pod; pods of another scheduler are seen as by the default one, as those are that only
// take room.
func (all Profiles) of(object *v1.Pod) *profile {
	if p := all[object.Spec.SchedulerName]; p != nil {
		return p
	}
	return fallback
}

// fallback is never changed.
var fallback = newProfile(Name)

// place in scores of the one with a name; -1 if there is none.
func scoreNamed(name string) int {
	return slices.IndexFunc(scores[:], func(s score) bool { return s.name == name })
}
