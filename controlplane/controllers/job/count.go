// SPDX-License-Identifier: Apache-2.0

package job

import (
	"cmp"
	"slices"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller"
)

// view is a snapshot sorted by what pods are to the Job.
type view struct {
	Snapshot
	active, terminating []*corev1.Pod
	// tracked pods have their finalizer still: they are not in a counter yet.
	tracked []*corev1.Pod
	// uncounted are the UIDs in the status whose pods are tracked; gone are how many have become countable.
	uncountedSucceeded, uncountedFailed []types.UID
	goneSucceeded, goneFailed           int32
	// succeeded and failed are how many pods did, those not counted yet included.
	succeeded, failed int32
	// completed and failedIndexes are those of an Indexed Job, the new ones included.
	completed, failedIndexes Indexes
	// awaitsSuccessor are, by index, the failed pods that must stay until the next pod of that index can be seen:
	// they alone know how often the index failed (KEP-3850).
	awaitsSuccessor map[int]*corev1.Pod
}

func look(s Snapshot) *view {
	v := &view{Snapshot: s}
	for _, pod := range s.Pods {
		switch {
		case controller.IsPodActive(pod):
			v.active = append(v.active, pod)
		case controller.IsPodTerminating(pod):
			v.terminating = append(v.terminating, pod)
		}
		if hasFinalizer(pod) && !s.Untracked[pod.UID] {
			v.tracked = append(v.tracked, pod)
		}
	}
	if indexed(s.Job) {
		slices.SortStableFunc(v.tracked, func(a, b *corev1.Pod) int { return cmp.Compare(indexOf(a), indexOf(b)) })
	}
	v.tally()
	if indexed(s.Job) {
		v.tallyIndexes()
	}
	return v
}

func (v *view) tally() {
	status := v.Job.Status
	if u := status.UncountedTerminatedPods; u != nil {
		tracked := map[types.UID]bool{}
		for _, pod := range v.tracked {
			tracked[pod.UID] = true
		}
		split := func(uids []types.UID) (still []types.UID, gone int32) {
			for _, uid := range uids {
				if tracked[uid] {
					still = append(still, uid)
				} else {
					gone++
				}
			}
			return still, gone
		}
		v.uncountedSucceeded, v.goneSucceeded = split(u.Succeeded)
		v.uncountedFailed, v.goneFailed = split(u.Failed)
	}
	v.succeeded = status.Succeeded + v.goneSucceeded + int32(len(v.uncountedSucceeded))
	v.failed = status.Failed + v.goneFailed + int32(len(v.uncountedFailed))
	for _, pod := range v.tracked {
		switch {
		case v.known(pod) || misplaced(v.Job, pod):
		case pod.Status.Phase == corev1.PodSucceeded:
			v.succeeded++
		case v.countsAsFailure(pod, nil):
			v.failed++
		}
	}
}

// known tells whether the UID of pod is in the status.
func (v *view) known(pod *corev1.Pod) bool {
	return slices.Contains(v.uncountedSucceeded, pod.UID) || slices.Contains(v.uncountedFailed, pod.UID)
}

// countsAsFailure tells whether pod adds to the failures, given what is to become of the Job.
func (v *view) countsAsFailure(pod *corev1.Pod, verdict *Verdict) bool {
	failed := hasFailed(v.Job, pod)
	if verdict != nil && pod.Status.Phase != corev1.PodSucceeded {
		switch {
		case !verdict.Success:
			// Its Job failed before it could end.
			failed = failed || pod.DeletionTimestamp != nil
		case pod.DeletionTimestamp != nil:
			// It was not needed any more, and did nothing wrong.
			failed = false
		}
	}
	if !failed {
		return false
	}
	_, counts := judgePod(v.Job, pod)
	return counts
}

func (v *view) tallyIndexes() {
	n := int(*v.Job.Spec.Completions)
	perIndex := v.Job.Spec.BackoffLimitPerIndex
	v.completed = ParseIndexes(v.Job.Status.CompletedIndexes, n)
	if v.Job.Status.FailedIndexes != nil {
		v.failedIndexes = ParseIndexes(*v.Job.Status.FailedIndexes, n)
	}
	var completed, failed []int
	for _, pod := range v.tracked {
		i := indexOf(pod)
		if misplaced(v.Job, pod) || v.failedIndexes.Has(i) || slices.Contains(v.uncountedFailed, pod.UID) {
			continue // an index that failed stays so, whatever another pod of it does
		}
		if pod.Status.Phase == corev1.PodSucceeded {
			completed = append(completed, i)
		}
	}
	v.completed = v.completed.With(completed...)
	v.succeeded = int32(v.completed.Len())
	if perIndex == nil {
		return
	}
	for _, pod := range v.tracked {
		if i := indexOf(pod); !misplaced(v.Job, pod) && !v.completed.Has(i) && failsIndex(v.Job, pod) {
			failed = append(failed, i)
		}
	}
	v.failedIndexes = v.failedIndexes.With(failed...)

	settled := v.completed.Union(v.failedIndexes).With(indexesOf(v.active)...)
	v.awaitsSuccessor = map[int]*corev1.Pod{}
	for _, pod := range v.tracked {
		i := indexOf(pod)
		if misplaced(v.Job, pod) || settled.Has(i) || !hasFailed(v.Job, pod) {
			continue
		}
		if last := v.awaitsSuccessor[i]; last == nil || laterFailure(last, pod) {
			v.awaitsSuccessor[i] = pod
		}
	}
}

// laterFailure tells whether pod knows more failures of its index than last, or the same and ended later.
func laterFailure(last, pod *corev1.Pod) bool {
	a, b := func(p *corev1.Pod) int32 { counted, ignored := failuresOf(p); return counted + ignored }, endedAt(last)
	if a(last) != a(pod) {
		return a(last) < a(pod)
	}
	return endedAt(pod).After(b)
}

// count brings the numbers of status up to date. It returns the pods that may lose their finalizer once that is
// written.
func (v *view) count(status *batchv1.JobStatus, verdict *Verdict) (release []*corev1.Pod) {
	status.Active, status.Terminating = int32(len(v.active)), new(int32(len(v.terminating)))
	status.Ready = new(int32)
	for _, pod := range v.active {
		if podutil.IsPodReady(pod) {
			*status.Ready++
		}
	}
	status.Succeeded += v.goneSucceeded
	status.Failed += v.goneFailed
	uncounted := &batchv1.UncountedTerminatedPods{Succeeded: v.uncountedSucceeded, Failed: v.uncountedFailed}
	status.UncountedTerminatedPods = uncounted
	if indexed(v.Job) {
		status.CompletedIndexes, status.Succeeded = v.completed.String(), v.succeeded
		status.FailedIndexes = nil
		if v.Job.Spec.BackoffLimitPerIndex != nil {
			status.FailedIndexes = new(v.failedIndexes.String())
		}
	}

	for _, pod := range v.tracked {
		if len(release) >= mostUncounted || len(uncounted.Succeeded)+len(uncounted.Failed) >= mostUncounted && !v.known(pod) {
			continue
		}
		if !v.mayRelease(pod, verdict) {
			continue
		}
		release = append(release, pod)
		switch {
		case v.known(pod) || misplaced(v.Job, pod):
		case pod.Status.Phase == corev1.PodSucceeded:
			// The index of an Indexed Job's pod is in completedIndexes, and there it cannot count twice.
			if !indexed(v.Job) {
				uncounted.Succeeded = append(uncounted.Succeeded, pod.UID)
			}
		case v.countsAsFailure(pod, verdict):
			uncounted.Failed = append(uncounted.Failed, pod.UID)
		}
	}
	return release
}

func (v *view) mayRelease(pod *corev1.Pod, verdict *Verdict) bool {
	switch {
	case v.Job.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded:
		return true
	case verdict != nil:
		// What still runs is deleted first, so that it can be told from what nobody has decided about.
		return !controller.IsPodActive(pod)
	case !hasFailed(v.Job, pod):
		return false
	}
	return v.awaitsSuccessor[indexOf(pod)] != pod
}
