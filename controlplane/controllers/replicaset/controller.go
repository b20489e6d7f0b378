// SPDX-License-Identifier: Apache-2.0

package replicaset

import (
	"context"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/controller"

	"skep.io/skep/controlplane/controllers/runner"
)

const (
	workers = 5
	// ownerIndex finds ReplicaSets by the UID of their controller.
	ownerIndex = "skep.io/controller-uid"
)

// Controller keeps the pods of ReplicaSets, or of ReplicationControllers seen as such, in number.
type Controller struct {
	runner.Deps
	owners
	queue  *runner.Queue
	pods   runner.Pods[*appsv1.ReplicaSet]
	synced []cache.InformerSynced
}

// New registers the controller of ReplicaSets with the shared informers.
func New(deps runner.Deps) (*Controller, error) { return newController(deps, replicaSets(deps)) }

// NewForControllers is New for ReplicationControllers.
func NewForControllers(deps runner.Deps) (*Controller, error) {
	return newController(deps, replicationControllers(deps))
}

func newController(deps runner.Deps, owners owners) (*Controller, error) {
	c := &Controller{Deps: deps, owners: owners}
	c.queue = runner.New(owners.queue, workers, deps, c.sync)
	var err error
	if c.pods, err = runner.NewPods[*appsv1.ReplicaSet](deps, c.kind, c.queue, deps.Recorder(c.recorder)); err != nil {
		return nil, err
	}
	c.pods.Cached, c.pods.Matching = c.cached, c.matching
	c.pods.Fresh = func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*appsv1.ReplicaSet, error) {
		return c.client(namespace).Get(ctx, name, opts)
	}
	err = c.informer.AddIndexers(cache.Indexers{ownerIndex: func(obj any) ([]string, error) {
		owned, ok := obj.(metav1.Object)
		if !ok {
			return nil, nil
		}
		if ref := metav1.GetControllerOfNoCopy(owned); ref != nil {
			return []string{string(ref.UID)}, nil
		}
		return nil, nil
	}})
	if err != nil {
		return nil, fmt.Errorf("index %ss by owner: %w", c.kind.Kind, err)
	}

	ownersSynced, err := c.watch(c.pods.Owners(c.forget))
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(deps.Informers.Core().V1().Pods().Informer(), c.pods.Handlers())
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{ownersSynced, podsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) forget(rs *appsv1.ReplicaSet) {
	c.pods.Forget(runner.Key(rs))
	c.queue.Add(runner.Key(rs))
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	rs, found, err := runner.Find(key, c.pods.Cached)
	if err != nil {
		return 0, err
	}
	if !found {
		c.pods.Forget(key)
		return 0, nil
	}
	settled := c.pods.Settled(key)
	s, err := c.snapshot(ctx, rs)
	if err != nil {
		return 0, err
	}

	var failure error
	if settled {
		failure = c.apply(ctx, rs, Compute(s, c.Clock.Now()))
	}
	now := c.Clock.Now()
	if err := c.writeStatus(ctx, rs, Status(s, failure, c.terminating, now)); err != nil {
		return 0, err
	}
	return runner.UntilAvailable(s.Active, rs.Spec.MinReadySeconds, now), failure
}

// snapshot gathers the ReplicaSet's pods, adopting and releasing on the way.
func (c *Controller) snapshot(ctx context.Context, rs *appsv1.ReplicaSet) (Snapshot, error) {
	s := Snapshot{ReplicaSet: rs, Related: func() []*corev1.Pod { return c.related(rs) }}
	selector, err := metav1.LabelSelectorAsSelector(rs.Spec.Selector)
	if err != nil {
		return s, fmt.Errorf("%s %s: selector: %w", c.kind.Kind, runner.Key(rs), err)
	}
	pods, err := c.pods.Candidates(rs)
	if err != nil {
		return s, err
	}
	if s.Active, err = c.pods.Claim(ctx, rs, selector, controller.FilterActivePods(logr.Discard(), pods)); err != nil {
		return s, err
	}
	s.Terminating = controller.FilterClaimedPods(rs, selector, controller.FilterTerminatingPods(pods))
	return s, nil
}

// related are the pods of every ReplicaSet of the same Deployment.
func (c *Controller) related(rs *appsv1.ReplicaSet) []*corev1.Pod {
	siblings := []metav1.Object{rs}
	if ref := metav1.GetControllerOfNoCopy(rs); ref != nil {
		if found, err := c.informer.GetIndexer().ByIndex(ownerIndex, string(ref.UID)); err == nil {
			siblings = nil
			for _, obj := range found {
				if sibling, ok := obj.(metav1.Object); ok {
					siblings = append(siblings, sibling)
				}
			}
		}
	}
	var pods []*corev1.Pod
	for _, sibling := range siblings {
		meta := &metav1.ObjectMeta{Namespace: sibling.GetNamespace(), Name: sibling.GetName(), UID: sibling.GetUID()}
		if own, err := controller.FilterPodsByOwner(c.pods.Indexer, meta, c.kind.Kind, false); err == nil {
			pods = append(pods, own...)
		}
	}
	return pods
}

func (c *Controller) apply(ctx context.Context, rs *appsv1.ReplicaSet, plan Plan) error {
	ref, owner := metav1.NewControllerRef(rs, c.kind), c.object(rs)
	return c.pods.Act(ctx, rs, plan.Create, func(int) error {
		return c.pods.Control.CreatePods(ctx, rs.Namespace, &rs.Spec.Template, owner, ref)
	}, plan.Delete, func(pod *corev1.Pod) error {
		return c.pods.Control.DeletePod(ctx, pod.Namespace, pod.Name, owner)
	})
}

func (c *Controller) writeStatus(ctx context.Context, rs *appsv1.ReplicaSet, status appsv1.ReplicaSetStatus) error {
	if !StatusChanged(rs.Status, status) {
		return nil
	}
	return runner.WriteStatus(ctx, c.client(rs.Namespace), rs, func(rs *appsv1.ReplicaSet) *appsv1.ReplicaSet {
		changed := *rs
		changed.Status = status
		return &changed
	})
}
