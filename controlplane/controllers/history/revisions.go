// SPDX-License-Identifier: Apache-2.0

package history

import (
	"bytes"
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/controller"
	upstream "k8s.io/kubernetes/pkg/controller/history"

	"skep.io/skep/controlplane/controllers/runner"
)

// Revisions are the ControllerRevisions that objects of one kind own.
type Revisions[T metav1.Object] struct {
	client  kubernetes.Interface
	indexer cache.Indexer
	// owners are who may own a revision, as they own pods.
	owners runner.Pods[T]
}

// Watch makes Revisions for those who own pods, whom it wakes when one of their revisions is changed or deleted by
// somebody, or becomes free to adopt.
func Watch[T metav1.Object](deps runner.Deps, owners runner.Pods[T]) (*Revisions[T], cache.InformerSynced, error) {
	informer := deps.Informers.Apps().V1().ControllerRevisions().Informer()
	if err := upstream.AddControllerRevisionControllerIndexer(informer); err != nil {
		return nil, nil, fmt.Errorf("index controller revisions by owner: %w", err)
	}
	r := &Revisions[T]{client: deps.Client, indexer: informer.GetIndexer(), owners: owners}
	synced, err := runner.Watch(informer, runner.Handlers[*appsv1.ControllerRevision]{
		Add: func(revision *appsv1.ControllerRevision) {
			if metav1.GetControllerOfNoCopy(revision) == nil {
				r.wakeAdopters(revision)
			}
		},
		Update: func(old, cur *appsv1.ControllerRevision) {
			if old.ResourceVersion == cur.ResourceVersion {
				return
			}
			r.wakeOwner(old)
			r.wakeOwner(cur)
			if metav1.GetControllerOfNoCopy(cur) == nil && !apiequality.Semantic.DeepEqual(old.ObjectMeta, cur.ObjectMeta) {
				r.wakeAdopters(cur)
			}
		},
		Delete: r.wakeOwner,
	})
	return r, synced, err
}

func (r *Revisions[T]) wakeOwner(revision *appsv1.ControllerRevision) {
	if owner, ok := r.owners.Owner(revision); ok {
		r.owners.Queue.Add(runner.Key(owner))
	}
}

func (r *Revisions[T]) wakeAdopters(revision *appsv1.ControllerRevision) {
	// Only namespace and labels are compared with selectors.
	adopters, err := r.owners.Matching(&corev1.Pod{ObjectMeta: revision.ObjectMeta})
	if err != nil {
		return // none matches
	}
	for _, owner := range adopters {
		r.owners.Queue.Add(runner.Key(owner))
	}
}

// Claim returns owner's revisions, sorted, after it has adopted those that selector matches and nobody has, and
// released those that it no longer matches.
func (r *Revisions[T]) Claim(ctx context.Context, owner T, selector labels.Selector) ([]*appsv1.ControllerRevision, error) {
	var candidates []*appsv1.ControllerRevision
	for _, ref := range []*metav1.OwnerReference{metav1.NewControllerRef(owner, r.owners.Kind), nil} {
		found, err := r.indexer.ByIndex(upstream.ControllerRevisionControllerIndex,
			upstream.ControllerRevisionControllerIndexKey(owner.GetNamespace(), ref))
		if err != nil {
			return nil, fmt.Errorf("list controller revisions of %s: %w", runner.Key(owner), err)
		}
		for _, obj := range found {
			if revision, ok := obj.(*appsv1.ControllerRevision); ok {
				candidates = append(candidates, revision)
			}
		}
	}
	refs := controller.NewControllerRevisionControllerRefManager(
		controller.RealControllerRevisionControl{KubeClient: r.client}, owner, selector, r.owners.Kind, r.owners.CanAdopt(owner))
	claimed, err := refs.ClaimControllerRevisions(ctx, candidates)
	if err != nil {
		return nil, fmt.Errorf("claim controller revisions of %s: %w", runner.Key(owner), err)
	}
	Sort(claimed)
	return claimed, nil
}

// Draft is a revision that may have to be written.
type Draft struct {
	Data []byte
	// Named gives the revision with data, labels, owner and a name that depends on data and collisions only.
	Named func(collisions *int32) *appsv1.ControllerRevision
}

// Record makes sure that draft is the newest of owner's revisions, which are sorted: by finding it there, by giving
// it a new number (a rollback), or by creating it. Names that others hold are passed over by counting collisions up;
// the count to keep is returned.
func (r *Revisions[T]) Record(ctx context.Context, owner T, selector labels.Selector, revisions []*appsv1.ControllerRevision, draft Draft, collisions *int32) (*appsv1.ControllerRevision, *int32, error) {
	client := r.client.AppsV1().ControllerRevisions(owner.GetNamespace())
	found, number := Find(revisions, draft.Data)
	if found != nil {
		if found.Revision == number {
			return found, collisions, nil
		}
		renumbered := found.DeepCopy()
		renumbered.Revision = number
		renumbered, err := client.Update(ctx, renumbered, metav1.UpdateOptions{})
		if err != nil {
			return nil, collisions, fmt.Errorf("update controller revision %s/%s: %w", found.Namespace, found.Name, err)
		}
		return renumbered, collisions, nil
	}
	for {
		revision := draft.Named(collisions)
		revision.Namespace, revision.Revision, revision.Data.Raw = owner.GetNamespace(), number, draft.Data
		created, err := client.Create(ctx, revision, metav1.CreateOptions{})
		if err == nil {
			return created, collisions, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return nil, collisions, fmt.Errorf("create controller revision %s/%s: %w", revision.Namespace, revision.Name, err)
		}
		// Only a read that no cache can make stale tells who holds the name.
		holder, err := client.Get(ctx, revision.Name, metav1.GetOptions{})
		if err != nil {
			return nil, collisions, fmt.Errorf("read controller revision %s/%s: %w", revision.Namespace, revision.Name, err)
		}
		if bytes.Equal(holder.Data.Raw, draft.Data) {
			if metav1.IsControlledBy(holder, owner) && holder.Revision >= number {
				return holder, collisions, nil
			}
			adoptable := metav1.GetControllerOfNoCopy(holder) == nil && selector.Matches(labels.Set(holder.Labels))
			if adoptable || metav1.IsControlledBy(holder, owner) {
				return nil, collisions, fmt.Errorf("controller revision %s/%s: %w", revision.Namespace, revision.Name, runner.ErrStaleCache)
			}
		}
		next := int32(1)
		if collisions != nil {
			next = *collisions + 1
		}
		collisions = &next
	}
}

// Delete deletes revisions that have expired.
func (r *Revisions[T]) Delete(ctx context.Context, revisions []*appsv1.ControllerRevision) error {
	for _, revision := range revisions {
		err := r.client.AppsV1().ControllerRevisions(revision.Namespace).Delete(ctx, revision.Name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete old controller revision %s/%s: %w", revision.Namespace, revision.Name, err)
		}
	}
	return nil
}
