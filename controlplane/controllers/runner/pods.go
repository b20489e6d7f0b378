// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"fmt"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/controller"
)

// Pods are the pods that objects of one kind own: who is woken by their events, and who adopts them.
type Pods[T metav1.Object] struct {
	Kind  schema.GroupVersionKind
	Queue *Queue
	// Expectations learn which creations and deletions were seen; nil if the controller has none.
	Expectations *controller.UIDTrackingControllerExpectations
	Control      controller.PodControlInterface
	// Indexer is the pod informer's, with controller.AddPodControllerIndexer's index.
	Indexer cache.Indexer
	// Cached finds an owner in the cache, Fresh reads it from the API.
	Cached func(namespace, name string) (T, error)
	Fresh  func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (T, error)
	// Member, if set, says which pods owner may have beyond what its selector says.
	Member func(owner T, pod *corev1.Pod) bool
	// Matching are the owners whose selector fits a pod; an error stands for none.
	Matching func(pod *corev1.Pod) ([]T, error)
}

// NewPods indexes the pods of the shared informer by owner and fills in what is alike for every kind. How owners are
// found is the caller's to add.
func NewPods[T metav1.Object](deps Deps, kind schema.GroupVersionKind, queue *Queue, recorder record.EventRecorder) (Pods[T], error) {
	informer := deps.Informers.Core().V1().Pods().Informer()
	if err := controller.AddPodControllerIndexer(informer); err != nil {
		return Pods[T]{}, fmt.Errorf("index pods by owner: %w", err)
	}
	return Pods[T]{
		Kind: kind, Queue: queue,
		Expectations: controller.NewUIDTrackingControllerExpectations(controller.NewControllerExpectations()),
		Control:      controller.RealPodControl{KubeClient: deps.Client, Recorder: recorder},
		Indexer:      informer.GetIndexer(),
	}, nil
}

// Owners wake the owner that an event is about. Gone gets those that are deleted, or whose name another has taken.
func (p Pods[T]) Owners(gone func(T)) Handlers[T] {
	return Handlers[T]{
		Add: func(owner T) { p.Queue.Add(Key(owner)) },
		Update: func(old, cur T) {
			if old.GetUID() != cur.GetUID() {
				gone(old)
			}
			p.Queue.Add(Key(cur))
		},
		Delete: gone,
	}
}

// Owner is the cached object that controls obj. There is none if nothing of this kind controls it, or if what did
// is gone, even if another of the same name has taken its place.
func (p Pods[T]) Owner(obj metav1.Object) (owner T, ok bool) {
	ref := metav1.GetControllerOfNoCopy(obj)
	if ref == nil || ref.Kind != p.Kind.Kind {
		return owner, false
	}
	if gv, err := schema.ParseGroupVersion(ref.APIVersion); err != nil || gv.Group != p.Kind.Group {
		return owner, false
	}
	owner, err := p.Cached(obj.GetNamespace(), ref.Name)
	return owner, err == nil && owner.GetUID() == ref.UID
}

// Handlers wake the owners that an event concerns.
func (p Pods[T]) Handlers() Handlers[*corev1.Pod] {
	return Handlers[*corev1.Pod]{Add: p.added, Update: p.updated, Delete: p.gone}
}

func (p Pods[T]) added(pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil {
		// Seen for the first time while it is already going: that is no creation that anybody waits for.
		p.gone(pod)
		return
	}
	if metav1.GetControllerOfNoCopy(pod) == nil {
		p.wakeAdopters(pod)
		return
	}
	if owner, ok := p.Owner(pod); ok {
		if p.Expectations != nil {
			p.Expectations.CreationObserved(logr.Discard(), Key(owner))
		}
		p.Queue.Add(Key(owner))
	}
}

func (p Pods[T]) updated(old, cur *corev1.Pod) {
	if old.ResourceVersion == cur.ResourceVersion {
		return
	}
	if cur.DeletionTimestamp != nil {
		// A pod that is going counts as gone, so that its successor need not wait for it.
		p.gone(cur)
		if !apiequality.Semantic.DeepEqual(old.Labels, cur.Labels) {
			p.gone(old)
		}
		return
	}
	ownerChanged := !apiequality.Semantic.DeepEqual(metav1.GetControllerOfNoCopy(old), metav1.GetControllerOfNoCopy(cur))
	if ownerChanged {
		p.wake(old)
	}
	if metav1.GetControllerOfNoCopy(cur) != nil {
		p.wake(cur)
		return
	}
	if ownerChanged || !apiequality.Semantic.DeepEqual(old.Labels, cur.Labels) {
		p.wakeAdopters(cur)
	}
}

func (p Pods[T]) gone(pod *corev1.Pod) {
	if owner, ok := p.Owner(pod); ok {
		if p.Expectations != nil {
			p.Expectations.DeletionObserved(logr.Discard(), Key(owner), controller.PodKey(pod))
		}
		p.Queue.Add(Key(owner))
	}
}

func (p Pods[T]) wake(pod *corev1.Pod) {
	if owner, ok := p.Owner(pod); ok {
		p.Queue.Add(Key(owner))
	}
}

func (p Pods[T]) wakeAdopters(pod *corev1.Pod) {
	adopters, err := p.Matching(pod)
	if err != nil {
		return // none matches
	}
	for _, owner := range adopters {
		p.Queue.Add(Key(owner))
	}
}

// Candidates are the pods that owner controls, and those of its namespace that nobody does.
func (p Pods[T]) Candidates(owner T) ([]*corev1.Pod, error) {
	meta := &metav1.ObjectMeta{Namespace: owner.GetNamespace(), Name: owner.GetName(), UID: owner.GetUID()}
	pods, err := controller.FilterPodsByOwner(p.Indexer, meta, p.Kind.Kind, true)
	if err != nil {
		return nil, fmt.Errorf("list pods of %s %s: %w", p.Kind.Kind, Key(owner), err)
	}
	return pods, nil
}

// Claim returns those of pods that are owner's, after it has adopted what selector matches and released what it
// no longer does. Pods get the finalizers when they are adopted and lose them when they are released.
func (p Pods[T]) Claim(ctx context.Context, owner T, selector labels.Selector, pods []*corev1.Pod, finalizers ...string) ([]*corev1.Pod, error) {
	claimed, err := controller.NewPodControllerRefManager(p.Control, owner, selector, p.Kind, p.CanAdopt(owner), finalizers...).ClaimPods(ctx, pods, func(pod *corev1.Pod) bool {
		return p.Member == nil || p.Member(owner, pod)
	})
	if err != nil {
		return nil, fmt.Errorf("claim pods of %s %s: %w", p.Kind.Kind, Key(owner), err)
	}
	return claimed, nil
}

// CanAdopt returns a check for owner's adoptions, done once for all of them: who was deleted must not adopt, and
// only an uncached read can tell.
func (p Pods[T]) CanAdopt(owner T) func(context.Context) error {
	return CanAdopt(owner, p.Kind.Kind, p.Fresh)
}

// CanAdopt is Pods.CanAdopt for owners of something else than pods. Fresh reads the owner from the API.
func CanAdopt[T metav1.Object](owner T, kind string, fresh func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (T, error)) func(context.Context) error {
	return controller.RecheckDeletionTimestamp(func(ctx context.Context) (metav1.Object, error) {
		now, err := fresh(ctx, owner.GetNamespace(), owner.GetName(), metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		if now.GetUID() != owner.GetUID() {
			return nil, fmt.Errorf("original %s %s is gone: got uid %s, wanted %s", kind, Key(owner), now.GetUID(), owner.GetUID())
		}
		return now, nil
	})
}
