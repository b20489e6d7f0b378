// SPDX-License-Identifier: Apache-2.0

// Package job runs pods until enough of them have succeeded.
//
// Compute looks at a Job and its pods and says what to write and what to do. A pod that ends is counted exactly once,
// in three steps that may each be the last before a crash: its UID goes into status.uncountedTerminatedPods (or its
// index into status.completedIndexes), then it loses its tracking finalizer, then the UID becomes one more in a counter
// (KEP-2307). So the status of a plan is written first, and nothing else of it is done if that fails.
package job

import (
	"slices"
	"sort"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/controller"
)

const (
	// burst is how many pods one sync creates or deletes at most; the next sync continues.
	burst = 500
	// mostUncounted is how many UIDs status.uncountedTerminatedPods holds: some 20 KB.
	mostUncounted = 500
)

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Job *batchv1.Job
	// Pods are those that the Job controls, whatever has become of them.
	Pods []*corev1.Pod
	// Untracked are the pods whose tracking finalizer was removed, though Pods may not show it yet.
	Untracked map[types.UID]bool
	// Settled says that Pods shows every pod that this controller created, and the deletion of every one it deleted.
	Settled bool
	// Backoff is what the last plan returned, nil if there was none.
	Backoff *Backoff
	// ForgetStart says that suspending a Job clears its start time (KEP-5440).
	ForgetStart bool
}

// Plan is what to do, in this order.
type Plan struct {
	// Status is the one to write, nil if nothing changed.
	Status *batchv1.JobStatus
	Events []Event
	// Release are pods that lose their finalizer: Status accounts for them.
	Release []*corev1.Pod
	// Drop are pods that lose their finalizer and are deleted, and so never count.
	Drop []*corev1.Pod
	// Delete are pods to delete. They count as failures if the Job fails.
	Delete []*corev1.Pod
	Create []NewPod
	// Wake is when to look again although nothing happens; zero for never.
	Wake    time.Duration
	Backoff Backoff
}

// Event is one of a Job's own. Creations and deletions of pods have theirs in addition.
type Event struct{ Type, Reason, Message string }

// Compute decides about a Job that has not finished.
func Compute(s Snapshot, now time.Time) Plan {
	v := look(s)
	plan := Plan{Backoff: s.Backoff.next(v)}
	status := s.Job.Status.DeepCopy()
	if status.StartTime == nil && !suspended(s.Job) {
		status.StartTime = &metav1.Time{Time: now}
	}
	verdict := v.judge(status, now)
	plan.Release = v.count(status, verdict)

	switch {
	case verdict != nil:
		plan.conclude(v, status, *verdict, now)
		if s.Settled {
			plan.Delete = v.active[:min(len(v.active), burst)]
		}
	case s.Settled && s.Job.DeletionTimestamp == nil:
		plan.setSuspended(s, status, now)
		plan.resize(v, now)
	}
	if verdict == nil {
		plan.wakeForDeadline(s.Job, status, now)
	}
	if !apiequality.Semantic.DeepEqual(status, &s.Job.Status) {
		plan.Status = status
	}
	return plan
}

// conclude writes down what becomes of the Job and, once no pod is left that runs or has to be counted, that it has
// finished.
func (p *Plan) conclude(v *view, status *batchv1.JobStatus, verdict Verdict, now time.Time) {
	setCondition(status, verdict.interim(), corev1.ConditionTrue, verdict.Reason, verdict.Message, now)
	uncounted := status.UncountedTerminatedPods
	if !v.Settled || len(v.active)+len(v.terminating)+len(p.Release)+len(uncounted.Succeeded)+len(uncounted.Failed) > 0 {
		return
	}
	setCondition(status, verdict.final(), corev1.ConditionTrue, verdict.Reason, verdict.Message, now)
	if status.StartTime == nil {
		status.StartTime = &metav1.Time{Time: now} // a suspended Job has none, a finished one must
	}
	if !verdict.Success {
		p.Events = append(p.Events, Event{corev1.EventTypeWarning, verdict.Reason, verdict.Message})
		return
	}
	status.CompletionTime = &metav1.Time{Time: now}
	if v.Job.Spec.Completions != nil && status.Succeeded > *v.Job.Spec.Completions {
		p.Events = append(p.Events, Event{corev1.EventTypeWarning, "TooManySucceededPods", "Too many succeeded pods running after completion count reached"})
	}
	p.Events = append(p.Events, Event{corev1.EventTypeNormal, "Completed", "Job completed"})
}

func (p *Plan) setSuspended(s Snapshot, status *batchv1.JobStatus, now time.Time) {
	if suspended(s.Job) {
		if setCondition(status, batchv1.JobSuspended, corev1.ConditionTrue, "JobSuspended", "Job suspended", now) {
			p.Events = append(p.Events, Event{corev1.EventTypeNormal, "Suspended", "Job suspended"})
			if s.ForgetStart {
				status.StartTime = nil
			}
		}
		return
	}
	if findCondition(status, batchv1.JobSuspended) == nil {
		return // never was
	}
	if setCondition(status, batchv1.JobSuspended, corev1.ConditionFalse, "JobResumed", "Job resumed", now) {
		p.Events = append(p.Events, Event{corev1.EventTypeNormal, "Resumed", "Job resumed"})
		// The active deadline is about the time since then.
		status.StartTime = &metav1.Time{Time: now}
	}
}

// resize brings the number of active pods to what is wanted. Removing goes first; then pods are created by the next
// sync, from what is left.
func (p *Plan) resize(v *view, now time.Time) {
	job, active := v.Job, len(v.active)
	if suspended(job) {
		p.Drop = v.active[:min(active, burst)]
		return
	}
	want := int(*job.Spec.Parallelism)
	switch {
	case job.Spec.Completions != nil:
		want = max(0, min(want, int(*job.Spec.Completions-v.succeeded)))
	case v.succeeded > 0:
		// Whoever shares a queue of work knows by a success that it is empty: the others finish what they have.
		want = active
	}
	if p.Drop = superfluous(job, v.active, active-want); len(p.Drop) > 0 {
		p.Drop = p.Drop[:min(len(p.Drop), burst)]
		return
	}
	missing := want - active
	if onlyReplaceFailed(job) {
		missing -= len(v.terminating)
	}
	if missing <= 0 {
		return
	}
	missing = min(missing, burst)
	if job.Spec.BackoffLimitPerIndex == nil {
		if p.Wake = p.Backoff.remaining(now); p.Wake > 0 {
			return
		}
	}
	if !indexed(job) {
		p.Create = slices.Repeat([]NewPod{{Index: noIndex}}, missing)
		return
	}
	p.createIndexes(v, missing, now)
}

// createIndexes fills the lowest free indexes. One whose last pod failed a moment ago lets the others go first.
func (p *Plan) createIndexes(v *view, missing int, now time.Time) {
	taken := v.completed.Union(v.failedIndexes).With(indexesOf(v.active)...)
	if onlyReplaceFailed(v.Job) {
		taken = taken.With(indexesOf(v.terminating)...)
	}
	var wake time.Duration
	for i := range taken.Missing(int(*v.Job.Spec.Completions)) {
		if len(p.Create) == missing {
			break
		}
		pod := NewPod{Index: i}
		if last := v.awaitsSuccessor[i]; last != nil {
			counted, ignored := failuresOf(last)
			if d := backoff(counted+ignored+1, endedAt(last), now); d > 0 {
				if wake == 0 || d < wake {
					wake = d
				}
				continue
			}
			if _, counts := judgePod(v.Job, last); counts {
				counted++
			} else {
				ignored++
			}
			pod.Failures, pod.Ignored = counted, ignored
		}
		p.Create = append(p.Create, pod)
	}
	if len(p.Create) < missing {
		p.Wake = wake // otherwise the end of one of these comes first
	}
}

func indexesOf(pods []*corev1.Pod) []int {
	var indexes []int
	for _, pod := range pods {
		if i := indexOf(pod); i != noIndex {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

// superfluous picks pods to remove: all that have a wrong index or share one, and then, up to excess in all, those
// that have done least.
func superfluous(job *batchv1.Job, active []*corev1.Pod, excess int) []*corev1.Pod {
	pods := slices.Clone(active)
	sort.Sort(controller.ActivePods(pods))
	if !indexed(job) {
		return pods[:max(0, excess)]
	}
	var remove, keep []*corev1.Pod
	seen := map[int]bool{}
	for _, pod := range slices.Backward(pods) { // the one that has done most keeps the index
		if misplaced(job, pod) || seen[indexOf(pod)] {
			remove = append(remove, pod)
			continue
		}
		seen[indexOf(pod)] = true
		keep = append(keep, pod)
	}
	slices.Reverse(keep)
	return append(remove, keep[:max(0, min(len(keep), excess-len(remove)))]...)
}

func (p *Plan) wakeForDeadline(job *batchv1.Job, status *batchv1.JobStatus, now time.Time) {
	if job.Spec.ActiveDeadlineSeconds == nil || suspended(job) || status.StartTime == nil {
		return
	}
	left := status.StartTime.Add(time.Duration(*job.Spec.ActiveDeadlineSeconds) * time.Second).Sub(now)
	if left > 0 && (p.Wake == 0 || left < p.Wake) {
		p.Wake = left
	}
}

func findCondition(status *batchv1.JobStatus, kind batchv1.JobConditionType) *batchv1.JobCondition {
	for i := range status.Conditions {
		if status.Conditions[i].Type == kind {
			return &status.Conditions[i]
		}
	}
	return nil
}

func isTrue(status *batchv1.JobStatus, kind batchv1.JobConditionType) bool {
	c := findCondition(status, kind)
	return c != nil && c.Status == corev1.ConditionTrue
}

// setCondition reports whether that changed anything.
func setCondition(status *batchv1.JobStatus, kind batchv1.JobConditionType, value corev1.ConditionStatus, reason, message string, now time.Time) bool {
	at := metav1.NewTime(now)
	set := batchv1.JobCondition{Type: kind, Status: value, Reason: reason, Message: message, LastProbeTime: at, LastTransitionTime: at}
	c := findCondition(status, kind)
	switch {
	case c == nil:
		status.Conditions = append(status.Conditions, set)
	case c.Status == value && c.Reason == reason && c.Message == message:
		return false
	default:
		*c = set
	}
	return true
}

// Finished tells whether a Job is over.
func Finished(job *batchv1.Job) bool {
	return isTrue(&job.Status, batchv1.JobComplete) || isTrue(&job.Status, batchv1.JobFailed)
}
