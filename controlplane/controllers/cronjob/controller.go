// SPDX-License-Identifier: Apache-2.0

package cronjob

import (
	"context"
	"errors"
	"fmt"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	batchlisters "k8s.io/client-go/listers/batch/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/controlplane/controllers/runner"
)

const (
	workers = 2
	// ownerIndex finds Jobs by the UID of their controller.
	ownerIndex = "skep.io/cronjob-uid"
)

// Controller creates the Jobs of CronJobs.
type Controller struct {
	runner.Deps
	queue    *runner.Queue
	cronJobs batchlisters.CronJobLister
	jobs     cache.Indexer
	recorder record.EventRecorder
	synced   []cache.InformerSynced
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	cronJobs, jobs := deps.Informers.Batch().V1().CronJobs(), deps.Informers.Batch().V1().Jobs()
	c := &Controller{Deps: deps, cronJobs: cronJobs.Lister(), jobs: jobs.Informer().GetIndexer(), recorder: deps.Recorder("cronjob-controller")}
	c.queue = runner.New("cronjob", workers, deps, c.sync)
	err := jobs.Informer().AddIndexers(cache.Indexers{ownerIndex: func(obj any) ([]string, error) {
		if job, ok := obj.(*batchv1.Job); ok {
			if ref := metav1.GetControllerOfNoCopy(job); ref != nil && ref.Kind == Kind.Kind {
				return []string{string(ref.UID)}, nil
			}
		}
		return nil, nil
	}})
	if err != nil {
		return nil, fmt.Errorf("index jobs by owner: %w", err)
	}
	cronJobsSynced, err := runner.Watch(cronJobs.Informer(), runner.Handlers[*batchv1.CronJob]{
		Add:    func(cj *batchv1.CronJob) { c.queue.Add(runner.Key(cj)) },
		Update: func(_, cj *batchv1.CronJob) { c.queue.Add(runner.Key(cj)) },
	})
	if err != nil {
		return nil, err
	}
	jobsSynced, err := runner.Watch(jobs.Informer(), runner.Handlers[*batchv1.Job]{
		Add: c.wakeOwner,
		Update: func(old, cur *batchv1.Job) {
			c.wakeOwner(old)
			c.wakeOwner(cur)
		},
		Delete: c.wakeOwner,
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{cronJobsSynced, jobsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) wakeOwner(job *batchv1.Job) {
	if ref := metav1.GetControllerOfNoCopy(job); ref != nil && ref.Kind == Kind.Kind {
		c.queue.Add(job.Namespace + "/" + ref.Name)
	}
}

func (c *Controller) cached(namespace, name string) (*batchv1.CronJob, error) {
	return c.cronJobs.CronJobs(namespace).Get(name)
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	cj, found, err := runner.Find(key, c.cached)
	if err != nil || !found {
		return 0, err
	}
	s, err := c.snapshot(ctx, cj)
	if err != nil {
		return 0, err
	}
	plan := Compute(s, c.Clock.Now())
	if err := c.apply(ctx, cj, plan); err != nil {
		return 0, fmt.Errorf("cron job %s: %w", key, err)
	}
	return plan.Wake, nil
}

func (c *Controller) snapshot(ctx context.Context, cj *batchv1.CronJob) (Snapshot, error) {
	s := Snapshot{CronJob: cj}
	found, err := c.jobs.ByIndex(ownerIndex, string(cj.UID))
	if err != nil {
		return s, fmt.Errorf("jobs of cron job %s/%s: %w", cj.Namespace, cj.Name, err)
	}
	known := map[types.UID]bool{}
	for _, obj := range found {
		if job, ok := obj.(*batchv1.Job); ok {
			s.Jobs = append(s.Jobs, job)
			known[job.UID] = true
		}
	}
	for _, ref := range cj.Status.Active {
		if known[ref.UID] {
			continue
		}
		// The cache may not show it yet.
		job, err := c.Client.BatchV1().Jobs(cj.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
		switch {
		case err == nil && job.UID == ref.UID:
			s.Jobs = append(s.Jobs, job)
		case err != nil && !apierrors.IsNotFound(err):
			return s, fmt.Errorf("read job %s/%s: %w", cj.Namespace, ref.Name, err)
		}
	}
	return s, nil
}

func (c *Controller) apply(ctx context.Context, cj *batchv1.CronJob, plan Plan) error {
	client := c.Client.BatchV1().Jobs(cj.Namespace)
	for _, e := range plan.Events {
		c.recorder.Event(cj, e.Type, e.Reason, e.Message)
	}
	for _, job := range plan.Delete {
		err := client.Delete(ctx, job.Name, metav1.DeleteOptions{
			PropagationPolicy: new(metav1.DeletePropagationBackground), Preconditions: metav1.NewUIDPreconditions(string(job.UID)),
		})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			c.recorder.Eventf(cj, corev1.EventTypeWarning, "FailedDelete", "Deleted job: %v", err)
			return fmt.Errorf("delete job %s: %w", job.Name, err)
		}
		c.recorder.Eventf(cj, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted job %s", job.Name)
	}
	status, failure := plan.Status, error(nil)
	if plan.Create != nil {
		job, err := c.create(ctx, cj, plan.Create)
		switch {
		case err != nil:
			failure = err // what else changed is written all the same
		case job != nil:
			status = plan.Started(cj.Status, job)
		}
	}
	if status != nil {
		changed := *cj
		changed.Status = *status
		if _, err := c.Client.BatchV1().CronJobs(cj.Namespace).UpdateStatus(ctx, &changed, metav1.UpdateOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return errors.Join(failure, fmt.Errorf("update status: %w", err))
		}
	}
	return failure
}

// create returns the Job, also if an earlier attempt has created it, and nil if the name is somebody else's.
func (c *Controller) create(ctx context.Context, cj *batchv1.CronJob, job *batchv1.Job) (*batchv1.Job, error) {
	client := c.Client.BatchV1().Jobs(cj.Namespace)
	created, err := client.Create(ctx, job, metav1.CreateOptions{})
	switch {
	case err == nil:
		c.recorder.Eventf(cj, corev1.EventTypeNormal, "SuccessfulCreate", "Created job %s", created.Name)
		return created, nil
	case apierrors.IsAlreadyExists(err):
		existing, getErr := client.Get(ctx, job.Name, metav1.GetOptions{})
		if getErr != nil {
			return nil, fmt.Errorf("read job %s: %w", job.Name, getErr)
		}
		if metav1.IsControlledBy(existing, cj) {
			return existing, nil
		}
		c.recorder.Eventf(cj, corev1.EventTypeWarning, "FailedCreate", "Error creating job: %v", err)
		return nil, nil
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil, fmt.Errorf("create job %s: %w", job.Name, err)
	}
	c.recorder.Eventf(cj, corev1.EventTypeWarning, "FailedCreate", "Error creating job: %v", err)
	return nil, fmt.Errorf("create job %s: %w", job.Name, err)
}
