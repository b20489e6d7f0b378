// SPDX-License-Identifier: Apache-2.0

package job

import (
	"maps"
	"slices"
	"strconv"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/storage/names"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// noIndex stands for a pod without a completion index.
const noIndex = -1

func indexed(job *batchv1.Job) bool {
	return job.Spec.CompletionMode != nil && *job.Spec.CompletionMode == batchv1.IndexedCompletion
}

func suspended(job *batchv1.Job) bool { return job.Spec.Suspend != nil && *job.Spec.Suspend }

// managedElsewhere tells whether another controller than this one answers for job (KEP-4368).
func managedElsewhere(job *batchv1.Job) bool {
	return job.Spec.ManagedBy != nil && *job.Spec.ManagedBy != batchv1.JobControllerName
}

// onlyReplaceFailed tells whether a pod that is being deleted still holds its place until it has ended (KEP-3939).
// A pod failure policy asks for that too: it can only judge pods that have ended.
func onlyReplaceFailed(job *batchv1.Job) bool {
	return job.Spec.PodReplacementPolicy != nil && *job.Spec.PodReplacementPolicy == batchv1.Failed || job.Spec.PodFailurePolicy != nil
}

func hasFinalizer(pod *corev1.Pod) bool {
	return slices.Contains(pod.Finalizers, batchv1.JobTrackingFinalizer)
}

// hasFailed tells whether pod counts as a failure. One that is being deleted may never come to say so itself.
func hasFailed(job *batchv1.Job, pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodFailed {
		return true
	}
	return pod.DeletionTimestamp != nil && pod.Status.Phase != corev1.PodSucceeded && !onlyReplaceFailed(job)
}

// indexOf is the completion index of a pod, or noIndex.
func indexOf(pod *corev1.Pod) int {
	if i, err := strconv.Atoi(pod.Annotations[batchv1.JobCompletionIndexAnnotation]); err == nil && i >= 0 {
		return i
	}
	return noIndex
}

// misplaced tells whether a pod of an Indexed Job has no index that the Job asks for.
func misplaced(job *batchv1.Job, pod *corev1.Pod) bool {
	if !indexed(job) {
		return false
	}
	i := indexOf(pod)
	return i == noIndex || i >= int(*job.Spec.Completions)
}

// failuresOf reads how often the index of pod failed before it: failures that counted, and ignored ones.
// Whoever writes nonsense there starts again at zero.
func failuresOf(pod *corev1.Pod) (counted, ignored int32) {
	read := func(annotation string) int32 {
		n, err := strconv.ParseInt(pod.Annotations[annotation], 10, 32)
		if err != nil || n < 0 {
			return 0
		}
		return int32(n)
	}
	return read(batchv1.JobIndexFailureCountAnnotation), read(batchv1.JobIndexIgnoredFailureCountAnnotation)
}

// endedAt is when a pod ended: when its last container did, or by its Ready condition, or by its deletion.
func endedAt(pod *corev1.Pod) time.Time {
	if at, ok := lastContainerEnd(pod); ok {
		return at
	}
	if _, ready := podutil.GetPodCondition(&pod.Status, corev1.PodReady); ready != nil && ready.Status == corev1.ConditionFalse && !ready.LastTransitionTime.IsZero() {
		return ready.LastTransitionTime.Time
	}
	if pod.DeletionTimestamp != nil {
		var grace time.Duration
		if pod.DeletionGracePeriodSeconds != nil {
			grace = time.Duration(*pod.DeletionGracePeriodSeconds) * time.Second
		}
		return pod.DeletionTimestamp.Add(-grace)
	}
	return pod.CreationTimestamp.Time
}

// lastContainerEnd knows an answer only if all containers ended, sidecars among them.
func lastContainerEnd(pod *corev1.Pod) (last time.Time, ok bool) {
	statuses := slices.Clone(pod.Status.ContainerStatuses)
	for _, status := range pod.Status.InitContainerStatuses {
		if slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
			return c.Name == status.Name && podutil.IsRestartableInitContainer(&c)
		}) {
			statuses = append(statuses, status)
		}
	}
	for _, status := range statuses {
		ended := status.State.Terminated
		if ended == nil || ended.FinishedAt.IsZero() {
			return time.Time{}, false
		}
		if ended.FinishedAt.After(last) {
			last = ended.FinishedAt.Time
		}
	}
	return last, len(statuses) > 0
}

// NewPod is a pod to create.
type NewPod struct {
	// Index is its completion index, or noIndex.
	Index int
	// Failures and Ignored are how often its index failed so far; they count with backoffLimitPerIndex.
	Failures, Ignored int32
}

// Template is what pods of job are made from, as far as they have it in common.
func Template(job *batchv1.Job) *corev1.PodTemplateSpec {
	template := job.Spec.Template.DeepCopy()
	if !slices.Contains(template.Finalizers, batchv1.JobTrackingFinalizer) {
		template.Finalizers = append(template.Finalizers, batchv1.JobTrackingFinalizer)
	}
	if indexed(job) {
		for _, containers := range [][]corev1.Container{template.Spec.InitContainers, template.Spec.Containers} {
			for i := range containers {
				addIndexVariable(&containers[i])
			}
		}
	}
	return template
}

// addIndexVariable lets a container know its index, by the downward API so that all pods share one template.
func addIndexVariable(c *corev1.Container) {
	const name = "JOB_COMPLETION_INDEX"
	if slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == name }) {
		return
	}
	c.Env = append(c.Env, corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{
		FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels['" + batchv1.JobCompletionIndexAnnotation + "']"},
	}})
}

// For returns the template of this pod and the beginning of its name, given the Job's common template, which is not
// changed. An empty name leaves the choice to whoever creates the pod.
func (p NewPod) For(job *batchv1.Job, common *corev1.PodTemplateSpec) (*corev1.PodTemplateSpec, string) {
	if p.Index == noIndex {
		return common, ""
	}
	index := strconv.Itoa(p.Index)
	template := *common
	template.Labels, template.Annotations = withEntry(common.Labels, batchv1.JobCompletionIndexAnnotation, index), withEntry(common.Annotations, batchv1.JobCompletionIndexAnnotation, index)
	template.Spec.Hostname = job.Name + "-" + index
	if job.Spec.BackoffLimitPerIndex != nil {
		template.Annotations[batchv1.JobIndexFailureCountAnnotation] = strconv.Itoa(int(p.Failures))
		if p.Ignored > 0 {
			template.Annotations[batchv1.JobIndexIgnoredFailureCountAnnotation] = strconv.Itoa(int(p.Ignored))
		}
	}
	suffix := "-" + index + "-"
	return &template, job.Name[:min(len(job.Name), names.MaxGeneratedNameLength-len(suffix))] + suffix
}

func withEntry(m map[string]string, key, value string) map[string]string {
	m = maps.Clone(m)
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m
}
