// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/controller"
)

// Ordinal is the number in the name of a pod of set; there is none if the pod is not called like one of the set's.
func Ordinal(set *appsv1.StatefulSet, pod *corev1.Pod) (n int, ok bool) {
	digits, ok := strings.CutPrefix(pod.Name, set.Name+"-")
	if !ok {
		return 0, false
	}
	parsed, err := strconv.Atoi(digits)
	// web--1, web-+1 and web-01 are names that no pod of web has.
	if err != nil || podName(set, parsed) != pod.Name || parsed < 0 {
		return 0, false
	}
	return parsed, true
}

func podName(set *appsv1.StatefulSet, ordinal int) string {
	return fmt.Sprintf("%s-%d", set.Name, ordinal)
}

func startOrdinal(set *appsv1.StatefulSet) int {
	if set.Spec.Ordinals == nil {
		return 0
	}
	return int(set.Spec.Ordinals.Start)
}

func inRange(set *appsv1.StatefulSet, ordinal int) bool {
	start := startOrdinal(set)
	return ordinal >= start && ordinal < start+int(*set.Spec.Replicas)
}

// revisionOf names the revision that a pod was made from.
func revisionOf(pod *corev1.Pod) string { return pod.Labels[appsv1.StatefulSetRevisionLabel] }

// newPod is the pod of a number, made from a revision.
func newPod(set *appsv1.StatefulSet, revision Revision, ordinal int) *corev1.Pod {
	// The only error is an owner without metadata.
	pod, _ := controller.GetPodFromTemplate(revision.Template, set, metav1.NewControllerRef(set, Kind))
	pod.Name, pod.Namespace = podName(set, ordinal), set.Namespace
	identify(pod, ordinal)
	pod.Labels[appsv1.StatefulSetRevisionLabel] = revision.Name
	// DNS knows the pod by these; they never change afterwards.
	pod.Spec.Hostname, pod.Spec.Subdomain = pod.Name, set.Spec.ServiceName
	pod.Spec.Volumes = volumes(set, pod.Spec.Volumes, ordinal)
	return pod
}

func identify(pod *corev1.Pod, ordinal int) {
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Labels[appsv1.StatefulSetPodNameLabel] = pod.Name
	pod.Labels[appsv1.PodIndexLabel] = strconv.Itoa(ordinal)
}

// mend is pod with its identity and its claims restored; nil if nothing is wrong with it.
func mend(set *appsv1.StatefulSet, pod *corev1.Pod, ordinal int) *corev1.Pod {
	if pod.Labels[appsv1.StatefulSetPodNameLabel] == pod.Name && hasStorage(set, pod, ordinal) {
		return nil
	}
	mended := pod.DeepCopy()
	identify(mended, ordinal)
	if !hasStorage(set, pod, ordinal) {
		mended.Spec.Volumes = volumes(set, mended.Spec.Volumes, ordinal)
	}
	return mended
}

func hasStorage(set *appsv1.StatefulSet, pod *corev1.Pod, ordinal int) bool {
	for i, template := range set.Spec.VolumeClaimTemplates {
		if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
			return v.Name == template.Name && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claimName(set, i, ordinal)
		}) {
			return false
		}
	}
	return true
}

// volumes are those of a pod's template, with the pod's own claims in place of any of the same name.
func volumes(set *appsv1.StatefulSet, ofTemplate []corev1.Volume, ordinal int) []corev1.Volume {
	var all []corev1.Volume
	claimed := map[string]bool{}
	for i, template := range set.Spec.VolumeClaimTemplates {
		claimed[template.Name] = true
		all = append(all, corev1.Volume{Name: template.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claimName(set, i, ordinal)},
		}})
	}
	for _, volume := range ofTemplate {
		if !claimed[volume.Name] {
			all = append(all, volume)
		}
	}
	return all
}

// claimName is how the claim of a pod's number is called that is made from the i-th template.
func claimName(set *appsv1.StatefulSet, i, ordinal int) string {
	return fmt.Sprintf("%s-%s-%d", set.Spec.VolumeClaimTemplates[i].Name, set.Name, ordinal)
}

// newClaim is a claim for a pod that is wanted. The set owns it if it is to go with the set.
func newClaim(set *appsv1.StatefulSet, i, ordinal int) *corev1.PersistentVolumeClaim {
	claim := set.Spec.VolumeClaimTemplates[i].DeepCopy()
	claim.Name, claim.Namespace = claimName(set, i, ordinal), set.Namespace
	if claim.Labels == nil {
		claim.Labels = map[string]string{}
	}
	maps.Copy(claim.Labels, set.Spec.Selector.MatchLabels)
	if whenDeleted, _ := retention(set); whenDeleted == appsv1.DeletePersistentVolumeClaimRetentionPolicyType {
		claim.OwnerReferences = append(claim.OwnerReferences, *metav1.NewControllerRef(set, Kind))
	}
	return claim
}
