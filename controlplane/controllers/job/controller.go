// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	batchlisters "k8s.io/client-go/listers/batch/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/features"

	"skep.io/skep/controlplane/controllers/runner"
)

const workers = 5

// Kind is how pods name their owner.
var Kind = batchv1.SchemeGroupVersion.WithKind("Job")

// Controller runs Jobs.
type Controller struct {
	runner.Deps
	queue       *runner.Queue
	orphans     *runner.Queue
	pods        runner.Pods[*batchv1.Job]
	memory      memory
	jobs        batchlisters.JobLister
	recorder    record.EventRecorder
	synced      []cache.InformerSynced
	forgetStart bool
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	jobs, pods := deps.Informers.Batch().V1().Jobs(), deps.Informers.Core().V1().Pods()
	c := &Controller{
		Deps:        deps,
		jobs:        jobs.Lister(),
		recorder:    deps.Recorder("job-controller"),
		forgetStart: utilfeature.DefaultFeatureGate.Enabled(features.MutableSchedulingDirectivesForSuspendedJobs),
	}
	c.queue = runner.New("job", workers, deps, c.sync)
	c.orphans = runner.New("job-orphans", 1, deps, c.syncOrphan)
	var err error
	if c.pods, err = runner.NewPods[*batchv1.Job](deps, Kind, c.queue, c.recorder); err != nil {
		return nil, err
	}
	c.pods.Cached = func(namespace, name string) (*batchv1.Job, error) { return c.jobs.Jobs(namespace).Get(name) }
	c.pods.Fresh = func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*batchv1.Job, error) {
		return deps.Client.BatchV1().Jobs(namespace).Get(ctx, name, opts)
	}
	c.pods.Matching = c.matching
	jobsSynced, err := runner.Watch(jobs.Informer(), runner.Handlers[*batchv1.Job]{
		Add: func(job *batchv1.Job) { c.queue.Add(runner.Key(job)) },
		Update: func(old, cur *batchv1.Job) {
			if old.UID != cur.UID {
				c.jobGone(old)
			}
			if Finished(cur) {
				c.enqueueOrphans(cur)
			}
			c.queue.Add(runner.Key(cur))
		},
		Delete: c.jobGone,
	})
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(pods.Informer(), c.podHandlers())
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{jobsSynced, podsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	var orphans error
	wg.Go(func() { orphans = c.orphans.Run(ctx, c.synced...) })
	err := c.queue.Run(ctx, c.synced...)
	wg.Wait()
	return errors.Join(err, orphans)
}

func (c *Controller) matching(pod *corev1.Pod) ([]*batchv1.Job, error) {
	found, err := c.jobs.GetPodJobs(pod)
	jobs := make([]*batchv1.Job, len(found))
	for i := range found {
		jobs[i] = &found[i]
	}
	return jobs, err
}

// podHandlers also notice when a pod loses the finalizer, and pods that keep it although nobody counts them.
func (c *Controller) podHandlers() runner.Handlers[*corev1.Pod] {
	owners := c.pods.Handlers()
	look := func(pod *corev1.Pod) {
		if !hasFinalizer(pod) {
			c.memory.untrackSeen(pod.UID)
		} else if job, ok := c.pods.Owner(pod); !ok || Finished(job) {
			c.orphans.Add(runner.Key(pod))
		}
	}
	return runner.Handlers[*corev1.Pod]{
		Add: func(pod *corev1.Pod) {
			look(pod)
			owners.Add(pod)
		},
		Update: func(old, cur *corev1.Pod) {
			look(cur)
			owners.Update(old, cur)
		},
		Delete: func(pod *corev1.Pod) {
			c.memory.untrackSeen(pod.UID)
			owners.Delete(pod)
		},
	}
}

func (c *Controller) jobGone(job *batchv1.Job) {
	c.pods.Forget(runner.Key(job))
	c.memory.forget(job.UID)
	c.enqueueOrphans(job)
	c.queue.Add(runner.Key(job))
}

// forgetGone drops what a sync remembers of a Job that was deleted under it, after jobGone.
func (c *Controller) forgetGone(job *batchv1.Job) {
	if cur, err := c.jobs.Jobs(job.Namespace).Get(job.Name); err != nil || cur.UID != job.UID {
		c.memory.forget(job.UID)
	}
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return 0, fmt.Errorf("queue key %q: %w", key, err)
	}
	job, err := c.jobs.Jobs(namespace).Get(name)
	if apierrors.IsNotFound(err) {
		c.pods.Forget(key)
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read job %s: %w", key, err)
	}
	if Finished(job) || managedElsewhere(job) {
		c.memory.forget(job.UID)
		return 0, nil
	}
	if c.memory.written(job.UID).newerThan(job.ResourceVersion) {
		return 0, nil // the event that brings the cache up to date calls again
	}
	settled := c.pods.Settled(key)
	s, err := c.snapshot(ctx, job)
	if err != nil {
		return 0, err
	}
	s.Settled = settled
	defer c.forgetGone(job)
	plan := Compute(s, c.Clock.Now())
	if err := c.writeStatus(ctx, job, plan); err != nil {
		return 0, err
	}
	c.memory.setBackoff(job.UID, plan.Backoff)
	return plan.Wake, c.apply(ctx, job, plan)
}

// snapshot gathers the Job's pods, adopting and releasing on the way.
func (c *Controller) snapshot(ctx context.Context, job *batchv1.Job) (Snapshot, error) {
	s := Snapshot{Job: job, Backoff: c.memory.backoff(job.UID), ForgetStart: c.forgetStart}
	selector, err := metav1.LabelSelectorAsSelector(job.Spec.Selector)
	if err != nil {
		return s, fmt.Errorf("job %s/%s: selector: %w", job.Namespace, job.Name, err)
	}
	// Ask before reading the pods, here too: who is seen without the finalizer later is not counted by the cache either.
	s.Untracked = c.memory.untracked(job.UID)
	candidates, err := c.pods.Candidates(job)
	if err != nil {
		return s, err
	}
	if s.Pods, err = c.pods.Claim(ctx, job, selector, candidates, batchv1.JobTrackingFinalizer); err != nil {
		return s, err
	}
	for i, pod := range s.Pods {
		if !metav1.IsControlledBy(pod, job) {
			// Adopted just now, so it has the finalizer although the cache does not show it.
			s.Pods[i] = pod.DeepCopy()
			s.Pods[i].Finalizers = append(s.Pods[i].Finalizers, batchv1.JobTrackingFinalizer)
		}
	}
	return s, nil
}

func (c *Controller) writeStatus(ctx context.Context, job *batchv1.Job, plan Plan) error {
	if plan.Status == nil {
		return nil
	}
	changed := *job
	changed.Status = *plan.Status
	fresh, err := c.Client.BatchV1().Jobs(job.Namespace).UpdateStatus(ctx, &changed, metav1.UpdateOptions{})
	if err != nil {
		return fmt.Errorf("update status of job %s/%s: %w", job.Namespace, job.Name, err)
	}
	c.memory.wrote(job.UID, version(fresh.ResourceVersion))
	for _, e := range plan.Events {
		c.recorder.Event(job, e.Type, e.Reason, e.Message)
	}
	return nil
}

// apply does what follows from a status that is written.
func (c *Controller) apply(ctx context.Context, job *batchv1.Job, plan Plan) error {
	err := runner.InParallel(len(plan.Release), func(i int) error {
		return c.untrack(ctx, job, plan.Release[i], false)
	})
	return errors.Join(err, c.act(ctx, job, plan))
}

// untrack removes the finalizer of a pod. If asSeen, it does so only as long as the pod is what the cache shows.
func (c *Controller) untrack(ctx context.Context, job *batchv1.Job, pod *corev1.Pod, asSeen bool) error {
	if !hasFinalizer(pod) {
		return nil
	}
	c.memory.untrack(job.UID, pod.UID)
	err := removeFinalizer(ctx, c.pods.Control, pod, asSeen)
	if err != nil {
		c.memory.untrackSeen(pod.UID)
	}
	return err
}

// act creates and deletes.
func (c *Controller) act(ctx context.Context, job *batchv1.Job, plan Plan) error {
	common, ref := Template(job), metav1.NewControllerRef(job, Kind)
	create := func(i int) error {
		template, name := plan.Create[i].For(job, common)
		return c.pods.Control.CreatePodsWithGenerateName(ctx, job.Namespace, template, job, ref, name)
	}
	remove := func(pod *corev1.Pod) error {
		if slices.Contains(plan.Drop, pod) {
			// A pod that ended meanwhile is to be counted, not dropped.
			if err := c.untrack(ctx, job, pod, true); err != nil {
				return err
			}
		}
		return c.pods.Control.DeletePod(ctx, job.Namespace, pod.Name, job)
	}
	if err := c.pods.Act(ctx, job, len(plan.Create), create, slices.Concat(plan.Drop, plan.Delete), remove); err != nil {
		return fmt.Errorf("pods of job %s: %w", runner.Key(job), err)
	}
	return nil
}

// version is a resource version, empty for none.
type version string

func (v version) newerThan(cached string) bool {
	if v == "" {
		return false
	}
	order, err := resourceversion.CompareResourceVersion(string(v), cached)
	return err == nil && order > 0
}
