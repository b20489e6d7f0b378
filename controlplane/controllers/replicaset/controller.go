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
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	appslisters "k8s.io/client-go/listers/apps/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/features"

	"skep.io/skep/controlplane/controllers/runner"
)

const (
	workers = 5
	// ownerIndex finds ReplicaSets by the UID of their controller.
	ownerIndex = "skep.io/controller-uid"
)

// Controller keeps ReplicaSets' pods in number.
type Controller struct {
	runner.Deps
	queue       *runner.Queue
	pods        runner.Pods[*appsv1.ReplicaSet]
	replicaSets appslisters.ReplicaSetLister
	byOwner     cache.Indexer
	synced      []cache.InformerSynced
	terminating bool
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	replicaSets, pods := deps.Informers.Apps().V1().ReplicaSets(), deps.Informers.Core().V1().Pods()
	c := &Controller{
		Deps:        deps,
		replicaSets: replicaSets.Lister(),
		byOwner:     replicaSets.Informer().GetIndexer(),
		terminating: utilfeature.DefaultFeatureGate.Enabled(features.DeploymentReplicaSetTerminatingReplicas),
	}
	c.queue = runner.New("replicaset", workers, deps, c.sync)
	var err error
	if c.pods, err = runner.NewPods[*appsv1.ReplicaSet](deps, Kind, c.queue, deps.Recorder("replicaset-controller")); err != nil {
		return nil, err
	}
	c.pods.Cached = func(namespace, name string) (*appsv1.ReplicaSet, error) {
		return c.replicaSets.ReplicaSets(namespace).Get(name)
	}
	c.pods.Fresh = func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*appsv1.ReplicaSet, error) {
		return deps.Client.AppsV1().ReplicaSets(namespace).Get(ctx, name, opts)
	}
	c.pods.Matching = c.replicaSets.GetPodReplicaSets
	err = replicaSets.Informer().AddIndexers(cache.Indexers{ownerIndex: func(obj any) ([]string, error) {
		rs, ok := obj.(*appsv1.ReplicaSet)
		if !ok {
			return nil, nil
		}
		if ref := metav1.GetControllerOfNoCopy(rs); ref != nil {
			return []string{string(ref.UID)}, nil
		}
		return nil, nil
	}})
	if err != nil {
		return nil, fmt.Errorf("index replica sets by owner: %w", err)
	}

	replicaSetsSynced, err := runner.Watch(replicaSets.Informer(), c.pods.Owners(c.forget))
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(pods.Informer(), c.pods.Handlers())
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{replicaSetsSynced, podsSynced}
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
		return s, fmt.Errorf("replica set %s/%s: selector: %w", rs.Namespace, rs.Name, err)
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
	siblings := []any{rs}
	if ref := metav1.GetControllerOfNoCopy(rs); ref != nil {
		if found, err := c.byOwner.ByIndex(ownerIndex, string(ref.UID)); err == nil {
			siblings = found
		}
	}
	var pods []*corev1.Pod
	for _, obj := range siblings {
		sibling, ok := obj.(*appsv1.ReplicaSet)
		if !ok {
			continue
		}
		if own, err := controller.FilterPodsByOwner(c.pods.Indexer, &sibling.ObjectMeta, Kind.Kind, false); err == nil {
			pods = append(pods, own...)
		}
	}
	return pods
}

func (c *Controller) apply(ctx context.Context, rs *appsv1.ReplicaSet, plan Plan) error {
	ref := metav1.NewControllerRef(rs, Kind)
	return c.pods.Act(ctx, rs, plan.Create, func(int) error {
		return c.pods.Control.CreatePods(ctx, rs.Namespace, &rs.Spec.Template, rs, ref)
	}, plan.Delete, func(pod *corev1.Pod) error {
		return c.pods.Control.DeletePod(ctx, pod.Namespace, pod.Name, rs)
	})
}

func (c *Controller) writeStatus(ctx context.Context, rs *appsv1.ReplicaSet, status appsv1.ReplicaSetStatus) error {
	if !StatusChanged(rs.Status, status) {
		return nil
	}
	return runner.WriteStatus(ctx, c.Client.AppsV1().ReplicaSets(rs.Namespace), rs, func(rs *appsv1.ReplicaSet) *appsv1.ReplicaSet {
		changed := *rs
		changed.Status = status
		return &changed
	})
}
