// SPDX-License-Identifier: Apache-2.0

// Package podgc deletes pods that nobody else will: ended ones beyond a number, those of nodes that are
// gone or declared out of service, and those deleted before they had a node.
package podgc

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// DefaultThreshold is how many ended pods are kept.
const DefaultThreshold = 12500

// Reason is why a pod is deleted.
type Reason string

// The reasons, named as upstream's metrics name them; None is no reason.
const (
	None         Reason = ""
	Orphaned     Reason = "orphaned"
	OutOfService Reason = "out-of-service"
	Unscheduled  Reason = "unscheduled"
)

// Judge decides about one pod. node is nil if there is none of the name that the pod has; gone says that this
// has been so for the quarantine, and that an uncached read agrees.
func Judge(pod *corev1.Pod, node *corev1.Node, gone bool) Reason {
	switch {
	case pod.Spec.NodeName == "":
		if pod.DeletionTimestamp != nil {
			return Unscheduled
		}
	case node == nil:
		if gone {
			return Orphaned
		}
	case pod.DeletionTimestamp != nil && isOutOfService(node):
		return OutOfService
	}
	return None
}

func isOutOfService(node *corev1.Node) bool {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return false
		}
	}
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService })
}

// IsEnded tells that a pod will never run again.
func IsEnded(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// Surplus picks the ended pods beyond threshold: evicted ones first, then the oldest.
func Surplus(ended []*corev1.Pod, threshold int) []*corev1.Pod {
	n := len(ended) - threshold
	if threshold <= 0 || n <= 0 {
		return nil
	}
	ended = slices.Clone(ended)
	slices.SortFunc(ended, func(a, b *corev1.Pod) int {
		if ea, eb := isEvicted(a), isEvicted(b); ea != eb {
			if ea {
				return -1
			}
			return 1
		}
		if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return ended[:n]
}

func isEvicted(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodFailed && pod.Status.Reason == "Evicted"
}

// Failed is a pod's status once it is known that nobody will ever report its end, or nil if it has ended.
func Failed(pod *corev1.Pod, reason Reason) *corev1.PodStatus {
	if IsEnded(pod) {
		return nil
	}
	status := pod.Status.DeepCopy()
	status.Phase = corev1.PodFailed
	if reason == Orphaned {
		// Others, such as Jobs, tell by this condition that the pod was not at fault.
		status.Conditions = slices.DeleteFunc(status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.DisruptionTarget })
		status.Conditions = append(status.Conditions, corev1.PodCondition{
			Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue,
			Reason: "DeletionByPodGC", Message: "PodGC: node no longer exists",
		})
	}
	return status
}
