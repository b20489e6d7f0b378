// SPDX-License-Identifier: Apache-2.0

package deployment

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	appslisters "k8s.io/client-go/listers/apps/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
	"k8s.io/kubernetes/pkg/features"

	"skep.io/skep/controlplane/controllers/runner"
)

const workers = 5

// Controller keeps Deployments and their ReplicaSets in step.
type Controller struct {
	runner.Deps
	queue       *runner.Queue
	recorder    record.EventRecorder
	deployments appslisters.DeploymentLister
	replicaSets appslisters.ReplicaSetLister
	pods        cache.Indexer
	synced      []cache.InformerSynced
	terminating bool
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	deployments, replicaSets, pods := deps.Informers.Apps().V1().Deployments(), deps.Informers.Apps().V1().ReplicaSets(), deps.Informers.Core().V1().Pods()
	c := &Controller{
		Deps:        deps,
		recorder:    deps.Recorder("deployment-controller"),
		deployments: deployments.Lister(),
		replicaSets: replicaSets.Lister(),
		pods:        pods.Informer().GetIndexer(),
		terminating: utilfeature.DefaultFeatureGate.Enabled(features.DeploymentReplicaSetTerminatingReplicas),
	}
	c.queue = runner.New("deployment", workers, deps, c.sync)
	if err := controller.AddPodControllerIndexer(pods.Informer()); err != nil {
		return nil, fmt.Errorf("index pods by owner: %w", err)
	}

	deploymentsSynced, err := runner.Watch(deployments.Informer(), runner.Handlers[*appsv1.Deployment]{
		Add:    func(d *appsv1.Deployment) { c.queue.Add(runner.Key(d)) },
		Update: func(_, d *appsv1.Deployment) { c.queue.Add(runner.Key(d)) },
	})
	if err != nil {
		return nil, err
	}
	replicaSetsSynced, err := runner.Watch(replicaSets.Informer(), runner.Handlers[*appsv1.ReplicaSet]{
		Add: c.enqueueOwner,
		Update: func(old, cur *appsv1.ReplicaSet) {
			if old.ResourceVersion == cur.ResourceVersion {
				return
			}
			if !apiequality.Semantic.DeepEqual(metav1.GetControllerOf(old), metav1.GetControllerOf(cur)) {
				c.enqueueController(old)
			}
			c.enqueueOwner(cur)
		},
		Delete: c.enqueueController,
	})
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(pods.Informer(), runner.Handlers[*corev1.Pod]{
		Update: func(old, cur *corev1.Pod) {
			if old.Status.Phase != cur.Status.Phase {
				c.enqueueForRecreate(cur)
			}
		},
		Delete: c.enqueueForRecreate,
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{deploymentsSynced, replicaSetsSynced, podsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

// enqueueOwner asks for a sync of the Deployment that controls rs or, for an orphan, of those that may adopt it.
func (c *Controller) enqueueOwner(rs *appsv1.ReplicaSet) {
	if metav1.GetControllerOf(rs) != nil {
		c.enqueueController(rs)
		return
	}
	if adopters, err := util.GetDeploymentsForReplicaSet(c.deployments, rs); err == nil {
		for _, d := range adopters {
			c.queue.Add(runner.Key(d))
		}
	}
}

func (c *Controller) enqueueController(rs *appsv1.ReplicaSet) {
	if d := c.owner(rs); d != nil {
		c.queue.Add(runner.Key(d))
	}
}

func (c *Controller) owner(rs *appsv1.ReplicaSet) *appsv1.Deployment {
	ref := metav1.GetControllerOf(rs)
	if ref == nil || ref.Kind != Kind.Kind {
		return nil
	}
	d, err := c.cached(rs.Namespace, ref.Name)
	if err != nil || d.UID != ref.UID {
		return nil
	}
	return d
}

// enqueueForRecreate: only Recreate waits for pods; everything else follows from ReplicaSet status.
func (c *Controller) enqueueForRecreate(pod *corev1.Pod) {
	ref := metav1.GetControllerOf(pod)
	if ref == nil || ref.Kind != "ReplicaSet" {
		return
	}
	rs, err := c.replicaSets.ReplicaSets(pod.Namespace).Get(ref.Name)
	if err != nil || rs.UID != ref.UID {
		return
	}
	if d := c.owner(rs); d != nil && d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		c.queue.Add(runner.Key(d))
	}
}

func (c *Controller) cached(namespace, name string) (*appsv1.Deployment, error) {
	return c.deployments.Deployments(namespace).Get(name)
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	d, found, err := runner.Find(key, c.cached)
	if err != nil || !found {
		return 0, err
	}
	snapshot, err := c.snapshot(ctx, d)
	if err != nil {
		return 0, err
	}
	return c.apply(ctx, d, Compute(snapshot, c.Clock.Now()))
}

// snapshot gathers what the Deployment owns, adopting and releasing ReplicaSets on the way.
func (c *Controller) snapshot(ctx context.Context, d *appsv1.Deployment) (Snapshot, error) {
	s := Snapshot{Deployment: d, TerminatingReplicas: c.terminating}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return s, fmt.Errorf("deployment %s/%s: selector: %w", d.Namespace, d.Name, err)
	}
	candidates, err := c.replicaSets.ReplicaSets(d.Namespace).List(labels.Everything())
	if err != nil {
		return s, fmt.Errorf("list replica sets of %s: %w", d.Namespace, err)
	}
	canAdopt := runner.CanAdopt(d, Kind.Kind, func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*appsv1.Deployment, error) {
		return c.Client.AppsV1().Deployments(namespace).Get(ctx, name, opts)
	})
	refs := controller.NewReplicaSetControllerRefManager(
		controller.RealRSControl{KubeClient: c.Client, Recorder: c.recorder}, d, selector, Kind, canAdopt)
	if s.ReplicaSets, err = refs.ClaimReplicaSets(ctx, candidates); err != nil {
		return s, fmt.Errorf("claim replica sets of deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	if d.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType {
		return s, nil
	}
	s.Pods = make(map[types.UID][]*corev1.Pod, len(s.ReplicaSets))
	for _, rs := range s.ReplicaSets {
		if s.Pods[rs.UID], err = controller.FilterPodsByOwner(c.pods, &rs.ObjectMeta, "ReplicaSet", false); err != nil {
			return s, fmt.Errorf("list pods of replica set %s/%s: %w", rs.Namespace, rs.Name, err)
		}
	}
	return s, nil
}

// apply writes a plan. It stops at the first error: the next sync starts from what was reached.
func (c *Controller) apply(ctx context.Context, d *appsv1.Deployment, plan Plan) (time.Duration, error) {
	if plan.Create != nil {
		created, err := c.create(ctx, d, plan.Create)
		if err != nil || !created {
			return 0, err
		}
	}
	for _, u := range plan.Update {
		if err := c.update(ctx, d, u); err != nil {
			return 0, err
		}
	}
	for _, rs := range plan.Delete {
		err := c.Client.AppsV1().ReplicaSets(rs.Namespace).Delete(ctx, rs.Name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return 0, fmt.Errorf("delete old replica set %s/%s: %w", rs.Namespace, rs.Name, err)
		}
	}
	if plan.Status != nil {
		if _, err := c.Client.AppsV1().Deployments(d.Namespace).UpdateStatus(ctx, plan.Status, metav1.UpdateOptions{}); err != nil {
			return 0, fmt.Errorf("update status of deployment %s/%s: %w", d.Namespace, d.Name, err)
		}
	}
	return plan.RequeueAfter, nil
}

// create returns false without an error if the ReplicaSet exists already and its event will bring the next sync.
func (c *Controller) create(ctx context.Context, d *appsv1.Deployment, rs *appsv1.ReplicaSet) (bool, error) {
	_, err := c.Client.AppsV1().ReplicaSets(rs.Namespace).Create(ctx, rs, metav1.CreateOptions{})
	switch {
	case err == nil:
		if n := *rs.Spec.Replicas; n > 0 {
			c.scaled(d, rs.Name, 0, n)
		}
		return true, nil
	case apierrors.IsAlreadyExists(err):
		return false, c.resolveName(ctx, d, rs.Name)
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return false, err
	}
	message := fmt.Sprintf("Failed to create new replica set %q: %v", rs.Name, err)
	c.recorder.Event(d, corev1.EventTypeWarning, util.FailedRSCreateReason, message)
	if failed := AfterFailedCreate(d, message, c.Clock.Now()); failed != nil {
		if _, statusErr := c.Client.AppsV1().Deployments(d.Namespace).UpdateStatus(ctx, failed, metav1.UpdateOptions{}); statusErr != nil {
			c.Log.Debug("deployment status not updated after a failed create", "deployment", runner.Key(d), "err", statusErr)
		}
	}
	return false, fmt.Errorf("create replica set %s/%s: %w", rs.Namespace, rs.Name, err)
}

// resolveName finds out, with a read that no cache can make stale, who holds the name of the new ReplicaSet.
func (c *Controller) resolveName(ctx context.Context, d *appsv1.Deployment, name string) error {
	holder, err := c.Client.AppsV1().ReplicaSets(d.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read replica set %s/%s: %w", d.Namespace, name, err)
	}
	if IsOurs(d, holder) {
		return fmt.Errorf("replica set %s/%s: %w", d.Namespace, name, runner.ErrStaleCache)
	}
	c.Log.Info("pod template hash collides, choosing another", "deployment", runner.Key(d), "replicaSet", name)
	if _, err := c.Client.AppsV1().Deployments(d.Namespace).UpdateStatus(ctx, AfterCollision(d), metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("update collision count of deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	return nil
}

func (c *Controller) update(ctx context.Context, d *appsv1.Deployment, u Update) error {
	rs := u.ReplicaSet
	if _, err := c.Client.AppsV1().ReplicaSets(rs.Namespace).Update(ctx, rs, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("update replica set %s/%s: %w", rs.Namespace, rs.Name, err)
	}
	if u.From != u.To {
		c.scaled(d, rs.Name, u.From, u.To)
	}
	return nil
}

func (c *Controller) scaled(d *appsv1.Deployment, name string, from, to int32) {
	direction := "up"
	if to < from {
		direction = "down"
	}
	c.recorder.Eventf(d, corev1.EventTypeNormal, "ScalingReplicaSet", "Scaled %s replica set %s from %d to %d", direction, name, from, to)
}
