// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"slices"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"
)

const (
	reasonUnboundClaims = "pod has unbound immediate PersistentVolumeClaims"
	reasonVolumeNode    = "node(s) didn't match PersistentVolume's node affinity"
	reasonVolumeGone    = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"
	reasonVolumeInUse   = "node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod"
)

// claimUse is a PersistentVolumeClaim that a pod mounts.
type claimUse struct {
	key types.NamespacedName
	// ephemeral: the claim is made for this pod alone, and must be its own.
	ephemeral bool
}

func claimsOf(object *v1.Pod) []claimUse {
	var claims []claimUse
	for i := range object.Spec.Volumes {
		source := &object.Spec.Volumes[i]
		switch {
		case source.PersistentVolumeClaim != nil:
			claims = append(claims, claimUse{key: types.NamespacedName{Namespace: object.Namespace, Name: source.PersistentVolumeClaim.ClaimName}})
		case source.Ephemeral != nil:
			claims = append(claims, claimUse{types.NamespacedName{Namespace: object.Namespace, Name: ephemeral.VolumeClaimName(object, source)}, true})
		}
	}
	return claims
}

// storage is what decisions know of volumes; the objects are shared with informers.
type storage struct {
	claims  map[types.NamespacedName]*v1.PersistentVolumeClaim
	volumes map[string]*v1.PersistentVolume
	classes map[string]*storagev1.StorageClass
	users   map[types.NamespacedName]int // placed pods that mount a claim
}

func newStorage() *storage {
	return &storage{
		claims: map[types.NamespacedName]*v1.PersistentVolumeClaim{}, volumes: map[string]*v1.PersistentVolume{},
		classes: map[string]*storagev1.StorageClass{}, users: map[types.NamespacedName]int{},
	}
}

func (s *storage) count(p *pod, delta int) {
	for i := range p.claims {
		key := p.claims[i].key
		if s.users[key] += delta; s.users[key] == 0 {
			delete(s.users, key)
		}
	}
}

// podVolumes is what a pod's claims come to, whatever the node.
type podVolumes struct {
	fault string   // in upstream's words, why no node will do now
	bound []string // names of PersistentVolumes
	alone []types.NamespacedName
}

// resolve follows upstream's order: what is wrong with the first claim is told.
func (s *storage) resolve(p *pod) (v podVolumes) {
	unbound := false
	for i := range p.claims {
		use := &p.claims[i]
		claim := s.claims[use.key]
		switch {
		case claim == nil && use.ephemeral:
			v.fault = fmt.Sprintf("waiting for ephemeral volume controller to create the persistentvolumeclaim %q", use.key.Name)
		case claim == nil:
			v.fault = fmt.Sprintf("persistentvolumeclaim %q not found", use.key.Name)
		case claim.Status.Phase == v1.ClaimLost:
			v.fault = fmt.Sprintf("persistentvolumeclaim %q bound to non-existent persistentvolume %q", claim.Name, claim.Spec.VolumeName)
		case claim.DeletionTimestamp != nil:
			v.fault = fmt.Sprintf("persistentvolumeclaim %q is being deleted", claim.Name)
		case use.ephemeral:
			if err := ephemeral.VolumeIsForPod(p.object, claim); err != nil {
				v.fault = err.Error()
			}
		}
		if v.fault != "" {
			return v
		}
		if slices.Contains(claim.Spec.AccessModes, v1.ReadWriteOncePod) && !use.ephemeral {
			v.alone = append(v.alone, use.key)
		}
		switch {
		case claim.Spec.VolumeName != "" && metav1.HasAnnotation(claim.ObjectMeta, volume.AnnBindCompleted):
			v.bound = append(v.bound, claim.Spec.VolumeName)
		case claim.Spec.VolumeName != "" || !s.waits(claim):
			unbound = true
		}
	}
	if unbound {
		v.fault = reasonUnboundClaims
	}
	return v
}

// waits says whether a claim is bound only once a pod that uses it has a node.
func (s *storage) waits(claim *v1.PersistentVolumeClaim) bool {
	class := s.classes[volume.GetPersistentVolumeClaimClass(claim)]
	return class != nil && class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
}

// volumeRestrictions keeps a ReadWriteOncePod claim for one pod.
func volumeRestrictions(q *query, _ *node, why []string) (verdict, []string) {
	for _, key := range q.podVolumes().alone {
		if q.snapshot.storage.users[key] > 0 {
			return rejected, append(why, reasonVolumeInUse)
		}
	}
	return fits, why
}

// volumeBinding keeps a pod where its bound volumes can be mounted.
func volumeBinding(q *query, n *node, why []string) (verdict, []string) {
	v := q.podVolumes()
	if v.fault != "" {
		return unresolvable, append(why, v.fault)
	}
	for _, name := range v.bound {
		object := q.snapshot.storage.volumes[name]
		if object == nil {
			return unresolvable, append(why, reasonVolumeGone)
		}
		if volume.CheckNodeAffinity(object, n.object.Labels) != nil {
			return unresolvable, append(why, reasonVolumeNode)
		}
	}
	return fits, why
}

// podVolumes resolves them once a query.
func (q *query) podVolumes() *podVolumes {
	if !q.volumesResolved && len(q.pod.claims) > 0 {
		q.volumes = q.snapshot.storage.resolve(q.pod)
	}
	q.volumesResolved = true
	return &q.volumes
}
