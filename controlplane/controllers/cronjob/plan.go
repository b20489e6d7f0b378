// SPDX-License-Identifier: Apache-2.0

// Package cronjob creates Jobs at the times of a schedule.
//
// The name of a Job comes from the minute it is for, so that no start happens twice, whatever the caches show and
// wherever the controller dies.
package cronjob

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	jobutil "k8s.io/kubernetes/pkg/controller/job/util"
)

// Kind is how Jobs name their owner.
var Kind = batchv1.SchemeGroupVersion.WithKind("CronJob")

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	CronJob *batchv1.CronJob
	// Jobs are those that the CronJob controls. One that its status calls active and that is not among them is gone.
	Jobs []*batchv1.Job
}

// Plan is what to do, in this order.
type Plan struct {
	// Delete are Jobs beyond the history limits, and those that the new one replaces.
	Delete []*batchv1.Job
	Create *batchv1.Job
	// Status is the one to write, which does not know yet of Create; nil if nothing changed.
	Status *batchv1.CronJobStatus
	// Start is the scheduled time that Create is for.
	Start  time.Time
	Events []Event
	// Wake is when to look again although nothing happens; zero for never.
	Wake time.Duration
}

// Event is one of a CronJob's own.
type Event struct{ Type, Reason, Message string }

func (p *Plan) warn(reason, format string, args ...any) {
	p.Events = append(p.Events, Event{corev1.EventTypeWarning, reason, fmt.Sprintf(format, args...)})
}

func (p *Plan) note(reason, format string, args ...any) {
	p.Events = append(p.Events, Event{corev1.EventTypeNormal, reason, fmt.Sprintf(format, args...)})
}

// Compute decides what is due.
func Compute(s Snapshot, now time.Time) Plan {
	var plan Plan
	cj := s.CronJob
	status := cj.Status.DeepCopy()
	plan.review(s, status)
	plan.trim(s)
	if cj.DeletionTimestamp == nil && (cj.Spec.Suspend == nil || !*cj.Spec.Suspend) {
		plan.schedule(s, status, now)
	}
	if !apiequality.Semantic.DeepEqual(status, &cj.Status) {
		plan.Status = status
	}
	return plan
}

// review brings the list of active Jobs and the time of the last success up to date.
func (p *Plan) review(s Snapshot, status *batchv1.CronJobStatus) {
	jobs := map[types.UID]*batchv1.Job{}
	for _, job := range s.Jobs {
		jobs[job.UID] = job
	}
	listed := map[types.UID]bool{}
	status.Active = slices.DeleteFunc(status.Active, func(ref corev1.ObjectReference) bool {
		job := jobs[ref.UID]
		listed[ref.UID] = true
		if job == nil {
			p.note("MissingJob", "Active job went missing: %s", ref.Name)
			return true
		}
		over, how := jobutil.FinishedCondition(job)
		if over {
			p.note("SawCompletedJob", "Saw completed job: %s, condition: %s", job.Name, how)
		}
		return over
	})
	for _, job := range s.Jobs {
		switch {
		case jobutil.IsJobFinished(job):
			if at := job.Status.CompletionTime; at != nil && (status.LastSuccessfulTime == nil || at.After(status.LastSuccessfulTime.Time)) {
				status.LastSuccessfulTime = at
			}
		case listed[job.UID] || job.DeletionTimestamp != nil:
		case job.Annotations[batchv1.CronJobScheduledTimestampAnnotation] != "":
			// Created just before a crash, so that nobody wrote it down.
			status.Active = append(status.Active, Reference(job))
		default:
			p.warn("UnexpectedJob", "Saw a job that the controller did not create or forgot: %s", job.Name)
		}
	}
}

// trim deletes the oldest Jobs of a kind that are more than the CronJob keeps.
func (p *Plan) trim(s Snapshot) {
	for kind, limit := range map[batchv1.JobConditionType]*int32{
		batchv1.JobComplete: s.CronJob.Spec.SuccessfulJobsHistoryLimit, batchv1.JobFailed: s.CronJob.Spec.FailedJobsHistoryLimit,
	} {
		if limit == nil {
			continue
		}
		var jobs []*batchv1.Job
		for _, job := range s.Jobs {
			if over, how := jobutil.FinishedCondition(job); over && how == kind && job.DeletionTimestamp == nil && recorded(s.CronJob, job) {
				jobs = append(jobs, job)
			}
		}
		slices.SortFunc(jobs, byStart)
		p.Delete = append(p.Delete, jobs[:max(0, len(jobs)-int(*limit))]...)
	}
	slices.SortFunc(p.Delete, byStart)
}

// recorded tells whether the CronJob's status has the Job's start. Until it has, the Job itself is the
// only sign that its minute was served, and without it a crash would start that minute again.
func recorded(cj *batchv1.CronJob, job *batchv1.Job) bool {
	at, err := time.Parse(time.RFC3339, job.Annotations[batchv1.CronJobScheduledTimestampAnnotation])
	if err != nil {
		return true // started by hand
	}
	last := cj.Status.LastScheduleTime
	return last != nil && !at.After(last.Time)
}

func byStart(a, b *batchv1.Job) int {
	start := func(job *batchv1.Job) time.Time {
		if job.Status.StartTime == nil {
			return job.CreationTimestamp.Time
		}
		return job.Status.StartTime.Time
	}
	return cmp.Or(start(a).Compare(start(b)), cmp.Compare(a.Name, b.Name))
}

// schedule starts what is due, the latest only, and says when the next is.
func (p *Plan) schedule(s Snapshot, status *batchv1.CronJobStatus, now time.Time) {
	cj := s.CronJob
	zone, err := location(cj)
	if err != nil {
		p.warn("UnknownTimeZone", "invalid timeZone: %q: %s", *cj.Spec.TimeZone, err)
		return
	}
	if strings.Contains(cj.Spec.Schedule, "TZ") {
		p.warn("UnsupportedSchedule", "CRON_TZ or TZ used in schedule %q is not officially supported, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details", cj.Spec.Schedule)
	}
	schedule, err := parse(cj)
	if err != nil {
		p.warn("UnparseableSchedule", "unparseable schedule: %q : %s", cj.Spec.Schedule, err)
		return
	}
	since := cj.CreationTimestamp.Time
	if status.LastScheduleTime != nil {
		since = status.LastScheduleTime.Time
	}
	found, err := startsSince(schedule, since, now)
	if err != nil {
		p.warn("InvalidSchedule", "invalid schedule: %s : %s", cj.Spec.Schedule, err)
		return
	}
	p.Wake = found.next.Sub(now)
	if found.latest.IsZero() {
		return
	}
	if slices.ContainsFunc(s.Jobs, func(job *batchv1.Job) bool { return job.Name == jobName(cj, found.latest) }) {
		status.LastScheduleTime = &metav1.Time{Time: found.latest} // done before a crash, or within the same minute
		return
	}
	if seconds := cj.Spec.StartingDeadlineSeconds; seconds != nil {
		deadline := now.Add(-time.Duration(*seconds) * time.Second)
		if found.latest.Before(deadline) {
			p.warn("MissSchedule", "Missed scheduled time to start a job: %s", found.latest.UTC().Format(time.RFC1123Z))
			return
		}
		if deadline.After(since) {
			since = deadline
		}
	}
	if tooMany(schedule, since, now) {
		p.warn("TooManyMissedTimes", "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew")
	}
	if len(status.Active) > 0 {
		switch cj.Spec.ConcurrencyPolicy {
		case batchv1.ForbidConcurrent:
			p.note("JobAlreadyActive", "Not starting job because prior execution is running and concurrency policy is Forbid")
			return
		case batchv1.ReplaceConcurrent:
			p.replace(s, status)
		}
	}
	p.Start, p.Create = found.latest, newJob(cj, found.latest, zone)
}

func (p *Plan) replace(s Snapshot, status *batchv1.CronJobStatus) {
	for _, job := range s.Jobs {
		if slices.ContainsFunc(status.Active, func(ref corev1.ObjectReference) bool { return ref.UID == job.UID }) {
			p.Delete = append(p.Delete, job)
		}
	}
	status.Active = nil
}

// Started is what the status becomes once the Job of a plan exists.
func (p *Plan) Started(old batchv1.CronJobStatus, job *batchv1.Job) *batchv1.CronJobStatus {
	status := p.Status
	if status == nil {
		status = old.DeepCopy()
	}
	if !slices.ContainsFunc(status.Active, func(ref corev1.ObjectReference) bool { return ref.UID == job.UID }) && !jobutil.IsJobFinished(job) {
		status.Active = append(status.Active, Reference(job))
	}
	status.LastScheduleTime = &metav1.Time{Time: p.Start}
	return status
}

// Reference is how the list of active Jobs names one.
func Reference(job *batchv1.Job) corev1.ObjectReference {
	return corev1.ObjectReference{
		APIVersion: batchv1.SchemeGroupVersion.String(), Kind: "Job",
		Namespace: job.Namespace, Name: job.Name, UID: job.UID, ResourceVersion: job.ResourceVersion,
	}
}

func jobName(cj *batchv1.CronJob, at time.Time) string {
	return fmt.Sprintf("%s-%d", cj.Name, at.Unix()/60)
}

func newJob(cj *batchv1.CronJob, at time.Time, zone *time.Location) *batchv1.Job {
	template := cj.Spec.JobTemplate.DeepCopy()
	annotations := maps.Clone(template.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[batchv1.CronJobScheduledTimestampAnnotation] = at.In(zone).Format(time.RFC3339)
	return &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: cj.Namespace, Name: jobName(cj, at), Labels: template.Labels, Annotations: annotations,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(cj, Kind)},
		},
		Spec: template.Spec,
	}
}
