// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/volume"
)

func keyOf(object *v1.PersistentVolumeClaim) types.NamespacedName {
	return types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
}

// onStorage runs change, wakes the pods that wait for volumes and care, and tells those whose volumes are being bound.
func (s *Scheduler) onStorage(change func(*storage), cares func(*pod) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.snapshot.storage)
	s.wakeForVolumes(cares)
	for _, w := range s.waits {
		if cares(w.pod) {
			w.poke()
		}
	}
}

func (s *Scheduler) wakeForVolumes(cares func(*pod) bool) {
	now := s.now()
	for _, item := range s.queue.watching {
		if item.blockers.has("VolumeBinding") && cares(item.pod) {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}

func (s *Scheduler) onClaim(_, after *v1.PersistentVolumeClaim) {
	s.onStorage(func(all *storage) { all.setClaim(after) }, func(p *pod) bool { return p.mounts(keyOf(after)) })
}

func (s *Scheduler) onClaimGone(object *v1.PersistentVolumeClaim) {
	s.onStorage(func(all *storage) { all.removeClaim(keyOf(object)) }, func(p *pod) bool { return p.mounts(keyOf(object)) })
}

func (s *Scheduler) onVolume(_, after *v1.PersistentVolume) {
	s.onStorage(func(all *storage) { all.setVolume(after) }, func(p *pod) bool { return s.snapshot.storage.mayUse(p, after) })
}

func (s *Scheduler) onVolumeGone(object *v1.PersistentVolume) {
	s.onStorage(func(all *storage) { all.removeVolume(object.Name) }, func(p *pod) bool { return s.snapshot.storage.mayUse(p, object) })
}

func (s *Scheduler) onClass(_, after *storagev1.StorageClass) {
	s.onStorage(func(all *storage) { all.classes[after.Name] = after }, func(p *pod) bool {
		return slices.ContainsFunc(p.claims, func(use claimUse) bool {
			claim := s.snapshot.storage.claim(use.key)
			return claim != nil && volume.GetPersistentVolumeClaimClass(claim) == after.Name
		})
	})
}

func (s *Scheduler) onClassGone(object *storagev1.StorageClass) {
	s.onStorage(func(all *storage) { delete(all.classes, object.Name) }, nobody)
}

// mayUse says whether a volume is, or could become, that of one of the pod's claims.
func (s *storage) mayUse(p *pod, object *v1.PersistentVolume) bool {
	ref := object.Spec.ClaimRef
	for i := range p.claims {
		claim := s.claim(p.claims[i].key)
		switch {
		case ref != nil && p.claims[i].key == (types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}):
			return true
		case claim == nil:
		case claim.Spec.VolumeName == object.Name:
			return true
		case claim.Spec.VolumeName == "" && ref == nil && volume.GetPersistentVolumeClaimClass(claim) == volume.GetPersistentVolumeClass(object):
			return true
		}
	}
	return false
}

func nobody(*pod) bool { return false }

func (p *pod) mounts(key types.NamespacedName) bool {
	for i := range p.claims {
		if p.claims[i].key == key {
			return true
		}
	}
	return false
}
