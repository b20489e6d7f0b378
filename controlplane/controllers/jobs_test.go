// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func (c *cluster) namespace(name string) {
	c.Helper()
	if _, err := c.client.CoreV1().Namespaces().Create(c.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	c.eventually("service account of "+name, func(ctx context.Context) error {
		_, err := c.client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

func (c *cluster) createJob(ns, name string, change func(*batchv1.JobSpec)) {
	c.Helper()
	job := &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: batchv1.JobSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{Name: "c", Image: "work:1"}},
		}}},
	}
	change(&job.Spec)
	if _, err := c.client.BatchV1().Jobs(ns).Create(c.Context(), job, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) changeJob(ns, name string, change func(*batchv1.JobSpec)) {
	c.Helper()
	c.eventually("update of the job", func(ctx context.Context) error {
		job, err := c.client.BatchV1().Jobs(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(&job.Spec)
		_, err = c.client.BatchV1().Jobs(ns).Update(ctx, job, metav1.UpdateOptions{})
		return err
	})
}

func conditions(job *batchv1.Job) string {
	var all []string
	for _, c := range job.Status.Conditions {
		if c.Status == corev1.ConditionTrue {
			all = append(all, string(c.Type)+"/"+c.Reason)
		}
	}
	return strings.Join(all, " ")
}

// waitJob waits for a Job to say this, in a form that rows of tests can hold.
func (c *cluster) waitJob(ns, name, want string) *batchv1.Job {
	c.Helper()
	var job *batchv1.Job
	c.eventually("job "+name, func(ctx context.Context) (err error) {
		if job, err = c.client.BatchV1().Jobs(ns).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		s := job.Status
		got := fmt.Sprintf("active %d, succeeded %d, failed %d", s.Active, s.Succeeded, s.Failed)
		if s.CompletedIndexes != "" {
			got += ", completed " + s.CompletedIndexes
		}
		if s.FailedIndexes != nil && *s.FailedIndexes != "" {
			got += ", lost " + *s.FailedIndexes
		}
		if all := conditions(job); all != "" {
			got += ", " + all
		}
		if got != want {
			return fmt.Errorf("it is %s, not yet %s", got, want)
		}
		return nil
	})
	return job
}

// podsOf waits until n pods of a Job run, and returns them by name.
func (c *cluster) podsOf(ns, job string, n int) []corev1.Pod {
	c.Helper()
	var running []corev1.Pod
	c.eventually(fmt.Sprintf("%d pods of job %s", n, job), func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: batchv1.JobNameLabel + "=" + job})
		if err != nil {
			return err
		}
		running = nil
		for _, pod := range pods.Items {
			if pod.Status.Phase == corev1.PodRunning && pod.DeletionTimestamp == nil {
				running = append(running, pod)
			}
		}
		if len(running) != n {
			return fmt.Errorf("%d run", len(running))
		}
		return nil
	})
	slices.SortFunc(running, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return running
}

// end lets the container of a pod exit.
func (c *cluster) end(pod *corev1.Pod, code int32) {
	c.Helper()
	c.eventually("end of pod "+pod.Name, func(ctx context.Context) error {
		cur, err := c.client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		cur.Status.Phase = corev1.PodSucceeded
		if code != 0 {
			cur.Status.Phase = corev1.PodFailed
		}
		cur.Status.Conditions = nil
		// Long ago, so that no back-off holds the next pod back.
		cur.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{
			Terminated: &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.Unix(1700000000, 0)},
		}}}
		_, err = c.client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, cur, metav1.UpdateOptions{})
		return err
	})
}

// noFinalizers says that nothing holds the pods of a namespace any more.
func (c *cluster) noFinalizers(ns string) {
	c.Helper()
	c.eventually("finalizers to go", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if len(pod.Finalizers) > 0 {
				return fmt.Errorf("pod %s has %v", pod.Name, pod.Finalizers)
			}
		}
		return nil
	})
}

// TestJobs walks Jobs through the API server's real validation and authorization.
func TestJobs(t *testing.T) {
	c := newCluster(t)
	c.addNode("n1")
	c.kubelet("n1")
	const ns = "work"
	c.namespace(ns)
	client := c.client.BatchV1().Jobs(ns)
	ctx := t.Context()

	// So many completions, never more at once than may.
	c.createJob(ns, "plain", func(s *batchv1.JobSpec) { s.Parallelism, s.Completions = new(int32(2)), new(int32(3)) })
	for _, pod := range c.podsOf(ns, "plain", 2) {
		c.end(&pod, 0)
	}
	last := c.podsOf(ns, "plain", 1)
	c.waitJob(ns, "plain", "active 1, succeeded 2, failed 0")
	c.end(&last[0], 0)
	job := c.waitJob(ns, "plain", "active 0, succeeded 3, failed 0, SuccessCriteriaMet/CompletionsReached Complete/CompletionsReached")
	if s := job.Status; s.StartTime == nil || s.CompletionTime == nil || len(s.UncountedTerminatedPods.Succeeded) > 0 {
		t.Errorf("status %+v", s)
	}

	// Each pod of an Indexed Job knows who it is; an index whose pod fails gets another.
	c.createJob(ns, "indexed", func(s *batchv1.JobSpec) {
		s.Parallelism, s.Completions, s.CompletionMode = new(int32(3)), new(int32(3)), new(batchv1.IndexedCompletion)
	})
	pods := c.podsOf(ns, "indexed", 3)
	for i, pod := range pods {
		if pod.Spec.Hostname != fmt.Sprint("indexed-", i) || pod.Labels[batchv1.JobCompletionIndexAnnotation] != fmt.Sprint(i) ||
			pod.Spec.Containers[0].Env[0].Name != "JOB_COMPLETION_INDEX" {
			t.Errorf("pod %s: hostname %s, labels %v, env %v", pod.Name, pod.Spec.Hostname, pod.Labels, pod.Spec.Containers[0].Env)
		}
	}
	c.end(&pods[1], 1)
	c.end(&pods[0], 0)
	c.end(&pods[2], 0)
	again := c.podsOf(ns, "indexed", 1)
	if !strings.HasPrefix(again[0].Name, "indexed-1-") {
		t.Errorf("the new pod is %s", again[0].Name)
	}
	c.end(&again[0], 0)
	c.waitJob(ns, "indexed", "active 0, succeeded 3, failed 1, completed 0-2, SuccessCriteriaMet/CompletionsReached Complete/CompletionsReached")

	// Indexes that fail on their own do not stop the others, but the Job has failed in the end.
	c.createJob(ns, "per-index", func(s *batchv1.JobSpec) {
		s.Parallelism, s.Completions, s.CompletionMode, s.BackoffLimitPerIndex = new(int32(2)), new(int32(2)), new(batchv1.IndexedCompletion), new(int32(1))
	})
	pods = c.podsOf(ns, "per-index", 2)
	c.end(&pods[0], 1)
	c.end(&pods[1], 0)
	again = c.podsOf(ns, "per-index", 1)
	if again[0].Annotations[batchv1.JobIndexFailureCountAnnotation] != "1" {
		t.Errorf("annotations %v", again[0].Annotations)
	}
	c.end(&again[0], 1)
	c.waitJob(ns, "per-index", "active 0, succeeded 1, failed 2, completed 1, lost 0, FailureTarget/FailedIndexes Failed/FailedIndexes")

	// A pod failure policy ends it at once, and takes along who still runs.
	c.createJob(ns, "policy", func(s *batchv1.JobSpec) {
		s.Parallelism, s.Completions = new(int32(2)), new(int32(2))
		s.PodFailurePolicy = &batchv1.PodFailurePolicy{Rules: []batchv1.PodFailurePolicyRule{{
			Action:      batchv1.PodFailurePolicyActionFailJob,
			OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpIn, Values: []int32{42}},
		}}}
	})
	pods = c.podsOf(ns, "policy", 2)
	c.end(&pods[0], 42)
	c.waitJob(ns, "policy", "active 0, succeeded 0, failed 2, FailureTarget/PodFailurePolicy Failed/PodFailurePolicy")

	// A success policy too, and who is not needed any more has not failed.
	c.createJob(ns, "leader", func(s *batchv1.JobSpec) {
		s.Parallelism, s.Completions, s.CompletionMode = new(int32(3)), new(int32(3)), new(batchv1.IndexedCompletion)
		s.SuccessPolicy = &batchv1.SuccessPolicy{Rules: []batchv1.SuccessPolicyRule{{SucceededIndexes: new("0")}}}
	})
	pods = c.podsOf(ns, "leader", 3)
	c.end(&pods[0], 0)
	c.waitJob(ns, "leader", "active 0, succeeded 1, failed 0, completed 0, SuccessCriteriaMet/SuccessPolicy Complete/SuccessPolicy")

	// Suspended, it keeps what it has done and runs nothing.
	c.createJob(ns, "pause", func(s *batchv1.JobSpec) { s.Parallelism, s.Completions = new(int32(2)), new(int32(3)) })
	pods = c.podsOf(ns, "pause", 2)
	c.end(&pods[0], 0)
	c.waitJob(ns, "pause", "active 2, succeeded 1, failed 0")
	c.changeJob(ns, "pause", func(s *batchv1.JobSpec) { s.Suspend = new(true) })
	c.waitJob(ns, "pause", "active 0, succeeded 1, failed 0, Suspended/JobSuspended")
	c.changeJob(ns, "pause", func(s *batchv1.JobSpec) { s.Suspend = new(false) })
	c.waitJob(ns, "pause", "active 2, succeeded 1, failed 0")

	// A deadline needs no event but time.
	c.createJob(ns, "late", func(s *batchv1.JobSpec) { s.ActiveDeadlineSeconds = new(int64(1)) })
	c.waitJob(ns, "late", "active 0, succeeded 0, failed 1, FailureTarget/DeadlineExceeded Failed/DeadlineExceeded")

	// Somebody else's is left alone.
	c.createJob(ns, "foreign", func(s *batchv1.JobSpec) { s.ManagedBy = new("example.com/other") })
	c.createJob(ns, "after", func(*batchv1.JobSpec) {})
	c.waitJob(ns, "after", "active 1, succeeded 0, failed 0")
	if got, err := client.Get(ctx, "foreign", metav1.GetOptions{}); err != nil || got.Status.StartTime != nil {
		t.Errorf("job of another controller: %+v %v", got.Status, err)
	}

	c.checkAdoption(ns)
	c.checkEvents(ns,
		"job-controller SuccessfulCreate Created pod: plain-", "job-controller Completed Job completed",
		"job-controller FailedIndexes Job has failed indexes",
		"job-controller PodFailurePolicy Container c for pod work/policy-",
		"job-controller Suspended Job suspended", "job-controller Resumed Job resumed", "job-controller SuccessfulDelete Deleted pod: pause-",
		"job-controller DeadlineExceeded Job was active longer than specified deadline")

	// Jobs go with their pods, or leave them behind without the finalizer.
	orphaned := c.podsOf(ns, "pause", 2)
	if err := client.Delete(ctx, "pause", metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationOrphan)}); err != nil {
		t.Fatal(err)
	}
	c.eventually("orphans", func(ctx context.Context) error {
		for _, pod := range orphaned {
			cur, err := c.client.CoreV1().Pods(ns).Get(ctx, pod.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if len(cur.OwnerReferences)+len(cur.Finalizers) > 0 {
				return fmt.Errorf("pod %s has owners %v and finalizers %v", pod.Name, cur.OwnerReferences, cur.Finalizers)
			}
		}
		return nil
	})
	for _, policy := range []metav1.DeletionPropagation{metav1.DeletePropagationBackground, metav1.DeletePropagationForeground} {
		name := map[metav1.DeletionPropagation]string{metav1.DeletePropagationBackground: "after", metav1.DeletePropagationForeground: "adopter"}[policy]
		if err := client.Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil {
			t.Fatal(err)
		}
		c.eventually("job "+name+" to go with its pods", func(ctx context.Context) error {
			pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: batchv1.JobNameLabel + "=" + name})
			if err != nil {
				return err
			}
			if _, err := client.Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) || len(pods.Items) > 0 {
				return fmt.Errorf("%d pods are left; the job: %w", len(pods.Items), err)
			}
			return nil
		})
	}
	c.noFinalizers(ns)
}

// checkAdoption lets a pod leave its Job and come back.
func (c *cluster) checkAdoption(ns string) {
	c.Helper()
	c.createJob(ns, "adopter", func(s *batchv1.JobSpec) { s.Parallelism = new(int32(1)) })
	pod := c.podsOf(ns, "adopter", 1)[0]
	patch := func(patch string) {
		if _, err := c.client.CoreV1().Pods(ns).Patch(c.Context(), pod.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			c.Fatal(err)
		}
	}
	wait := func(what string, owners, finalizers int) {
		c.eventually(what, func(ctx context.Context) error {
			cur, err := c.client.CoreV1().Pods(ns).Get(ctx, pod.Name, metav1.GetOptions{})
			if err == nil && (len(cur.OwnerReferences) != owners || len(cur.Finalizers) != finalizers) {
				return fmt.Errorf("owners %v, finalizers %v", cur.OwnerReferences, cur.Finalizers)
			}
			return err
		})
	}
	uid := pod.Labels[batchv1.ControllerUidLabel]
	patch(`{"metadata":{"labels":{"batch.kubernetes.io/controller-uid":"nobody","batch.kubernetes.io/job-name":"nobody"}}}`)
	wait("release", 0, 0)
	next := c.podsOf(ns, "adopter", 1)[0]
	c.end(&next, 1)
	c.podsOf(ns, "adopter", 1)
	patch(fmt.Sprintf(`{"metadata":{"labels":{"batch.kubernetes.io/controller-uid":"%s","batch.kubernetes.io/job-name":"adopter"}}}`, uid))
	c.eventually("adoption, and removal of one too many", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: batchv1.JobNameLabel + "=adopter"})
		if err != nil {
			return err
		}
		owned := 0
		for _, p := range pods.Items {
			if p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning && metav1.GetControllerOf(&p) != nil {
				owned++
			}
		}
		if owned != 1 {
			return fmt.Errorf("%d pods are owned", owned)
		}
		return nil
	})
	c.waitJob(ns, "adopter", "active 1, succeeded 0, failed 1")
}

// TestCronJobs lets a schedule create Jobs, forget old ones, and take all along in the end.
func TestCronJobs(t *testing.T) {
	c := newCluster(t)
	c.addNode("n1")
	c.kubelet("n1")
	const ns = "night"
	c.namespace(ns)
	client := c.client.BatchV1().CronJobs(ns)
	ctx := t.Context()
	create := func(name string, suspend bool) {
		t.Helper()
		cj := &batchv1.CronJob{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: batchv1.CronJobSpec{
			Schedule: "@every 1s", Suspend: &suspend, ConcurrencyPolicy: batchv1.ForbidConcurrent,
			JobTemplate: batchv1.JobTemplateSpec{Spec: batchv1.JobSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{
				RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{Name: "c", Image: "work:1"}},
			}}}},
		}}
		if _, err := client.Create(ctx, cj, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	create("asleep", true)
	create("often", false)

	var job *batchv1.Job
	c.eventually("the first job", func(ctx context.Context) error {
		cj, err := client.Get(ctx, "often", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(cj.Status.Active) != 1 || cj.Status.LastScheduleTime == nil {
			return fmt.Errorf("status %+v", cj.Status)
		}
		if job, err = c.client.BatchV1().Jobs(ns).Get(ctx, cj.Status.Active[0].Name, metav1.GetOptions{}); err != nil {
			return err
		}
		if !metav1.IsControlledBy(job, cj) || job.UID != cj.Status.Active[0].UID || job.Annotations[batchv1.CronJobScheduledTimestampAnnotation] == "" {
			return fmt.Errorf("job %+v", job.ObjectMeta)
		}
		return nil
	})
	if want := fmt.Sprintf("often-%d", job.CreationTimestamp.Unix()/60); job.Name != want {
		t.Logf("job %s was created in another minute than that of its name, %s", job.Name, want)
	}
	pod := c.podsOf(ns, job.Name, 1)[0]
	c.end(&pod, 0)
	c.eventually("its success", func(ctx context.Context) error {
		cj, err := client.Get(ctx, "often", metav1.GetOptions{})
		if err == nil && cj.Status.LastSuccessfulTime == nil {
			return fmt.Errorf("status %+v", cj.Status)
		}
		return err
	})
	c.checkEvents(ns, "cronjob-controller SuccessfulCreate Created job "+job.Name, "cronjob-controller SawCompletedJob Saw completed job: "+job.Name+", condition: Complete")

	if err := client.Delete(ctx, "often", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("jobs and pods to go", func(ctx context.Context) error {
		jobs, err := c.client.BatchV1().Jobs(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err == nil && len(jobs.Items)+len(pods.Items) > 0 {
			return fmt.Errorf("%d jobs and %d pods are left", len(jobs.Items), len(pods.Items))
		}
		return err
	})
	if cj, err := client.Get(ctx, "asleep", metav1.GetOptions{}); err != nil || cj.Status.LastScheduleTime != nil {
		t.Errorf("the suspended one: %+v %v", cj.Status, err)
	}
}
