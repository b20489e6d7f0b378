// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Claims go by owner references (KEP 1847): one to the set makes the garbage collector delete a claim with the set,
// one to the pod makes it go with a pod that is scaled away. A pod that is only replaced must not own its claims.

var podKind = corev1.SchemeGroupVersion.WithKind("Pod")

// retention is the policy of a set; what it does not say is kept.
func retention(set *appsv1.StatefulSet) (whenDeleted, whenScaled appsv1.PersistentVolumeClaimRetentionPolicyType) {
	whenDeleted, whenScaled = appsv1.RetainPersistentVolumeClaimRetentionPolicyType, appsv1.RetainPersistentVolumeClaimRetentionPolicyType
	if policy := set.Spec.PersistentVolumeClaimRetentionPolicy; policy != nil {
		whenDeleted, whenScaled = policy.WhenDeleted, policy.WhenScaled
	}
	return whenDeleted, whenScaled
}

// names tells whether a reference names obj, or one of the same name before or after it.
func names(ref metav1.OwnerReference, obj metav1.Object, kind schema.GroupVersionKind) bool {
	return ref.APIVersion == kind.GroupVersion().String() && ref.Kind == kind.Kind && ref.Name == obj.GetName()
}

func isOther(refs []metav1.OwnerReference, obj metav1.Object, kind schema.GroupVersionKind) bool {
	return slices.ContainsFunc(refs, func(ref metav1.OwnerReference) bool { return names(ref, obj, kind) && ref.UID != obj.GetUID() })
}

// isStale tells whether a claim goes, or went, with an earlier pod of the same name.
func isStale(set *appsv1.StatefulSet, claim *corev1.PersistentVolumeClaim, pod *corev1.Pod) bool {
	_, whenScaled := retention(set)
	return whenScaled == appsv1.DeletePersistentVolumeClaimRetentionPolicyType && isOther(claim.OwnerReferences, pod, podKind)
}

// claimOwners are the owners that the policy wants for a pod's claim, and whether they must be written. A claim that
// belongs to an earlier set or pod of the same name is left alone. So is one that another controller manages, which
// is a conflict if set or pod own it as well: then they let go of it.
func claimOwners(set *appsv1.StatefulSet, claim *corev1.PersistentVolumeClaim, pod *corev1.Pod, wanted bool) (owners []metav1.OwnerReference, write, conflict bool) {
	refs := claim.OwnerReferences
	if isOther(refs, set, Kind) || isOther(refs, pod, podKind) {
		return refs, false, false
	}
	whenDeleted, whenScaled := retention(set)
	goesWithSet := whenDeleted == appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	goesWhenScaled := whenScaled == appsv1.DeletePersistentVolumeClaimRetentionPolicyType

	ofSet := goesWithSet && (wanted || !goesWhenScaled)
	ofPod := goesWhenScaled && !wanted
	isRight := true
	for _, ref := range refs {
		isController := ref.Controller != nil && *ref.Controller
		switch {
		case names(ref, set, Kind):
			isRight = isRight && isController
		case names(ref, pod, podKind):
			isRight = isRight && isController
		default:
			owners = append(owners, ref)
			conflict = conflict || isController && (goesWithSet || goesWhenScaled)
		}
	}
	if conflict {
		return owners, len(owners) != len(refs), true
	}
	hasSet := slices.ContainsFunc(refs, func(ref metav1.OwnerReference) bool { return names(ref, set, Kind) })
	hasPod := slices.ContainsFunc(refs, func(ref metav1.OwnerReference) bool { return names(ref, pod, podKind) })
	if isRight && hasSet == ofSet && hasPod == ofPod {
		return refs, false, false
	}
	if ofSet {
		owners = append(owners, *metav1.NewControllerRef(set, Kind))
	}
	if ofPod {
		owners = append(owners, *metav1.NewControllerRef(pod, podKind))
	}
	return owners, true, false
}
