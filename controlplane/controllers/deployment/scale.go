// SPDX-License-Identifier: Apache-2.0

package deployment

import (
	"sort"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
)

// resize plans a size and the annotations that remember for which Deployment size it was chosen: from them
// isScaling later sees that the user asked for another one.
func (p *planner) resize(rs *appsv1.ReplicaSet, size int32) {
	*rs.Spec.Replicas = size
	util.SetReplicasAnnotations(rs, *p.d.Spec.Replicas, *p.d.Spec.Replicas+util.MaxSurge(*p.d))
}

// everything is new and old ReplicaSets, in no particular order, with nil if there is no new one.
func (p *planner) everything() []*appsv1.ReplicaSet {
	return append(p.old[:len(p.old):len(p.old)], p.newRS)
}

// isScaling tells that the Deployment's size changed since its ReplicaSets got theirs.
func (p *planner) isScaling() bool {
	for _, rs := range controller.FilterActiveReplicaSets(p.everything()) {
		if desired, ok := util.GetDesiredReplicasAnnotation(logr.Discard(), rs); ok && desired != *p.d.Spec.Replicas {
			return true
		}
	}
	return false
}

// scale brings the sum of sizes to the Deployment's without moving the rollout forward. In the middle of a
// rollout each ReplicaSet gets its proportion, so that a broken new template does not profit from growth.
func (p *planner) scale() {
	want := *p.d.Spec.Replicas
	if only := util.FindActiveOrLatest(p.newRS, p.old); only != nil {
		// Even if the size happens to be right already, the annotations must say for whom; otherwise this
		// would look like a scaling for ever and the rollout would never go on.
		p.resize(only, want)
		return
	}
	if util.IsSaturated(p.d, p.newRS) {
		for _, rs := range controller.FilterActiveReplicaSets(p.old) {
			p.resize(rs, 0)
		}
		return
	}
	if util.IsRollingUpdate(p.d) {
		p.scaleProportionally()
	}
}

func (p *planner) scaleProportionally() {
	active := controller.FilterActiveReplicaSets(p.everything())
	allowed := int32(0)
	if *p.d.Spec.Replicas > 0 {
		allowed = *p.d.Spec.Replicas + util.MaxSurge(*p.d)
	}
	toAdd := allowed - util.GetReplicaCountForReplicaSets(active)
	// Largest first; among equals the newer one grows and the older one shrinks.
	if toAdd > 0 {
		sort.Sort(controller.ReplicaSetsBySizeNewer(active))
	} else if toAdd < 0 {
		sort.Sort(controller.ReplicaSetsBySizeOlder(active))
	}

	sizes, added := make([]int32, len(active)), int32(0)
	for i, rs := range active {
		share := util.GetReplicaSetProportion(logr.Discard(), rs, *p.d, toAdd, added)
		sizes[i] = *rs.Spec.Replicas + share
		added += share
	}
	if len(active) > 0 {
		// What rounding left over goes to the largest.
		sizes[0] = max(0, sizes[0]+toAdd-added)
	}
	for i, rs := range active {
		p.resize(rs, sizes[i])
	}
}

// rollingUpdate takes one step: grow the new ReplicaSet if surge allows, otherwise shrink old ones if
// availability allows. Both follow from sizes and from availability that is never newer than the truth.
func (p *planner) rollingUpdate() {
	p.findNew(true)
	if p.growNew() || p.shrinkOld() {
		return
	}
	if p.isComplete(&p.d.Status) {
		p.cleanUp()
	}
}

func (p *planner) growNew() bool {
	have, want := *p.newRS.Spec.Replicas, *p.d.Spec.Replicas
	if have < want {
		n, err := util.NewRSNewReplicas(p.d, p.everything(), p.newRS)
		if err != nil {
			return false
		}
		want = n
	}
	if have == want {
		return false
	}
	p.resize(p.newRS, want)
	return true
}

func (p *planner) shrinkOld() bool {
	old := controller.FilterActiveReplicaSets(p.old)
	if len(old) == 0 {
		return false
	}
	sort.Sort(controller.ReplicaSetsByCreationTimestamp(old))
	minAvailable := *p.d.Spec.Replicas - util.MaxUnavailable(*p.d)

	// Pods of the new ReplicaSet that are not yet available count as if they never would be.
	unavailableNew := *p.newRS.Spec.Replicas - lasting(p.newRS)
	spare := util.GetReplicaCountForReplicaSets(p.everything()) - minAvailable - unavailableNew
	if spare <= 0 {
		return false
	}

	// Unavailable old pods go first: they are worth nothing, and they would block the rollout for ever.
	shrunk := false
	for _, rs := range old {
		unavailable := *rs.Spec.Replicas - rs.Status.AvailableReplicas
		if n := min(spare, unavailable); n > 0 {
			p.resize(rs, *rs.Spec.Replicas-n)
			spare -= n
			shrunk = true
		}
	}

	available := lasting(p.newRS)
	for _, rs := range old {
		available += lasting(rs)
	}
	for _, rs := range old {
		if n := min(available-minAvailable, *rs.Spec.Replicas); n > 0 {
			p.resize(rs, *rs.Spec.Replicas-n)
			available -= n
			shrunk = true
		}
	}
	return shrunk
}

// lasting is how many of a ReplicaSet's pods are available and stay so. Pods that a smaller size has already
// given up may still be counted in its status until they are deleted: they promise nothing.
func lasting(rs *appsv1.ReplicaSet) int32 {
	return min(rs.Status.AvailableReplicas, *rs.Spec.Replicas)
}

// recreate lets every old pod end before it creates a new one.
func (p *planner) recreate() {
	shrunk := false
	for _, rs := range controller.FilterActiveReplicaSets(p.old) {
		p.resize(rs, 0)
		shrunk = true
	}
	if shrunk || p.oldPodsRun() {
		return
	}
	p.findNew(true)
	if *p.newRS.Spec.Replicas != *p.d.Spec.Replicas {
		p.resize(p.newRS, *p.d.Spec.Replicas)
	}
	if p.isComplete(&p.d.Status) {
		p.cleanUp()
	}
}

// oldPodsRun counts terminating pods too: two templates must never run at once.
func (p *planner) oldPodsRun() bool {
	if util.GetActualReplicaCountForReplicaSets(p.old) > 0 {
		return true
	}
	for uid, pods := range p.s.Pods {
		if p.newRS != nil && p.newRS.UID == uid {
			continue
		}
		for _, pod := range pods {
			if pod.Status.Phase != corev1.PodFailed && pod.Status.Phase != corev1.PodSucceeded {
				return true
			}
		}
	}
	return false
}

// cleanUp drops empty old ReplicaSets beyond the history limit, oldest revision first.
func (p *planner) cleanUp() {
	if !util.HasRevisionHistoryLimit(p.d) {
		return
	}
	var candidates []*appsv1.ReplicaSet
	for _, rs := range p.old {
		if rs.DeletionTimestamp == nil {
			candidates = append(candidates, rs)
		}
	}
	sort.Sort(util.ReplicaSetsByRevision(candidates))
	excess := len(candidates) - int(*p.d.Spec.RevisionHistoryLimit)
	for i := 0; i < excess; i++ {
		rs := candidates[i]
		if rs.Status.Replicas == 0 && *rs.Spec.Replicas == 0 && rs.Generation <= rs.Status.ObservedGeneration {
			p.toDelete = append(p.toDelete, rs)
		}
	}
}
