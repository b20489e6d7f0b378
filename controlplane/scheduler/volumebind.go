// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/component-helpers/storage/volume"
)

// bindingTimeout is how long volumes may take to be made and bound before the pod is looked at anew; upstream's default.
const bindingTimeout = 10 * time.Minute

var errStopping = errors.New("the scheduler stops")

// volumePlan is how the claims of a pod get their volumes on the node it goes to: the claims take volumes that
// exist, or the node is written on them and their class's provisioner makes volumes there.
type volumePlan struct {
	bind      []volumeBind
	provision []volumeMake
}

// volumeBind gives a volume to a claim. write is false where another pod's plan does it.
type volumeBind struct {
	claim  *v1.PersistentVolumeClaim
	volume *v1.PersistentVolume
	write  bool
}

// volumeMake has a claim's volume made. write is false where another pod's plan does it.
type volumeMake struct {
	claim *v1.PersistentVolumeClaim
	write bool
}

func (p *volumePlan) empty() bool { return len(p.bind) == 0 && len(p.provision) == 0 }

// assumed is an object as it will be once what was decided is written, which written says. Until an informer
// shows as much, decisions see it instead of the informer's.
type assumed[T metav1.Object] struct {
	object  T
	written bool
}

func (a *assumed[T]) seen(object T) bool { return a.written && !older(object, a.object) }

// older says whether a is known to be from before b.
func older(a, b metav1.Object) bool {
	order, err := resourceversion.CompareResourceVersion(a.GetResourceVersion(), b.GetResourceVersion())
	return err == nil && order < 0
}

// assumeVolumes makes the plan for a pod on a node, and has later decisions see it done: two pods must not take the
// same volume, and pods that share a claim must meet on its node.
func (s *storage) assumeVolumes(p *pod, n *v1.Node) (volumePlan, error) {
	resolved := s.resolve(p)
	plan, ok := s.plan(resolved.delayed, n)
	if !ok {
		return volumePlan{}, fmt.Errorf("node %s no longer suits the volumes of pod %s", n.Name, p.key)
	}
	for i := range plan.bind {
		b := &plan.bind[i]
		bound, changed, err := volume.GetBindVolumeToClaim(b.volume, b.claim)
		if err != nil {
			s.abandon(&plan)
			return volumePlan{}, err
		}
		if b.volume, b.write = bound, changed; changed {
			s.assumedVolumes[bound.Name] = &assumed[*v1.PersistentVolume]{object: bound}
		}
	}
	for i := range plan.provision {
		m := &plan.provision[i]
		if m.claim.Annotations[volume.AnnSelectedNode] == n.Name {
			continue // written, or being written, for a pod that shares it
		}
		m.claim, m.write = m.claim.DeepCopy(), true
		metav1.SetMetaDataAnnotation(&m.claim.ObjectMeta, volume.AnnSelectedNode, n.Name)
		s.assumedClaims[keyOf(m.claim)] = &assumed[*v1.PersistentVolumeClaim]{object: m.claim}
	}
	return plan, nil
}

// abandon takes back what the plan has assumed and nobody has written.
func (s *storage) abandon(plan *volumePlan) {
	for _, b := range plan.bind {
		if a := s.assumedVolumes[b.volume.Name]; a != nil && a.object == b.volume && !a.written {
			delete(s.assumedVolumes, b.volume.Name)
		}
	}
	for _, m := range plan.provision {
		if a := s.assumedClaims[keyOf(m.claim)]; a != nil && a.object == m.claim && !a.written {
			delete(s.assumedClaims, keyOf(m.claim))
		}
	}
}

// progress says whether the plan for a node is carried out, or why it will not be. It looks at what informers have
// shown, not at what is assumed.
func (s *storage) progress(plan *volumePlan, n *v1.Node) (done bool, err error) {
	done = true
	for _, b := range plan.bind {
		object, claim := s.volumes[b.volume.Name], s.claims[keyOf(b.claim)]
		switch {
		case object == nil:
			return false, fmt.Errorf("persistentvolume %q not found", b.volume.Name)
		case claim == nil:
			return false, fmt.Errorf("persistentvolumeclaim %q not found", b.claim.Name)
		case s.assumedVolumes[b.volume.Name] != nil:
			done = false
			continue
		case object.Spec.ClaimRef == nil || object.Spec.ClaimRef.UID == "":
			return false, fmt.Errorf("ClaimRef got reset for pv %q", object.Name)
		}
		if err := suits(object, n); err != nil {
			return false, err
		}
		done = done && isBound(claim)
	}
	for _, m := range plan.provision {
		key := keyOf(m.claim)
		claim := s.claims[key]
		switch {
		case claim == nil:
			return false, fmt.Errorf("persistentvolumeclaim %q not found", key.Name)
		case s.assumedClaims[key] != nil:
			done = false
			continue
		case claim.Annotations[volume.AnnSelectedNode] != n.Name:
			// So a provisioner says that it cannot make the volume there.
			return false, fmt.Errorf("provisioning failed for PVC %q", claim.Name)
		}
		if claim.Spec.VolumeName != "" {
			object := s.volumes[claim.Spec.VolumeName]
			if object == nil {
				done = false // its informer is behind
				continue
			}
			if err := suits(object, n); err != nil {
				return false, err
			}
		}
		done = done && isBound(claim)
	}
	return done, nil
}

func suits(object *v1.PersistentVolume, n *v1.Node) error {
	if err := volume.CheckNodeAffinity(object, n.Labels); err != nil {
		return fmt.Errorf("pv %q node affinity doesn't match node %q: %w", object.Name, n.Name, err)
	}
	return nil
}

func isBound(claim *v1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeName != "" && metav1.HasAnnotation(claim.ObjectMeta, volume.AnnBindCompleted)
}

// volumeWait is a pod that has a node and waits for its volumes.
type volumeWait struct {
	pod  *pod
	wake chan struct{}
}

func (w *volumeWait) poke() {
	select {
	case w.wake <- struct{}{}:
	default: // it has been told and not looked yet
	}
}

// bindVolumes carries out the plan and returns when all is bound. It gives its slot back while it waits, for a
// provisioner that is slow must not keep other pods from being bound.
func (s *Scheduler) bindVolumes(p *pod, plan *volumePlan, nodeName string) error {
	if err := s.writeVolumes(p, plan); err != nil {
		return err
	}
	w := &volumeWait{pod: p, wake: make(chan struct{}, 1)}
	s.mu.Lock()
	s.waits[p.uid] = w
	s.mu.Unlock()
	<-s.slots
	defer func() {
		s.mu.Lock()
		delete(s.waits, p.uid)
		s.mu.Unlock()
		s.slots <- struct{}{}
	}()
	timer := time.NewTimer(bindingTimeout)
	defer timer.Stop()
	for {
		if done, err := s.volumesBound(p, plan, nodeName); done || err != nil {
			return err
		}
		select {
		case <-w.wake:
		case <-timer.C:
			return fmt.Errorf("volumes are not bound after %v", bindingTimeout)
		case <-s.stopping:
			return errStopping
		}
	}
}

func (s *Scheduler) volumesBound(p *pod, plan *volumePlan, nodeName string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.snapshot.byName[nodeName]
	switch {
	case s.snapshot.pods[p.uid] != p:
		return false, errors.New("pod does not exist any more")
	case n == nil || n.object == nil:
		return false, fmt.Errorf("node %q not found", nodeName)
	}
	return s.snapshot.storage.progress(plan, n.object)
}

// writeVolumes writes what the plan has assumed. What it has written when it fails stays: the next attempt goes on
// from there.
func (s *Scheduler) writeVolumes(p *pod, plan *volumePlan) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	defer func() {
		if err == nil {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.snapshot.storage.abandon(plan)
		s.wakeForVolumes(func(*pod) bool { return true }) // what was kept for this pod is free
		for _, w := range s.waits {
			w.poke() // it may have relied on the write
		}
	}()
	all := s.snapshot.storage
	for i := range plan.bind {
		b := &plan.bind[i]
		if !b.write {
			continue
		}
		written, err := s.client.CoreV1().PersistentVolumes().Update(ctx, b.volume, metav1.UpdateOptions{})
		if err != nil {
			return err
		}
		s.mu.Lock()
		settle(all.assumedVolumes, written.Name, b.volume, written, all.volumes[written.Name])
		s.mu.Unlock()
	}
	for i := range plan.provision {
		m := &plan.provision[i]
		if !m.write {
			continue
		}
		written, err := s.client.CoreV1().PersistentVolumeClaims(m.claim.Namespace).Update(ctx, m.claim, metav1.UpdateOptions{})
		if err != nil {
			return err
		}
		s.mu.Lock()
		settle(all.assumedClaims, keyOf(written), m.claim, written, all.claims[keyOf(written)])
		s.mu.Unlock()
	}
	s.log.Debug("volumes are being bound", "pod", p.key, "bind", len(plan.bind), "provision", len(plan.provision))
	return nil
}

// settle notes that what was assumed is written, or forgets it if an informer has shown so already.
func settle[K comparable, T interface {
	comparable
	metav1.Object
}](all map[K]*assumed[T], key K, was, written, shown T) {
	a := all[key]
	if a == nil || a.object != was {
		return
	}
	a.object, a.written = written, true
	if none := *new(T); shown != none && a.seen(shown) {
		delete(all, key)
	}
}

// pokeWait tells a pod that waits for volumes that something else than volumes has changed.
func (s *Scheduler) pokeWait(uid types.UID) {
	if w := s.waits[uid]; w != nil {
		w.poke()
	}
}
