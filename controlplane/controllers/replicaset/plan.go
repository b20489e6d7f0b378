// SPDX-License-Identifier: Apache-2.0

// Package replicaset keeps as many pods alive as a ReplicaSet asks for.
//
// Compute says how many pods to create or which to delete; Status counts what there is. Both are pure.
// The controller's expectations see to it that no decision is made from a cache that has not yet seen
// the outcome of the one before.
package replicaset

import (
	"slices"
	"sort"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller"
)

// Kind is how pods name their owner.
var Kind = appsv1.SchemeGroupVersion.WithKind("ReplicaSet")

// burst is how many pods one sync creates or deletes at most; the next sync continues.
const burst = 500

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	ReplicaSet *appsv1.ReplicaSet
	// Active are its pods that neither ended nor are being deleted, Terminating those being deleted.
	Active, Terminating []*corev1.Pod
	// Related are pods of all ReplicaSets with the same owner; read only when pods must be deleted.
	Related func() []*corev1.Pod
}

// Plan is what to do: create so many pods, or delete these.
type Plan struct {
	Create int
	Delete []*corev1.Pod
}

// Compute decides how to reach the ReplicaSet's size.
func Compute(s Snapshot, now time.Time) Plan {
	if s.ReplicaSet.DeletionTimestamp != nil {
		return Plan{}
	}
	excess := len(s.Active) - int(*s.ReplicaSet.Spec.Replicas)
	if excess <= 0 {
		return Plan{Create: min(-excess, burst)}
	}
	return Plan{Delete: leastWanted(s, min(excess, burst), now)}
}

// leastWanted picks n pods: those that do least first (unassigned, pending, unready), then cheaper ones by
// annotation, then those on nodes that run most of their kin, then the youngest and most often restarted.
func leastWanted(s Snapshot, n int, now time.Time) []*corev1.Pod {
	pods := slices.Clone(s.Active)
	if n >= len(pods) {
		return pods
	}
	onNode := map[string]int{}
	for _, pod := range s.Related() {
		if controller.IsPodActive(pod) {
			onNode[pod.Spec.NodeName]++
		}
	}
	rank := make([]int, len(pods))
	for i, pod := range pods {
		rank[i] = onNode[pod.Spec.NodeName]
	}
	sort.Sort(controller.ActivePodsWithRanks{Pods: pods, Rank: rank, Now: metav1.NewTime(now)})
	return pods[:n]
}

// Status counts pods. failure is why the last plan could not be carried out, if it could not.
// terminatingReplicas says that the API server stores the field of that name.
func Status(s Snapshot, failure error, terminatingReplicas bool, now time.Time) appsv1.ReplicaSetStatus {
	rs := s.ReplicaSet
	status := appsv1.ReplicaSetStatus{
		Replicas:           int32(len(s.Active)),
		ObservedGeneration: rs.Generation,
		Conditions:         slices.Clone(rs.Status.Conditions),
	}
	template := labels.SelectorFromSet(rs.Spec.Template.Labels)
	for _, pod := range s.Active {
		if template.Matches(labels.Set(pod.Labels)) {
			status.FullyLabeledReplicas++
		}
		if podutil.IsPodReady(pod) {
			status.ReadyReplicas++
			if podutil.IsPodAvailable(pod, rs.Spec.MinReadySeconds, metav1.NewTime(now)) {
				status.AvailableReplicas++
			}
		}
	}
	if terminatingReplicas {
		n := int32(len(s.Terminating))
		status.TerminatingReplicas = &n
	}

	at := slices.IndexFunc(status.Conditions, func(c appsv1.ReplicaSetCondition) bool { return c.Type == appsv1.ReplicaSetReplicaFailure })
	switch {
	case failure != nil && at < 0:
		reason := "FailedCreate"
		if len(s.Active) > int(*rs.Spec.Replicas) {
			reason = "FailedDelete"
		}
		status.Conditions = append(status.Conditions, appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue,
			LastTransitionTime: metav1.NewTime(now), Reason: reason, Message: failure.Error(),
		})
	case failure == nil && at >= 0:
		status.Conditions = slices.Delete(status.Conditions, at, at+1)
	}
	return status
}

// StatusChanged tells whether a status is worth a write.
func StatusChanged(old, cur appsv1.ReplicaSetStatus) bool {
	return !apiequality.Semantic.DeepEqual(old, cur)
}
