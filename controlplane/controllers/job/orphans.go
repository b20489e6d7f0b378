// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/controller"

	"skep.io/skep/controlplane/controllers/runner"
)

// enqueueOrphans looks at the pods of a Job that is gone or finished: none may keep a finalizer that nobody removes.
func (c *Controller) enqueueOrphans(job *batchv1.Job) {
	pods, err := controller.FilterPodsByOwner(c.pods.Indexer, &job.ObjectMeta, Kind.Kind, false)
	if err != nil {
		return // only an object without a name or UID
	}
	for _, pod := range pods {
		if hasFinalizer(pod) {
			c.orphans.Add(runner.Key(pod))
		}
	}
}

// syncOrphan removes the finalizer of one pod if no Job counts it.
func (c *Controller) syncOrphan(ctx context.Context, key string) (time.Duration, error) {
	obj, exists, err := c.pods.Indexer.GetByKey(key)
	if err != nil {
		return 0, fmt.Errorf("read pod %s: %w", key, err)
	}
	pod, ok := obj.(*corev1.Pod)
	if !exists || !ok || !c.orphaned(pod) {
		return 0, nil
	}
	return 0, removeFinalizer(ctx, c.pods.Control, pod, false)
}

func (c *Controller) orphaned(pod *corev1.Pod) bool {
	if !hasFinalizer(pod) {
		return false
	}
	ref := metav1.GetControllerOfNoCopy(pod)
	if ref == nil {
		return true
	}
	if ref.Kind != Kind.Kind || ref.APIVersion != batchv1.SchemeGroupVersion.String() {
		return false // somebody else's, who may count it by the same finalizer
	}
	job, ok := c.pods.Owner(pod)
	return !ok || Finished(job) && !managedElsewhere(job)
}

// removeFinalizer takes the tracking finalizer from a pod, if it is still there. If asSeen, a pod that has changed
// meanwhile keeps it, and the error is a conflict.
func removeFinalizer(ctx context.Context, control controller.PodControlInterface, pod *corev1.Pod, asSeen bool) error {
	meta := map[string]any{
		"uid":                                 pod.UID,
		"$deleteFromPrimitiveList/finalizers": []string{batchv1.JobTrackingFinalizer},
	}
	if asSeen {
		meta["resourceVersion"] = pod.ResourceVersion
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return fmt.Errorf("finalizer of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if err := control.PatchPod(ctx, pod.Namespace, pod.Name, patch); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove finalizer of pod %s: %w", cache.MetaObjectToName(pod), err)
	}
	return nil
}
