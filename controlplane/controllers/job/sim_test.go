// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/batch"
	_ "k8s.io/kubernetes/pkg/apis/batch/install"
	"k8s.io/kubernetes/pkg/controller"
	registry "k8s.io/kubernetes/pkg/registry/batch/job"
	"pgregory.net/rapid"
)

// world is an API server, a controller with caches that lag behind it one object at a time and that may crash between
// any two of its writes, and pods.
type world struct {
	*rapid.T
	job  *batchv1.Job
	pods map[types.UID]*corev1.Pod
	now  time.Time
	rv   int

	cachedJob  *batchv1.Job
	cachedPods map[types.UID]*corev1.Pod
	memory     memory
	// created and deleted are what the controller waits to see.
	created, deleted sets.Set[types.UID]
	next             int

	// released are the pods that lost their finalizer after they were counted, by how.
	releasedAs map[types.UID]corev1.PodPhase
	most       int
	// failures are how often an index failed, unless it was dropped: a Job that is suspended forgets.
	failures map[int]int
	dropped  map[int]bool
}

func newWorld(t *rapid.T, job *batchv1.Job) *world {
	w := &world{
		T: t, job: job, pods: map[types.UID]*corev1.Pod{}, now: now, rv: 1,
		releasedAs: map[types.UID]corev1.PodPhase{}, most: int(*job.Spec.Parallelism),
		failures: map[int]int{}, dropped: map[int]bool{},
	}
	w.restart()
	return w
}

// restart begins with fresh lists and an empty memory.
func (w *world) restart() {
	w.memory, w.created, w.deleted = memory{}, sets.New[types.UID](), sets.New[types.UID]()
	w.cachedJob, w.cachedPods = w.job, maps.Clone(w.pods)
}

// change writes a pod. It is gone once it is deleted, has ended and has no finalizer.
func (w *world) change(uid types.UID, edit func(*corev1.Pod)) {
	pod := w.pods[uid].DeepCopy()
	edit(pod)
	w.rv++
	pod.ResourceVersion = strconv.Itoa(w.rv)
	w.pods[uid] = pod
	if pod.DeletionTimestamp != nil && !hasFinalizer(pod) && !controller.IsPodTerminating(pod) {
		delete(w.pods, uid)
	}
	w.checkPods()
}

// deliver brings the cache up to date about one pod.
func (w *world) deliver(uid types.UID) {
	pod, exists := w.pods[uid]
	if !exists {
		delete(w.cachedPods, uid)
		w.deleted.Delete(uid)
		w.created.Delete(uid)
		w.memory.untrackSeen(uid)
		return
	}
	w.cachedPods[uid] = pod
	w.created.Delete(uid)
	if pod.DeletionTimestamp != nil {
		w.deleted.Delete(uid)
	}
	if !hasFinalizer(pod) {
		w.memory.untrackSeen(uid)
	}
}

// sync does what the controller does, and dies after so many writes. It reports whether it wrote anything.
func (w *world) sync(writes int) (wrote bool) {
	job := w.cachedJob
	if Finished(job) || w.memory.written(job.UID).newerThan(job.ResourceVersion) {
		return false
	}
	alive := func() bool {
		writes--
		if writes < 0 {
			w.restart()
			return false
		}
		wrote = true
		return true
	}
	s := Snapshot{Job: job, Untracked: w.memory.untracked(job.UID), Settled: w.created.Len()+w.deleted.Len() == 0, Backoff: w.memory.backoff(job.UID), ForgetStart: true}
	for _, uid := range slices.Sorted(maps.Keys(w.cachedPods)) {
		s.Pods = append(s.Pods, w.cachedPods[uid])
	}
	plan := Compute(s, w.now)
	if plan.Status != nil {
		if !alive() || job.ResourceVersion != w.job.ResourceVersion {
			return wrote // dead, or a conflict
		}
		w.writeStatus(plan.Status)
	}
	w.memory.setBackoff(job.UID, plan.Backoff)
	for _, pod := range plan.Release {
		if !alive() {
			return true
		}
		w.release(pod.UID)
	}
	for _, pod := range plan.Drop {
		if hasFinalizer(pod) {
			if !alive() {
				return true
			}
			if cur := w.pods[pod.UID]; cur == nil || cur.ResourceVersion != pod.ResourceVersion {
				continue // a conflict
			}
			w.memory.untrack(w.job.UID, pod.UID)
			w.dropped[indexOf(pod)] = true
			w.change(pod.UID, func(p *corev1.Pod) { p.Finalizers = nil })
		}
		w.deleted.Insert(pod.UID)
		if !alive() {
			return true
		}
		w.delete(pod.UID)
	}
	for _, pod := range plan.Delete {
		w.deleted.Insert(pod.UID)
		if !alive() {
			return true
		}
		w.delete(pod.UID)
	}
	common := Template(job)
	for _, p := range plan.Create {
		if !alive() {
			return true
		}
		w.create(p.For(job, common))
	}
	return wrote
}

func (w *world) writeStatus(status *batchv1.JobStatus) {
	w.Helper()
	job := w.job.DeepCopy()
	job.Status = *status.DeepCopy()
	validate(w, job, w.job)
	w.rv++
	job.ResourceVersion = strconv.Itoa(w.rv)
	w.job = job
	w.memory.wrote(job.UID, version(job.ResourceVersion))
}

// validate asks upstream whether it accepts the change of a status.
func validate(t interface {
	Helper()
	Fatalf(string, ...any)
}, cur, old *batchv1.Job) {
	t.Helper()
	internal := [2]batch.Job{}
	for i, job := range []*batchv1.Job{cur, old} {
		if err := legacyscheme.Scheme.Convert(job.DeepCopy(), &internal[i], nil); err != nil {
			t.Fatalf("convert: %v", err)
		}
	}
	if errs := registry.StatusStrategy.ValidateUpdate(context.Background(), &internal[0], &internal[1]); len(errs) > 0 {
		t.Fatalf("status %+v after %+v: %v", cur.Status, old.Status, errs.ToAggregate())
	}
}

// release removes the finalizer of a pod that counts, if it still has it.
func (w *world) release(uid types.UID) {
	w.Helper()
	pod := w.pods[uid]
	if pod == nil || !hasFinalizer(pod) {
		w.Fatalf("pod %s is released again", uid)
	}
	u := w.job.Status.UncountedTerminatedPods
	inSucceeded, inFailed := slices.Contains(u.Succeeded, uid), slices.Contains(u.Failed, uid)
	switch {
	case indexed(w.job) && pod.Status.Phase == corev1.PodSucceeded && !inFailed &&
		ParseIndexes(w.job.Status.CompletedIndexes, 1000).Has(indexOf(pod)):
		w.releasedAs[uid] = corev1.PodSucceeded
	case inSucceeded:
		w.releasedAs[uid] = corev1.PodSucceeded
	case inFailed:
		w.releasedAs[uid] = corev1.PodFailed
		w.failures[indexOf(pod)]++
	case isTrue(&w.job.Status, batchv1.JobSuccessCriteriaMet) && pod.DeletionTimestamp != nil, ignored(w.job, pod):
		// Nobody needs it any more; it may even have succeeded since the cache saw it.
		w.releasedAs[uid] = ""
	default:
		w.Fatalf("pod %s (%s) is released though nothing counts it: %q, %+v", uid, pod.Status.Phase, w.job.Status.CompletedIndexes, u)
	}
	w.memory.untrack(w.job.UID, uid)
	w.change(uid, func(p *corev1.Pod) { p.Finalizers = nil })
}

func ignored(job *batchv1.Job, pod *corev1.Pod) bool {
	_, counts := judgePod(job, pod)
	return !counts
}

func (w *world) delete(uid types.UID) {
	if w.pods[uid] == nil || w.pods[uid].DeletionTimestamp != nil {
		return
	}
	w.change(uid, func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: w.now} })
}

func (w *world) create(template *corev1.PodTemplateSpec, _ string) {
	w.next++
	w.rv++
	uid := types.UID(fmt.Sprintf("pod-%03d", w.next))
	w.pods[uid] = &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: string(uid), UID: uid, ResourceVersion: strconv.Itoa(w.rv), CreationTimestamp: metav1.NewTime(w.now),
			Finalizers: slices.Clone(template.Finalizers), Annotations: maps.Clone(template.Annotations),
		},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
	w.created.Insert(uid)
	w.checkPods()
	if i := indexOf(w.pods[uid]); w.job.Spec.BackoffLimitPerIndex != nil && !w.dropped[i] {
		failures := w.failures[i]
		for uid, pod := range w.cachedPods { // what it can know
			if _, counted := w.releasedAs[uid]; !counted && indexOf(pod) == i && hasFinalizer(pod) && hasFailed(w.job, pod) && !ignored(w.job, pod) {
				failures++
			}
		}
		if got := template.Annotations[batchv1.JobIndexFailureCountAnnotation]; got != strconv.Itoa(failures) {
			w.Fatalf("index %d failed %d times, its next pod says %q", i, failures, got)
		}
	}
}

// checkPods says what must hold at every moment.
func (w *world) checkPods() {
	w.Helper()
	active, seen := 0, map[int]bool{}
	for _, pod := range w.pods {
		if !controller.IsPodActive(pod) {
			continue
		}
		active++
		if i := indexOf(pod); i != noIndex && seen[i] {
			w.Fatalf("two pods work on index %d", i)
		} else {
			seen[i] = true
		}
	}
	if active > w.most {
		w.Fatalf("%d pods are active, at most %d may be", active, w.most)
	}
}

// checkCounts says that every pod that was released counts once.
func (w *world) checkCounts() {
	w.Helper()
	var succeeded, failed int32
	for _, phase := range w.releasedAs {
		switch phase {
		case corev1.PodSucceeded:
			succeeded++
		case corev1.PodFailed:
			failed++
		}
	}
	s := w.job.Status
	if !indexed(w.job) && s.Succeeded != succeeded || s.Failed != failed {
		w.Fatalf("%d succeeded and %d failed, but the pods did %d and %d times", s.Succeeded, s.Failed, succeeded, failed)
	}
}

func (w *world) drawPod(label string) types.UID {
	if len(w.pods) == 0 {
		return ""
	}
	return rapid.SampledFrom(slices.Sorted(maps.Keys(w.pods))).Draw(w.T, label)
}

// act lets something happen to a pod.
func (w *world) act(uid types.UID) {
	pod := w.pods[uid]
	if pod == nil {
		return
	}
	end := func(phase corev1.PodPhase, code int32) {
		w.change(uid, func(p *corev1.Pod) {
			p.Status.Phase = phase
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.NewTime(w.now)}}}}
		})
	}
	ended := pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
	switch rapid.IntRange(0, 6).Draw(w.T, "to the pod") {
	case 0, 1:
		if !ended {
			end(corev1.PodSucceeded, 0)
		}
	case 2:
		if !ended {
			end(corev1.PodFailed, rapid.Int32Range(1, 3).Draw(w.T, "exit code"))
		}
	case 3:
		w.delete(uid)
	case 4:
		if !ended && pod.DeletionTimestamp != nil {
			end(corev1.PodFailed, 137)
		}
	default:
		if pod.Status.Phase == corev1.PodPending {
			w.change(uid, func(p *corev1.Pod) {
				p.Status.Phase = corev1.PodRunning
				p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
			})
		}
	}
}

func (w *world) setSpec(edit func(*batchv1.JobSpec)) {
	w.job = w.job.DeepCopy()
	edit(&w.job.Spec)
	w.rv++
	w.job.ResourceVersion = strconv.Itoa(w.rv)
}

// settle lets everybody finish: the caches catch up, and pods succeed.
func (w *world) settle() {
	w.Helper()
	for range 400 {
		w.cachedJob = w.job
		for _, uid := range slices.Sorted(maps.Keys(w.cachedPods)) {
			w.deliver(uid)
		}
		for _, uid := range slices.Sorted(maps.Keys(w.pods)) {
			w.deliver(uid)
		}
		if Finished(w.job) {
			break
		}
		if w.sync(1000) {
			continue
		}
		progress := false
		for uid, pod := range w.pods {
			if pod.Status.Phase == corev1.PodPending || pod.Status.Phase == corev1.PodRunning {
				progress = true
				w.change(uid, func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })
			}
		}
		if !progress {
			w.now = w.now.Add(time.Minute) // a back-off
		}
	}
	if !Finished(w.job) {
		w.Fatalf("the job does not finish: %+v", w.job.Status)
	}
	for uid, pod := range w.pods {
		if hasFinalizer(pod) {
			w.Fatalf("pod %s keeps its finalizer", uid)
		}
		if controller.IsPodActive(pod) {
			w.Fatalf("pod %s runs on", uid)
		}
	}
	w.checkCounts()
}

func drawJob(t *rapid.T) *batchv1.Job {
	job := newJob(rapid.Int32Range(1, 4).Draw(t, "parallelism"), rapid.Int32Range(0, 6).Draw(t, "completions"))
	*job.Spec.BackoffLimit = rapid.Int32Range(0, 6).Draw(t, "backoffLimit")
	job.Spec.PodReplacementPolicy = new(rapid.SampledFrom([]batchv1.PodReplacementPolicy{batchv1.Failed, batchv1.TerminatingOrFailed}).Draw(t, "replacement"))
	if rapid.Bool().Draw(t, "deadline") {
		job.Spec.ActiveDeadlineSeconds = new(int64(120))
	}
	switch rapid.IntRange(0, 3).Draw(t, "kind") {
	case 0:
		job.Spec.Completions = nil
	case 1:
		job.Spec.CompletionMode = new(batchv1.IndexedCompletion)
	case 2:
		job.Spec.CompletionMode = new(batchv1.IndexedCompletion)
		*job.Spec.BackoffLimit = 1 << 30
		job.Spec.BackoffLimitPerIndex = new(rapid.Int32Range(0, 2).Draw(t, "per index"))
		if rapid.Bool().Draw(t, "bounded") {
			job.Spec.MaxFailedIndexes = new(rapid.Int32Range(0, 2).Draw(t, "maxFailedIndexes"))
		}
		if rapid.Bool().Draw(t, "success policy") {
			job.Spec.SuccessPolicy = &batchv1.SuccessPolicy{Rules: []batchv1.SuccessPolicyRule{{SucceededCount: new(int32(2))}}}
		}
	}
	if rapid.Bool().Draw(t, "failure policy") {
		worst := batchv1.PodFailurePolicyActionFailJob
		if job.Spec.BackoffLimitPerIndex != nil {
			worst = batchv1.PodFailurePolicyActionFailIndex
		}
		rule := func(action batchv1.PodFailurePolicyAction, code int32) batchv1.PodFailurePolicyRule {
			return batchv1.PodFailurePolicyRule{Action: action, OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{
				Operator: batchv1.PodFailurePolicyOnExitCodesOpIn, Values: []int32{code},
			}}
		}
		job.Spec.PodReplacementPolicy = new(batchv1.Failed)
		job.Spec.PodFailurePolicy = &batchv1.PodFailurePolicy{Rules: []batchv1.PodFailurePolicyRule{rule(batchv1.PodFailurePolicyActionIgnore, 2), rule(worst, 3)}}
	}
	return job
}

// Whatever happens to pods, in whichever order the caches learn of it, and wherever the controller dies: upstream
// accepts every status, no more pods run than may, no index has two, every pod counts once, and the Job finishes.
func TestCountsExactly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, drawJob(t))
		for range rapid.IntRange(0, 120).Draw(t, "steps") {
			switch rapid.IntRange(0, 11).Draw(t, "step") {
			case 0, 1, 2:
				w.sync(1000)
			case 3:
				w.sync(rapid.IntRange(0, 6).Draw(t, "writes before the crash"))
			case 4, 5:
				w.cachedJob = w.job
			case 6, 7:
				known := sets.KeySet(w.pods).Union(sets.KeySet(w.cachedPods))
				if known.Len() > 0 {
					w.deliver(rapid.SampledFrom(sets.List(known)).Draw(t, "deliver"))
				}
			case 8, 9:
				w.act(w.drawPod("act"))
			case 10:
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 30).Draw(t, "seconds")) * time.Second)
			case 11:
				w.setSpec(func(s *batchv1.JobSpec) { s.Suspend = new(rapid.Bool().Draw(t, "suspend")) })
			}
		}
		w.setSpec(func(s *batchv1.JobSpec) { s.Suspend = new(false) })
		w.settle()
	})
}
