// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/component-helpers/storage/volume"
	"k8s.io/klog/v2"
	storageutil "k8s.io/kubernetes/pkg/apis/storage/util"
	"k8s.io/kubernetes/pkg/controller/volume/ephemeral"
	"k8s.io/kubernetes/pkg/controller/volume/persistentvolume"
	"k8s.io/kubernetes/pkg/controller/volume/pvcprotection"
	"k8s.io/kubernetes/pkg/controller/volume/pvprotection"
	"k8s.io/kubernetes/pkg/controller/volume/vacprotection"

	"skep.io/skep/controlplane/controllers/runner"
)

// bindingSyncPeriod is how often the binder looks at everything again, for what failed and left no event;
// it reads only memory. Upstream's 15 s are also how long a claim waits there for a volume that comes
// later; here the volume wakes it (wakingClaims).
const bindingSyncPeriod = time.Minute

// makeVolumeBinder binds claims to volumes. It has no plugins of its own: what is provisioned is provisioned, and
// deleted, by localpath or another provisioner that looks at the same annotations.
func makeVolumeBinder(ctx context.Context, e env) (run, error) {
	core, classes := e.cfg.Informers.Core().V1(), e.cfg.Informers.Storage().V1().StorageClasses()
	claims := &wakingClaims{
		PersistentVolumeClaimInformer: core.PersistentVolumeClaims(),
		queue:                         workqueue.NewTypedDelayingQueue[waking](),
	}
	c, err := persistentvolume.NewController(ctx, persistentvolume.ControllerParameters{
		KubeClient: e.deps.Client, SyncPeriod: bindingSyncPeriod, EnableDynamicProvisioning: true,
		VolumeInformer: core.PersistentVolumes(), ClaimInformer: claims, ClassInformer: classes,
		PodInformer: core.Pods(), NodeInformer: core.Nodes(),
	})
	if err != nil {
		return nil, fmt.Errorf("volume binder: %w", err)
	}
	onVolume := func(v *corev1.PersistentVolume) { claims.queue.Add(waking{kind: "volume", name: v.Name}) }
	onClass := func(class *storagev1.StorageClass) { claims.queue.Add(waking{kind: "class", name: class.Name}) }
	if _, err := runner.Watch(core.PersistentVolumes().Informer(), runner.Handlers[*corev1.PersistentVolume]{
		Add: onVolume, Update: func(_, v *corev1.PersistentVolume) { onVolume(v) },
	}); err != nil {
		return nil, err
	}
	if _, err := runner.Watch(classes.Informer(), runner.Handlers[*storagev1.StorageClass]{
		Add: onClass, Update: func(_, class *storagev1.StorageClass) { onClass(class) },
	}); err != nil {
		return nil, err
	}
	concerns := func(event waking) func(*corev1.PersistentVolumeClaim) bool {
		if event.kind == "volume" {
			if v, err := core.PersistentVolumes().Lister().Get(event.name); err == nil {
				return func(claim *corev1.PersistentVolumeClaim) bool { return awaitsVolume(claim, v) }
			}
		} else if class, err := classes.Lister().Get(event.name); err == nil {
			return func(claim *corev1.PersistentVolumeClaim) bool { return awaitsClass(claim, class) }
		}
		return nil // it is gone again
	}
	return blocking(func(ctx context.Context) {
		var waker sync.WaitGroup
		waker.Go(func() { claims.run(ctx, concerns) })
		c.Run(ctx)
		waker.Wait()
	}), nil
}

func makeClaimProtection(ctx context.Context, e env) (run, error) {
	core := e.cfg.Informers.Core().V1()
	c, err := pvcprotection.NewPVCProtectionController(klog.FromContext(ctx), core.PersistentVolumeClaims(), core.Pods(), e.deps.Client)
	if err != nil {
		return nil, fmt.Errorf("protection of claims: %w", err)
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 2) }), nil
}

func makeVolumeProtection(ctx context.Context, e env) (run, error) {
	c := pvprotection.NewPVProtectionController(klog.FromContext(ctx), e.cfg.Informers.Core().V1().PersistentVolumes(), e.deps.Client)
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

// makeAttributesProtection keeps VolumeAttributesClasses as long as claims and volumes are of them, and lets the others
// go: admission gives each a finalizer.
func makeAttributesProtection(ctx context.Context, e env) (run, error) {
	core, classes := e.cfg.Informers.Core().V1(), e.cfg.Informers.Storage().V1().VolumeAttributesClasses()
	c, err := vacprotection.NewVACProtectionController(klog.FromContext(ctx), e.deps.Client, core.PersistentVolumeClaims(), core.PersistentVolumes(), classes)
	if err != nil {
		return nil, fmt.Errorf("protection of volume attributes classes: %w", err)
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

// makeEphemeralVolumes makes the claims of pods' generic ephemeral volumes.
func makeEphemeralVolumes(ctx context.Context, e env) (run, error) {
	core := e.cfg.Informers.Core().V1()
	c, err := ephemeral.NewController(ctx, e.deps.Client, core.Pods(), core.PersistentVolumeClaims())
	if err != nil {
		return nil, fmt.Errorf("ephemeral volumes: %w", err)
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 2) }), nil
}

// wakingClaims gives the binder the claims of the shared informer, and shows it some of them again when something
// else has come that they waited for. Upstream leaves that to its clock.
type wakingClaims struct {
	coreinformers.PersistentVolumeClaimInformer
	binder cache.ResourceEventHandler // set before any event
	queue  workqueue.TypedDelayingInterface[waking]
}

// waking is what has come: whoever it concerns looks again, several times.
type waking struct {
	kind, name string
	time       int
}

// echoes are when claims are shown again. The binder works from a copy of the volumes that it makes on its own time, and
// does not say when that has caught up with the event; nearly always it has at once.
var echoes = [...]time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Second}

// Informer is the shared one, but it remembers who asks.
func (w *wakingClaims) Informer() cache.SharedIndexInformer {
	return rememberingInformer{w.PersistentVolumeClaimInformer.Informer(), &w.binder}
}

type rememberingInformer struct {
	cache.SharedIndexInformer
	handler *cache.ResourceEventHandler
}

func (i rememberingInformer) AddEventHandler(h cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	*i.handler = h
	return i.SharedIndexInformer.AddEventHandler(h)
}

// run wakes until ctx ends.
func (w *wakingClaims) run(ctx context.Context, concerns func(waking) func(*corev1.PersistentVolumeClaim) bool) {
	stop := context.AfterFunc(ctx, w.queue.ShutDown)
	defer stop()
	for {
		event, shutdown := w.queue.Get()
		if shutdown {
			return
		}
		if concerned := concerns(event); concerned != nil && w.wake(concerned) && event.time < len(echoes) {
			after := echoes[event.time]
			w.queue.AddAfter(waking{event.kind, event.name, event.time + 1}, after)
		}
		w.queue.Done(event)
	}
}

func (w *wakingClaims) wake(concerned func(*corev1.PersistentVolumeClaim) bool) (any bool) {
	claims, err := w.Lister().List(labels.Everything())
	if err != nil {
		return false // reads memory: cannot fail
	}
	for _, claim := range claims {
		if claim.Status.Phase != corev1.ClaimBound && concerned(claim) {
			w.binder.OnUpdate(claim, claim)
			any = true
		}
	}
	return any
}

// awaitsVolume says whether a claim that is not bound may be because of v. A volume that is free counts once it is
// called so, for only then the binder takes it.
func awaitsVolume(claim *corev1.PersistentVolumeClaim, v *corev1.PersistentVolume) bool {
	switch claim.Spec.VolumeName {
	case v.Name:
		return true
	case "":
		return v.Spec.ClaimRef == nil && v.Status.Phase == corev1.VolumeAvailable &&
			volume.GetPersistentVolumeClaimClass(claim) == volume.GetPersistentVolumeClass(v)
	}
	return false
}

// awaitsClass says whether a class decides about a claim that is not bound: by name, or because it may be the default
// that the claim still has to get.
func awaitsClass(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) bool {
	if claim.Spec.StorageClassName == nil && !metav1.HasAnnotation(claim.ObjectMeta, corev1.BetaStorageClassAnnotation) {
		return class.Annotations[storageutil.IsDefaultStorageClassAnnotation] == "true"
	}
	return volume.GetPersistentVolumeClaimClass(claim) == class.Name
}
