// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
)

const (
	reasonUnboundClaims = "pod has unbound immediate PersistentVolumeClaims"
	reasonVolumeNode    = "node(s) didn't match PersistentVolume's node affinity"
	reasonVolumeNone    = "node(s) didn't find available persistent volumes to bind"
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

	// open are the volumes that nobody has claimed, by class; held names the volume that says it is a claim's.
	open map[string]map[string]bool
	held map[types.NamespacedName]string
	// What was decided and is not seen yet; decisions believe it.
	assumedClaims  map[types.NamespacedName]*assumed[*v1.PersistentVolumeClaim]
	assumedVolumes map[string]*assumed[*v1.PersistentVolume]
}

func newStorage() *storage {
	return &storage{
		claims: map[types.NamespacedName]*v1.PersistentVolumeClaim{}, volumes: map[string]*v1.PersistentVolume{},
		classes: map[string]*storagev1.StorageClass{}, users: map[types.NamespacedName]int{},
		open: map[string]map[string]bool{}, held: map[types.NamespacedName]string{},
		assumedClaims:  map[types.NamespacedName]*assumed[*v1.PersistentVolumeClaim]{},
		assumedVolumes: map[string]*assumed[*v1.PersistentVolume]{},
	}
}

func (s *storage) claim(key types.NamespacedName) *v1.PersistentVolumeClaim {
	if a := s.assumedClaims[key]; a != nil {
		return a.object
	}
	return s.claims[key]
}

func (s *storage) volume(name string) *v1.PersistentVolume {
	if a := s.assumedVolumes[name]; a != nil {
		return a.object
	}
	return s.volumes[name]
}

func (s *storage) setClaim(object *v1.PersistentVolumeClaim) {
	key := keyOf(object)
	s.claims[key] = object
	if a := s.assumedClaims[key]; a != nil && a.seen(object) {
		delete(s.assumedClaims, key)
	}
}

func (s *storage) removeClaim(key types.NamespacedName) {
	delete(s.claims, key)
	delete(s.assumedClaims, key)
}

func (s *storage) setVolume(object *v1.PersistentVolume) {
	s.index(s.volumes[object.Name], false)
	s.volumes[object.Name] = object
	s.index(object, true)
	if a := s.assumedVolumes[object.Name]; a != nil && a.seen(object) {
		delete(s.assumedVolumes, object.Name)
	}
}

func (s *storage) removeVolume(name string) {
	s.index(s.volumes[name], false)
	delete(s.volumes, name)
	delete(s.assumedVolumes, name)
}

// index enters a volume into open and held, or takes it out of them.
func (s *storage) index(object *v1.PersistentVolume, in bool) {
	if object == nil {
		return
	}
	if ref := object.Spec.ClaimRef; ref != nil {
		key := types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}
		if in {
			s.held[key] = object.Name
		} else if s.held[key] == object.Name {
			delete(s.held, key)
		}
		return
	}
	class := volume.GetPersistentVolumeClass(object)
	switch names := s.open[class]; {
	case in && names == nil:
		s.open[class] = map[string]bool{object.Name: true}
	case in:
		names[object.Name] = true
	default:
		if delete(names, object.Name); len(names) == 0 {
			delete(s.open, class)
		}
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
	fault   string   // in upstream's words, why no node will do now
	bound   []string // names of PersistentVolumes
	delayed []delayedClaim
	alone   []types.NamespacedName
}

// delayedClaim is bound once a pod that mounts it has a node.
type delayedClaim struct {
	claim *v1.PersistentVolumeClaim
	// node is where its volume is being made already.
	node string
	// candidates are the volumes that it may take, unless node is set.
	candidates []*v1.PersistentVolume
}

// resolve follows upstream's order: what is wrong with the first claim is told.
func (s *storage) resolve(p *pod) (v podVolumes) {
	unbound := false
	for i := range p.claims {
		use := &p.claims[i]
		claim := s.claim(use.key)
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
		case !slices.ContainsFunc(v.delayed, func(d delayedClaim) bool { return d.claim == claim }):
			v.delayed = append(v.delayed, s.delayed(use.key, claim))
		}
	}
	if unbound {
		v.fault = reasonUnboundClaims
	}
	// The smallest first, as upstream: it must not end up with the volume that only fits the largest.
	slices.SortStableFunc(v.delayed, func(a, b delayedClaim) int {
		x, y := a.claim.Spec.Resources.Requests[v1.ResourceStorage], b.claim.Spec.Resources.Requests[v1.ResourceStorage]
		return x.Cmp(y)
	})
	return v
}

func (s *storage) delayed(key types.NamespacedName, claim *v1.PersistentVolumeClaim) delayedClaim {
	d := delayedClaim{claim: claim, node: claim.Annotations[volume.AnnSelectedNode]}
	if d.node != "" {
		return d
	}
	class := volume.GetPersistentVolumeClaimClass(claim)
	names := slices.Sorted(maps.Keys(s.open[class]))
	if held := s.held[key]; held != "" && volume.GetPersistentVolumeClass(s.volume(held)) == class {
		names = append(names, held)
	}
	for _, name := range names {
		d.candidates = append(d.candidates, s.volume(name))
	}
	return d
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

// volumeBinding keeps a pod where its bound volumes can be mounted, and where there are, or can be made, volumes for its
// claims that wait for its node.
func volumeBinding(q *query, n *node, why []string) (verdict, []string) {
	v := q.podVolumes()
	if v.fault != "" {
		return unresolvable, append(why, v.fault)
	}
	had := len(why)
	gone := false
	for _, name := range v.bound {
		object := q.snapshot.storage.volume(name)
		if gone = object == nil; gone {
			break
		}
		if volume.CheckNodeAffinity(object, n.object.Labels) != nil {
			why = append(why, reasonVolumeNode)
			break
		}
	}
	if len(v.delayed) > 0 {
		if _, ok := q.snapshot.storage.plan(v.delayed, n.object); !ok {
			why = append(why, reasonVolumeNone)
		}
	}
	if gone {
		why = append(why, reasonVolumeGone)
	}
	if len(why) > had {
		return unresolvable, why
	}
	return fits, why
}

// plan says how claims would get volumes on a node, if they can.
func (s *storage) plan(claims []delayedClaim, n *v1.Node) (plan volumePlan, ok bool) {
	var missing []*v1.PersistentVolumeClaim
	for i := range claims {
		if claims[i].node != "" {
			if claims[i].node != n.Name {
				return plan, false
			}
			missing = append(missing, claims[i].claim)
		}
	}
	chosen := map[string]*v1.PersistentVolume{}
	for i := range claims {
		if claims[i].node != "" {
			continue
		}
		// Volume attributes classes are always on since Kubernetes 1.36. A selector that does not parse matches nothing.
		found, err := volume.FindMatchingVolume(claims[i].claim, claims[i].candidates, n, chosen, true, true)
		if err != nil {
			return plan, false
		}
		if found == nil {
			missing = append(missing, claims[i].claim)
			continue
		}
		chosen[found.Name] = found
		plan.bind = append(plan.bind, volumeBind{claim: claims[i].claim, volume: found})
	}
	for _, claim := range missing {
		class := s.classes[volume.GetPersistentVolumeClaimClass(claim)]
		if class == nil || class.Provisioner == "" || class.Provisioner == volume.NotSupportedProvisioner ||
			!v1helper.MatchTopologySelectorTerms(class.AllowedTopologies, n.Labels) {
			return plan, false
		}
		plan.provision = append(plan.provision, volumeMake{claim: claim})
	}
	return plan, true
}

// podVolumes resolves them once a query.
func (q *query) podVolumes() *podVolumes {
	if !q.volumesResolved && len(q.pod.claims) > 0 {
		q.volumes = q.snapshot.storage.resolve(q.pod)
	}
	q.volumesResolved = true
	return &q.volumes
}
