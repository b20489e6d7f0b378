// SPDX-License-Identifier: Apache-2.0

package job

import (
	"fmt"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
)

// Verdict is what becomes of a Job. Once written it stays, whatever happens later.
type Verdict struct {
	Success         bool
	Reason, Message string
}

// interim is the condition that says so while pods still have to go, final the one that ends the Job.
func (v Verdict) interim() batchv1.JobConditionType {
	if v.Success {
		return batchv1.JobSuccessCriteriaMet
	}
	return batchv1.JobFailureTarget
}

func (v Verdict) final() batchv1.JobConditionType {
	if v.Success {
		return batchv1.JobComplete
	}
	return batchv1.JobFailed
}

// judge decides whether the Job has succeeded or failed: what is decided already comes first, then failures, then
// successes. It returns nil for a Job that goes on.
func (v *view) judge(status *batchv1.JobStatus, now time.Time) *Verdict {
	for _, decided := range []Verdict{{Success: true}, {Success: false}} {
		if c := findCondition(status, decided.interim()); c != nil && c.Status == corev1.ConditionTrue {
			return &Verdict{decided.Success, c.Reason, c.Message}
		}
	}
	for _, rule := range []func(*batchv1.JobStatus, time.Time) *Verdict{
		v.failedByPolicy, v.failedByLimit, v.failedByDeadline, v.failedByIndexes, v.succeededByPolicy, v.succeededByNumber,
	} {
		if verdict := rule(status, now); verdict != nil {
			return verdict
		}
	}
	return nil
}

func failure(reason, message string) *Verdict { return &Verdict{false, reason, message} }

func (v *view) failedByPolicy(*batchv1.JobStatus, time.Time) *Verdict {
	if v.Job.Spec.PodFailurePolicy == nil {
		return nil
	}
	for _, pod := range v.tracked {
		if !hasFailed(v.Job, pod) {
			continue
		}
		if rule := matchingRule(v.Job, pod); rule != nil && rule.action == batchv1.PodFailurePolicyActionFailJob {
			return failure(batchv1.JobReasonPodFailurePolicy, rule.why)
		}
	}
	return nil
}

func (v *view) failedByLimit(*batchv1.JobStatus, time.Time) *Verdict {
	limit := *v.Job.Spec.BackoffLimit
	if v.failed <= limit && !v.restartsExceed(limit) {
		return nil
	}
	return failure(batchv1.JobReasonBackoffLimitExceeded, "Job has reached the specified backoff limit")
}

// restartsExceed counts restarts in place as what they are, failures.
func (v *view) restartsExceed(limit int32) bool {
	if v.Job.Spec.Template.Spec.RestartPolicy != corev1.RestartPolicyOnFailure {
		return false
	}
	var restarts int32
	for _, pod := range v.Pods {
		if pod.Status.Phase != corev1.PodRunning && pod.Status.Phase != corev1.PodPending {
			continue
		}
		for _, statuses := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
			for _, status := range statuses {
				restarts += status.RestartCount
			}
		}
	}
	return restarts > 0 && restarts >= limit
}

func (v *view) failedByDeadline(status *batchv1.JobStatus, now time.Time) *Verdict {
	deadline := v.Job.Spec.ActiveDeadlineSeconds
	if deadline == nil || status.StartTime == nil || suspended(v.Job) || now.Sub(status.StartTime.Time) < time.Duration(*deadline)*time.Second {
		return nil
	}
	if c := findCondition(status, batchv1.JobSuspended); c != nil && c.Status == corev1.ConditionTrue {
		return nil // being resumed, which starts its time anew
	}
	return failure(batchv1.JobReasonDeadlineExceeded, "Job was active longer than specified deadline")
}

func (v *view) failedByIndexes(*batchv1.JobStatus, time.Time) *Verdict {
	if v.Job.Spec.BackoffLimitPerIndex == nil {
		return nil
	}
	failed := v.failedIndexes.Len()
	switch most := v.Job.Spec.MaxFailedIndexes; {
	case most != nil && failed > int(*most):
		return failure(batchv1.JobReasonMaxFailedIndexesExceeded, "Job has exceeded the specified maximal number of failed indexes")
	case failed > 0 && failed+v.completed.Len() >= int(*v.Job.Spec.Completions):
		return failure(batchv1.JobReasonFailedIndexes, "Job has failed indexes")
	}
	return nil
}

// succeededByPolicy applies the success policy (KEP-3998): of the indexes that a rule names, or of all, so many must
// have succeeded, or all.
func (v *view) succeededByPolicy(*batchv1.JobStatus, time.Time) *Verdict {
	if v.Job.Spec.SuccessPolicy == nil || !indexed(v.Job) || len(v.completed) == 0 {
		return nil
	}
	for i, rule := range v.Job.Spec.SuccessPolicy.Rules {
		need, have := 0, v.completed.Len()
		if rule.SucceededIndexes != nil {
			named := ParseIndexes(*rule.SucceededIndexes, int(*v.Job.Spec.Completions))
			need, have = named.Len(), v.completed.Common(named)
		}
		if rule.SucceededCount != nil && (need == 0 || int(*rule.SucceededCount) < need) {
			need = int(*rule.SucceededCount)
		}
		if need > 0 && have >= need {
			return &Verdict{true, batchv1.JobReasonSuccessPolicy, fmt.Sprintf("Matched rules at index %d", i)}
		}
	}
	return nil
}

func (v *view) succeededByNumber(*batchv1.JobStatus, time.Time) *Verdict {
	if !v.Settled || len(v.active) > 0 {
		return nil
	}
	if n := v.Job.Spec.Completions; n == nil && v.succeeded == 0 || n != nil && v.succeeded < *n {
		return nil
	}
	return &Verdict{true, batchv1.JobReasonCompletionsReached, "Reached expected number of succeeded pods"}
}

// match is the rule of a pod failure policy that fits a pod.
type match struct {
	action batchv1.PodFailurePolicyAction
	why    string
}

// matchingRule finds the first rule that fits a failed pod (KEP-3329), or nil.
func matchingRule(job *batchv1.Job, pod *corev1.Pod) *match {
	if job.Spec.PodFailurePolicy == nil {
		return nil
	}
	for i, rule := range job.Spec.PodFailurePolicy.Rules {
		why := ""
		switch {
		case rule.OnExitCodes != nil:
			if status := exitedAs(pod, rule.OnExitCodes); status != nil {
				why = fmt.Sprintf("Container %s for pod %s/%s failed with exit code %d", status.Name, pod.Namespace, pod.Name, status.State.Terminated.ExitCode)
			}
		case rule.OnPodConditions != nil:
			if kind := conditionOf(pod, rule.OnPodConditions); kind != "" {
				why = fmt.Sprintf("Pod %s/%s has condition %s", pod.Namespace, pod.Name, kind)
			}
		}
		if why != "" {
			return &match{rule.Action, fmt.Sprintf("%s matching %s rule at index %d", why, rule.Action, i)}
		}
	}
	return nil
}

// judgePod tells what a pod failure policy does with a failed pod, and whether its failure counts towards limits.
func judgePod(job *batchv1.Job, pod *corev1.Pod) (action batchv1.PodFailurePolicyAction, counts bool) {
	rule := matchingRule(job, pod)
	if rule == nil {
		return batchv1.PodFailurePolicyActionCount, true
	}
	return rule.action, rule.action != batchv1.PodFailurePolicyActionIgnore
}

// failsIndex tells whether pod is the last failure that its index may have.
func failsIndex(job *batchv1.Job, pod *corev1.Pod) bool {
	if !hasFailed(job, pod) {
		return false
	}
	action, counts := judgePod(job, pod)
	before, _ := failuresOf(pod)
	return action == batchv1.PodFailurePolicyActionFailIndex || counts && before >= *job.Spec.BackoffLimitPerIndex
}

func exitedAs(pod *corev1.Pod, rule *batchv1.PodFailurePolicyOnExitCodesRequirement) *corev1.ContainerStatus {
	for _, statuses := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range statuses {
			ended := statuses[i].State.Terminated
			if ended == nil || ended.ExitCode == 0 || rule.ContainerName != nil && *rule.ContainerName != statuses[i].Name {
				continue
			}
			if slices.Contains(rule.Values, ended.ExitCode) == (rule.Operator == batchv1.PodFailurePolicyOnExitCodesOpIn) {
				return &statuses[i]
			}
		}
	}
	return nil
}

func conditionOf(pod *corev1.Pod, patterns []batchv1.PodFailurePolicyOnPodConditionsPattern) corev1.PodConditionType {
	for _, c := range pod.Status.Conditions {
		for _, pattern := range patterns {
			if c.Type == pattern.Type && c.Status == pattern.Status {
				return c.Type
			}
		}
	}
	return ""
}
