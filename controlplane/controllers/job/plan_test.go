// SPDX-License-Identifier: Apache-2.0

package job

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var now = time.Unix(1700000000, 0)

func newJob(parallelism, completions int32) *batchv1.Job {
	return &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "j", UID: "job", ResourceVersion: "1"},
		Spec: batchv1.JobSpec{
			Parallelism: &parallelism, Completions: &completions, BackoffLimit: new(int32(6)),
			CompletionMode: new(batchv1.NonIndexedCompletion), Suspend: new(false), ManualSelector: new(true),
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"job": "j"}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"job": "j"}},
				Spec:       corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
			},
		},
	}
}

type podOption func(*corev1.Pod)

func newPod(name string, options ...podOption) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, UID: types.UID(name), Finalizers: []string{batchv1.JobTrackingFinalizer},
			CreationTimestamp: metav1.NewTime(now.Add(-time.Hour)), Annotations: map[string]string{},
		},
		Spec:   corev1.PodSpec{NodeName: "n"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, option := range options {
		option(pod)
	}
	return pod
}

func ended(phase corev1.PodPhase, code int32, ago time.Duration) podOption {
	return func(p *corev1.Pod) {
		p.Status.Phase = phase
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{
			Terminated: &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.NewTime(now.Add(-ago))},
		}}}
	}
}

// Both ended long ago.
func succeeded(p *corev1.Pod)      { ended(corev1.PodSucceeded, 0, time.Hour)(p) }
func failed(p *corev1.Pod)         { ended(corev1.PodFailed, 1, time.Hour)(p) }
func failedWith(c int32) podOption { return ended(corev1.PodFailed, c, time.Hour) }
func going(p *corev1.Pod)          { p.DeletionTimestamp = &metav1.Time{Time: now} }
func counted(p *corev1.Pod)        { p.Finalizers = nil }
func unassigned(p *corev1.Pod)     { p.Spec.NodeName, p.Status.Phase = "", corev1.PodPending }
func ready(p *corev1.Pod) {
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
}
func restarted(n int32) podOption {
	return func(p *corev1.Pod) { p.Status.ContainerStatuses = []corev1.ContainerStatus{{RestartCount: n}} }
}
func disrupted(p *corev1.Pod) {
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue})
}
func at(index int) podOption {
	return func(p *corev1.Pod) { p.Annotations[batchv1.JobCompletionIndexAnnotation] = strconv.Itoa(index) }
}
func failures(counted, ignored int) podOption {
	return func(p *corev1.Pod) {
		p.Annotations[batchv1.JobIndexFailureCountAnnotation] = strconv.Itoa(counted)
		p.Annotations[batchv1.JobIndexIgnoredFailureCountAnnotation] = strconv.Itoa(ignored)
	}
}

type jobOption func(*batchv1.Job)

func started(job *batchv1.Job) *batchv1.Job {
	job.Status.StartTime = &metav1.Time{Time: now.Add(-time.Minute)}
	return job
}

func with(job *batchv1.Job, options ...jobOption) *batchv1.Job {
	for _, option := range options {
		option(job)
	}
	return job
}
func workQueue(j *batchv1.Job) { j.Spec.Completions = nil }
func indexedMode(j *batchv1.Job) {
	j.Spec.CompletionMode = new(batchv1.IndexedCompletion)
}
func perIndex(limit int32) jobOption {
	return func(j *batchv1.Job) {
		indexedMode(j)
		j.Spec.BackoffLimitPerIndex, j.Spec.BackoffLimit = &limit, new(int32(1<<31-1))
	}
}
func suspend(j *batchv1.Job)    { j.Spec.Suspend = new(true) }
func onlyFailed(j *batchv1.Job) { j.Spec.PodReplacementPolicy = new(batchv1.Failed) }
func deleted(j *batchv1.Job)    { j.DeletionTimestamp = &metav1.Time{Time: now} }
func limit(n int32) jobOption   { return func(j *batchv1.Job) { j.Spec.BackoffLimit = &n } }
func failPolicy(rules ...batchv1.PodFailurePolicyRule) jobOption {
	return func(j *batchv1.Job) { j.Spec.PodFailurePolicy = &batchv1.PodFailurePolicy{Rules: rules} }
}
func successPolicy(rules ...batchv1.SuccessPolicyRule) jobOption {
	return func(j *batchv1.Job) { j.Spec.SuccessPolicy = &batchv1.SuccessPolicy{Rules: rules} }
}
func onCode(action batchv1.PodFailurePolicyAction, op batchv1.PodFailurePolicyOnExitCodesOperator, codes ...int32) batchv1.PodFailurePolicyRule {
	return batchv1.PodFailurePolicyRule{Action: action, OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: op, Values: codes}}
}
func onDisruption(action batchv1.PodFailurePolicyAction) batchv1.PodFailurePolicyRule {
	return batchv1.PodFailurePolicyRule{Action: action, OnPodConditions: []batchv1.PodFailurePolicyOnPodConditionsPattern{
		{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue},
	}}
}

// describe puts a plan into a line.
func describe(p Plan, job *batchv1.Job) string {
	status := job.Status
	if p.Status != nil {
		status = *p.Status
	}
	var parts []string
	add := func(what string, names []string) {
		if len(names) > 0 {
			slices.Sort(names)
			parts = append(parts, what+" "+strings.Join(names, ","))
		}
	}
	name := func(pods []*corev1.Pod) (names []string) {
		for _, pod := range pods {
			names = append(names, pod.Name)
		}
		return names
	}
	var create, kinds []string
	for _, pod := range p.Create {
		if pod.Index == noIndex {
			create = append(create, "one")
		} else {
			create = append(create, fmt.Sprint(pod.Index))
		}
	}
	for _, c := range status.Conditions {
		if c.Status == corev1.ConditionTrue {
			kinds = append(kinds, string(c.Type)+"/"+c.Reason)
		}
	}
	add("create", create)
	add("drop", name(p.Drop))
	add("delete", name(p.Delete))
	add("release", name(p.Release))
	if u := status.UncountedTerminatedPods; u != nil {
		for what, uids := range map[string][]types.UID{"+succeeded": u.Succeeded, "+failed": u.Failed} {
			var names []string
			for _, uid := range uids {
				names = append(names, string(uid))
			}
			add(what, names)
		}
	}
	if status.CompletedIndexes != "" {
		parts = append(parts, "completed "+status.CompletedIndexes)
	}
	if status.FailedIndexes != nil && *status.FailedIndexes != "" {
		parts = append(parts, "lost "+*status.FailedIndexes)
	}
	if p.Wake > 0 {
		parts = append(parts, "wake "+p.Wake.String())
	}
	add("is", kinds)
	slices.Sort(parts)
	return strings.Join(parts, "; ")
}

func TestCompute(t *testing.T) {
	const (
		fail, index, ignore, count = batchv1.PodFailurePolicyActionFailJob, batchv1.PodFailurePolicyActionFailIndex, batchv1.PodFailurePolicyActionIgnore, batchv1.PodFailurePolicyActionCount
		in, notIn                  = batchv1.PodFailurePolicyOnExitCodesOpIn, batchv1.PodFailurePolicyOnExitCodesOpNotIn
	)
	for _, tt := range []struct {
		name string
		job  *batchv1.Job
		pods []*corev1.Pod
		want string
	}{
		{"begins with as many as may", newJob(2, 3), nil, "create one,one"},
		{"needs no more than are missing", newJob(5, 3), []*corev1.Pod{newPod("a", succeeded)}, "+succeeded a; create one,one; release a"},
		{"runs what it needs", newJob(2, 3), []*corev1.Pod{newPod("a"), newPod("b")}, ""},
		{"bursts", newJob(2000, 2000), nil, "create " + strings.TrimSuffix(strings.Repeat("one,", burst), ",")},
		{"too many: the least goes uncounted", newJob(1, 3), []*corev1.Pod{newPod("a", ready), newPod("b", unassigned)}, "drop b"},
		{"deleted: pods are let go", with(newJob(2, 3), deleted), []*corev1.Pod{newPod("a"), newPod("b", failed)}, "+failed b; release a,b"},

		{"all done", newJob(2, 1), []*corev1.Pod{newPod("a", succeeded)}, "+succeeded a; is SuccessCriteriaMet/CompletionsReached; release a"},
		{"all counted", newJob(2, 1), []*corev1.Pod{newPod("a", succeeded, counted)}, "create one"},
		{"nothing to do", newJob(2, 0), nil, "is Complete/CompletionsReached,SuccessCriteriaMet/CompletionsReached"},
		{"nothing to do, suspended", with(newJob(2, 0), suspend), nil, "is Complete/CompletionsReached,SuccessCriteriaMet/CompletionsReached"},
		{"done, but one too many runs", newJob(2, 1), []*corev1.Pod{newPod("a", succeeded), newPod("b")}, "+succeeded a; drop b; release a"},
		{"work queue: fills", with(newJob(2, 0), workQueue), nil, "create one,one"},
		{"work queue: after a success none is added", with(newJob(3, 0), workQueue), []*corev1.Pod{newPod("a", succeeded), newPod("b")}, "+succeeded a; release a"},
		{"work queue: all ended", with(newJob(3, 0), workQueue), []*corev1.Pod{newPod("a", succeeded), newPod("b", failed)}, "+failed b; +succeeded a; is SuccessCriteriaMet/CompletionsReached; release a,b"},

		{"failures are made up for", newJob(1, 2), []*corev1.Pod{newPod("a", failed)}, "+failed a; create one; release a"},
		{"not before the back-off", newJob(1, 2), []*corev1.Pod{newPod("a", ended(corev1.PodFailed, 1, 4*time.Second))}, "+failed a; release a; wake 6s"},
		{"which grows", newJob(1, 2), []*corev1.Pod{newPod("a", failed), newPod("b", failed), newPod("c", ended(corev1.PodFailed, 1, 4*time.Second))}, "+failed a,b,c; release a,b,c; wake 36s"},
		{"and ends with a success", newJob(1, 2), []*corev1.Pod{newPod("a", ended(corev1.PodFailed, 1, 4*time.Second)), newPod("b", ended(corev1.PodSucceeded, 0, 3*time.Second))}, "+failed a; +succeeded b; create one; release a,b"},
		{"going counts as failed", newJob(2, 2), []*corev1.Pod{newPod("a"), newPod("b", going)}, "+failed b; release b; wake 10s"},
		{"or holds its place", with(newJob(2, 2), onlyFailed), []*corev1.Pod{newPod("a"), newPod("b", going)}, ""},
		{"until it ends", with(newJob(2, 2), onlyFailed), []*corev1.Pod{newPod("a"), newPod("b", going, failed)}, "+failed b; create one; release b"},
		{"limit reached", with(newJob(2, 2), limit(0)), []*corev1.Pod{newPod("a", failed), newPod("b")}, "+failed a; delete b; is FailureTarget/BackoffLimitExceeded; release a"},
		{"restarts count", with(newJob(1, 1), limit(2), func(j *batchv1.Job) { j.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }), []*corev1.Pod{newPod("a", restarted(2))}, "delete a; is FailureTarget/BackoffLimitExceeded"},
		{"restarts below the limit", with(newJob(1, 1), limit(2), func(j *batchv1.Job) { j.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyOnFailure }), []*corev1.Pod{newPod("a", restarted(1))}, ""},
		{"deadline to come", with(started(newJob(1, 1)), func(j *batchv1.Job) { j.Spec.ActiveDeadlineSeconds = new(int64(90)) }), []*corev1.Pod{newPod("a")}, "wake 30s"},
		{"deadline over", with(started(newJob(1, 1)), func(j *batchv1.Job) { j.Spec.ActiveDeadlineSeconds = new(int64(60)) }), []*corev1.Pod{newPod("a")}, "delete a; is FailureTarget/DeadlineExceeded"},
		{"deadline while suspended", with(started(newJob(1, 1)), suspend, func(j *batchv1.Job) { j.Spec.ActiveDeadlineSeconds = new(int64(60)) }), nil, "is Suspended/JobSuspended"},

		{"suspended: drops", with(newJob(2, 2), suspend), []*corev1.Pod{newPod("a")}, "drop a; is Suspended/JobSuspended"},
		{"suspended: counts", with(newJob(2, 2), suspend), []*corev1.Pod{newPod("a", succeeded)}, "+succeeded a; is Suspended/JobSuspended; release a"},

		{"indexes: lowest first", with(newJob(2, 5), indexedMode), []*corev1.Pod{newPod("a", at(1))}, "create 0"},
		{"indexes: done ones are passed over", with(newJob(2, 4), indexedMode), []*corev1.Pod{newPod("a", at(1), succeeded), newPod("b", at(0), failed)}, "+failed b; completed 1; create 0,2; release a,b"},
		{"indexes: twins, strangers and nobodies go", with(newJob(5, 2), indexedMode), []*corev1.Pod{newPod("a", at(0), ready), newPod("b", at(0)), newPod("c", at(7)), newPod("d")}, "drop b,c,d"},
		{"indexes: strangers do not count", with(newJob(1, 1), indexedMode), []*corev1.Pod{newPod("a", at(7), succeeded), newPod("b", failed)}, "create 0; release a,b"},
		{"indexes: one that is going holds its place", with(newJob(2, 2), indexedMode, onlyFailed), []*corev1.Pod{newPod("a", at(0), going)}, "create 1"},
		{"per index: tries again, and keeps the last", with(newJob(2, 2), perIndex(1)), []*corev1.Pod{newPod("a", at(0), failed), newPod("b", at(1))}, "create 0"},
		{"per index: until the next is seen", with(newJob(2, 2), perIndex(1)), []*corev1.Pod{newPod("a", at(0), failed), newPod("b", at(1)), newPod("c", at(0))}, "+failed a; release a"},
		{"per index: gives up", with(newJob(2, 2), perIndex(1)), []*corev1.Pod{newPod("a", at(0), failed, failures(1, 0)), newPod("b", at(1))}, "+failed a; lost 0; release a"},
		{"per index: others need not wait", with(newJob(1, 2), perIndex(3)), []*corev1.Pod{newPod("a", at(0), ended(corev1.PodFailed, 1, time.Second))}, "create 1"},
		{"per index: waits longer each time", with(newJob(2, 1), perIndex(3)), []*corev1.Pod{newPod("a", at(0), ended(corev1.PodFailed, 1, time.Second), failures(1, 1))}, "wake 39s"},
		{"per index: all ended", with(newJob(2, 2), perIndex(0)), []*corev1.Pod{newPod("a", at(0), failed), newPod("b", at(1), succeeded)}, "+failed a; completed 1; is FailureTarget/FailedIndexes; lost 0; release a,b"},
		{"per index: too many", with(newJob(3, 3), perIndex(0), func(j *batchv1.Job) { j.Spec.MaxFailedIndexes = new(int32(0)) }), []*corev1.Pod{newPod("a", at(0), failed), newPod("b", at(1))}, "+failed a; delete b; is FailureTarget/MaxFailedIndexesExceeded; lost 0; release a"},
		{"per index: failed stays failed", with(newJob(2, 2), perIndex(0), func(j *batchv1.Job) { j.Status.FailedIndexes = new("0") }), []*corev1.Pod{newPod("a", at(0), succeeded), newPod("b", at(1))}, "lost 0; release a"},

		{"policy: fails the job", with(newJob(2, 2), failPolicy(onCode(fail, in, 3, 42))), []*corev1.Pod{newPod("a", failedWith(42)), newPod("b")}, "+failed a; delete b; is FailureTarget/PodFailurePolicy; release a"},
		{"policy: another code", with(newJob(1, 2), failPolicy(onCode(fail, in, 3))), []*corev1.Pod{newPod("a", failedWith(42))}, "+failed a; create one; release a"},
		{"policy: every other code", with(newJob(1, 2), failPolicy(onCode(fail, notIn, 3))), []*corev1.Pod{newPod("a", failedWith(42))}, "+failed a; is FailureTarget/PodFailurePolicy; release a"},
		{"policy: the first that fits", with(newJob(1, 2), failPolicy(onCode(count, in, 42), onCode(fail, notIn, 3))), []*corev1.Pod{newPod("a", failedWith(42))}, "+failed a; create one; release a"},
		{"policy: ignores", with(newJob(1, 2), limit(0), failPolicy(onDisruption(ignore))), []*corev1.Pod{newPod("a", failed, disrupted)}, "create one; release a"},
		{"policy: waits for the end", with(newJob(1, 2), failPolicy(onDisruption(ignore))), []*corev1.Pod{newPod("a", going, disrupted)}, ""},
		{"policy: fails the index", with(newJob(2, 2), perIndex(5), failPolicy(onCode(index, in, 42))), []*corev1.Pod{newPod("a", at(0), failedWith(42)), newPod("b", at(1))}, "+failed a; lost 0; release a"},

		{"success policy: these", with(newJob(3, 3), indexedMode, successPolicy(batchv1.SuccessPolicyRule{SucceededIndexes: new("0,2")})), []*corev1.Pod{newPod("a", at(0), succeeded), newPod("b", at(1)), newPod("c", at(2), succeeded)}, "completed 0,2; delete b; is SuccessCriteriaMet/SuccessPolicy; release a,c"},
		{"success policy: not yet", with(newJob(3, 3), indexedMode, successPolicy(batchv1.SuccessPolicyRule{SucceededIndexes: new("0,2")})), []*corev1.Pod{newPod("a", at(0), succeeded), newPod("b", at(1), succeeded), newPod("c", at(2))}, "completed 0,1; release a,b"},
		{"success policy: so many of these", with(newJob(3, 3), indexedMode, successPolicy(batchv1.SuccessPolicyRule{SucceededIndexes: new("0-1"), SucceededCount: new(int32(1))})), []*corev1.Pod{newPod("a", at(0)), newPod("b", at(1), succeeded), newPod("c", at(2))}, "completed 1; delete a,c; is SuccessCriteriaMet/SuccessPolicy; release b"},
		{"success policy: any so many", with(newJob(3, 3), indexedMode, successPolicy(batchv1.SuccessPolicyRule{SucceededCount: new(int32(2))})), []*corev1.Pod{newPod("a", at(0), succeeded), newPod("b", at(1)), newPod("c", at(2), succeeded)}, "completed 0,2; delete b; is SuccessCriteriaMet/SuccessPolicy; release a,c"},
		{"failure comes before success", with(newJob(2, 2), indexedMode, limit(0), successPolicy(batchv1.SuccessPolicyRule{SucceededCount: new(int32(1))})), []*corev1.Pod{newPod("a", at(0), succeeded), newPod("b", at(1), failed)}, "+failed b; completed 0; is FailureTarget/BackoffLimitExceeded; release a,b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := tt.job.DeepCopy()
			plan := Compute(Snapshot{Job: tt.job, Pods: tt.pods, Settled: true}, now)
			if got := describe(plan, tt.job); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if !apiequality.Semantic.DeepEqual(before, tt.job) {
				t.Error("the snapshot was changed")
			}
			if plan.Status != nil {
				after := tt.job.DeepCopy()
				after.Status = *plan.Status
				validate(t, after, tt.job)
			}
		})
	}
}

// A Job that has decided says why, ends when its last pod is counted, and not before.
func TestConclusion(t *testing.T) {
	job := with(started(newJob(2, 2)), limit(0), onlyFailed)
	step := func(want string, pods ...*corev1.Pod) []Event {
		t.Helper()
		plan := Compute(Snapshot{Job: job, Pods: pods, Settled: true}, now)
		if got := describe(plan, job); got != want {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
		if plan.Status != nil {
			after := job.DeepCopy()
			after.Status = *plan.Status
			validate(t, after, job)
			job = after
		}
		return plan.Events
	}
	const target = "is FailureTarget/BackoffLimitExceeded"
	step("+failed a; delete b; "+target+"; release a", newPod("a", failed), newPod("b"))
	step("+failed b; "+target+"; release b", newPod("a", failed, counted), newPod("b", going))
	step(target, newPod("a", failed, counted), newPod("b", going, counted))
	events := step("is Failed/BackoffLimitExceeded,FailureTarget/BackoffLimitExceeded", newPod("a", failed, counted))
	want := Event{corev1.EventTypeWarning, "BackoffLimitExceeded", "Job has reached the specified backoff limit"}
	if job.Status.Failed != 2 || !Finished(job) || len(events) != 1 || events[0] != want {
		t.Errorf("status %+v, events %v", job.Status, events)
	}
}

func TestPods(t *testing.T) {
	job := with(newJob(1, 200), perIndex(3))
	job.Name = strings.Repeat("x", 60)
	job.Spec.Template.Spec.InitContainers = []corev1.Container{{Name: "init", Env: []corev1.EnvVar{{Name: "JOB_COMPLETION_INDEX", Value: "mine"}}}}
	common := Template(job)
	template, name := NewPod{Index: 123, Failures: 2, Ignored: 1}.For(job, common)
	if name != strings.Repeat("x", 53)+"-123-" || template.Spec.Hostname != job.Name+"-123" {
		t.Errorf("name %s, hostname %s", name, template.Spec.Hostname)
	}
	for key, want := range map[string]string{
		batchv1.JobCompletionIndexAnnotation: "123", batchv1.JobIndexFailureCountAnnotation: "2", batchv1.JobIndexIgnoredFailureCountAnnotation: "1",
	} {
		if got := template.Annotations[key]; got != want {
			t.Errorf("annotation %s is %q", key, got)
		}
	}
	if got := template.Labels[batchv1.JobCompletionIndexAnnotation]; got != "123" || template.Labels["job"] != "j" {
		t.Errorf("labels %v", template.Labels)
	}
	if env := template.Spec.Containers[0].Env; len(env) != 1 || env[0].ValueFrom.FieldRef.FieldPath != "metadata.labels['batch.kubernetes.io/job-completion-index']" {
		t.Errorf("env %v", env)
	}
	if env := template.Spec.InitContainers[0].Env; len(env) != 1 || env[0].Value != "mine" {
		t.Errorf("env of the init container %v", env)
	}
	if !slices.Equal(template.Finalizers, []string{batchv1.JobTrackingFinalizer}) {
		t.Errorf("finalizers %v", template.Finalizers)
	}
	if common.Annotations != nil || common.Spec.Hostname != "" || len(job.Spec.Template.Spec.Containers[0].Env) != 0 {
		t.Error("the template was changed")
	}
}

func TestEndedAt(t *testing.T) {
	ago := func(d time.Duration) metav1.Time { return metav1.NewTime(now.Add(-d)) }
	sidecar := func(p *corev1.Pod) {
		p.Spec.InitContainers = []corev1.Container{{Name: "side", RestartPolicy: new(corev1.ContainerRestartPolicyAlways)}, {Name: "init"}}
		p.Status.InitContainerStatuses = []corev1.ContainerStatus{
			{Name: "side", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: ago(time.Second)}}}, {Name: "init"},
		}
	}
	unready := func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c"}}
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: ago(2 * time.Second)}}
	}
	deleted := func(p *corev1.Pod) {
		p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &metav1.Time{Time: now.Add(27 * time.Second)}, new(int64(30))
	}
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		want time.Duration
	}{
		{"its last container", newPod("a", failed), time.Hour},
		{"sidecars are among them", newPod("a", failed, sidecar), time.Second},
		{"unready since", newPod("a", unready), 2 * time.Second},
		{"deleted", newPod("a", deleted), 3 * time.Second},
		{"created", newPod("a"), time.Hour},
	} {
		if got := now.Sub(endedAt(tt.pod)); got != tt.want {
			t.Errorf("%s: %v ago, want %v", tt.name, got, tt.want)
		}
	}
	for n, want := range map[int32]time.Duration{0: 0, 1: 10 * time.Second, 2: 20 * time.Second, 7: 10 * time.Minute, 1 << 30: 10 * time.Minute} {
		if got := backoff(n, now, now); got != want {
			t.Errorf("back-off after %d failures: %v, want %v", n, got, want)
		}
	}
}
