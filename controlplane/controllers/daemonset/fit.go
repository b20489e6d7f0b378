// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
)

// comparisonTolerations is off as in Kubernetes 1.36 (feature TaintTolerationComparisonOperators).
const comparisonTolerations = false

// fit is what decides whether a DaemonSet's pod belongs on a node, prepared once for all nodes. Room is not part of
// it: a pod that does not fit in waits on its node for room.
type fit struct {
	nodeName    string // empty: any
	required    nodeaffinity.RequiredNodeAffinity
	tolerations []corev1.Toleration
}

func newFit(ds *appsv1.DaemonSet) fit {
	spec := ds.Spec.Template.Spec // the tolerations that are added go into a slice of their own
	util.AddOrUpdateDaemonPodTolerations(&spec)
	return fit{
		nodeName:    spec.NodeName,
		required:    nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: spec}),
		tolerations: spec.Tolerations,
	}
}

// on tells whether a pod should be started on node, and whether one that is there may stay.
func (f *fit) on(node *corev1.Node) (start, stay bool) {
	if f.nodeName != "" && f.nodeName != node.Name {
		return false, false
	}
	// The API server validated the terms; one that does not parse matches no node.
	if matches, err := f.required.Match(node); err != nil || !matches {
		return false, false
	}
	if f.repelled(node, corev1.TaintEffectNoExecute) {
		return false, false
	}
	return !f.repelled(node, corev1.TaintEffectNoSchedule), true
}

func (f *fit) repelled(node *corev1.Node, effect corev1.TaintEffect) bool {
	_, repelled := corev1helpers.FindMatchingUntoleratedTaint(logr.Discard(), node.Spec.Taints, f.tolerations,
		func(taint *corev1.Taint) bool { return taint.Effect == effect }, comparisonTolerations)
	return repelled
}
