// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/types"
)

func keyOf(object *v1.PersistentVolumeClaim) types.NamespacedName {
	return types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
}

// onStorage runs change and wakes the pods that wait for volumes and care.
func (s *Scheduler) onStorage(change func(*storage), cares func(*pod) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.snapshot.storage)
	now := s.now()
	for _, item := range s.queue.watching {
		if item.blockers.has("VolumeBinding") && cares(item.pod) {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}

func (s *Scheduler) onClaim(_, after *v1.PersistentVolumeClaim) {
	s.onStorage(func(all *storage) { all.claims[keyOf(after)] = after }, func(p *pod) bool { return p.mounts(keyOf(after)) })
}

func (s *Scheduler) onClaimGone(object *v1.PersistentVolumeClaim) {
	s.onStorage(func(all *storage) { delete(all.claims, keyOf(object)) }, nobody)
}

func (s *Scheduler) onVolume(_, after *v1.PersistentVolume) {
	s.onStorage(func(all *storage) { all.volumes[after.Name] = after }, func(p *pod) bool {
		ref := after.Spec.ClaimRef
		return ref == nil || p.mounts(types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name})
	})
}

func (s *Scheduler) onVolumeGone(object *v1.PersistentVolume) {
	s.onStorage(func(all *storage) { delete(all.volumes, object.Name) }, nobody)
}

func (s *Scheduler) onClass(_, after *storagev1.StorageClass) {
	s.onStorage(func(all *storage) { all.classes[after.Name] = after }, func(*pod) bool { return true })
}

func (s *Scheduler) onClassGone(object *storagev1.StorageClass) {
	s.onStorage(func(all *storage) { delete(all.classes, object.Name) }, nobody)
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
