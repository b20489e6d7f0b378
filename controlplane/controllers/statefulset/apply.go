// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"context"
	"errors"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// apply carries a plan out, and stops at the first step with an error: the next sync starts from what was reached.
func (c *Controller) apply(ctx context.Context, s Snapshot, plan Plan) error {
	set := s.Set
	for _, claim := range plan.Conflicts {
		c.recorder.Eventf(set, corev1.EventTypeWarning, "ConflictingController",
			"PersistentVolumeClaim %s has a conflicting OwnerReference that acts as a managing controller, the retention policy is ignored for this claim", claim)
	}
	for _, blocked := range plan.Blocked {
		if blocked.Reason != "" {
			c.record(set, "Create", blocked.Pod, errors.New(blocked.Reason))
		}
	}
	for _, claim := range plan.UpdateClaims {
		_, err := c.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Update(ctx, claim, metav1.UpdateOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("update owners of claim %s/%s: %w", claim.Namespace, claim.Name, err)
		}
	}
	if err := c.createClaims(ctx, set, plan.CreateClaims); err != nil {
		return err
	}
	for _, pod := range plan.UpdatePods {
		_, err := c.Client.CoreV1().Pods(pod.Namespace).Update(ctx, pod, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return err // seen too early; nothing to tell
		}
		c.record(set, "Update", pod, err)
		if err != nil {
			return fmt.Errorf("update pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
	}
	return c.pods.Act(ctx, set, len(plan.Create), func(i int) error {
		return c.create(ctx, set, plan.Create[i])
	}, plan.Delete, func(pod *corev1.Pod) error {
		return c.delete(ctx, set, pod)
	})
}

func (c *Controller) createClaims(ctx context.Context, set *appsv1.StatefulSet, claims []NewClaim) error {
	var errs []error
	for _, missing := range claims {
		claim := missing.Claim
		_, err := c.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Create(ctx, claim, metav1.CreateOptions{})
		switch {
		case err == nil:
			c.recorder.Eventf(set, corev1.EventTypeNormal, "SuccessfulCreate", "Create Claim %s Pod %s in StatefulSet %s success", claim.Name, missing.Pod.Name, set.Name)
		case apierrors.IsAlreadyExists(err): // the cache has not seen it yet
		default:
			c.recorder.Eventf(set, corev1.EventTypeWarning, "FailedCreate", "Create Claim %s for Pod %s in StatefulSet %s failed error: %s", claim.Name, missing.Pod.Name, set.Name, err)
			errs = append(errs, fmt.Errorf("create claim %s/%s: %w", claim.Namespace, claim.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Controller) create(ctx context.Context, set *appsv1.StatefulSet, missing NewPod) error {
	pod := missing.Pod
	if err := c.createClaims(ctx, set, missing.Claims); err != nil {
		c.record(set, "Create", pod, err)
		return err
	}
	_, err := c.Client.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return err
	}
	if apierrors.IsAlreadyExists(err) && !c.isForeign(set, pod) {
		return err // made before, not seen yet
	}
	c.record(set, "Create", pod, err)
	if err != nil {
		return fmt.Errorf("create pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

// isForeign tells whether somebody else is known to have a pod of this name.
func (c *Controller) isForeign(set *appsv1.StatefulSet, pod *corev1.Pod) bool {
	obj, exists, err := c.pods.Indexer.GetByKey(cache.MetaObjectToName(pod).String())
	if err != nil || !exists {
		return false
	}
	holder, ok := obj.(*corev1.Pod)
	return ok && !metav1.IsControlledBy(holder, set)
}

// delete deletes this very pod: the next one has the same name.
func (c *Controller) delete(ctx context.Context, set *appsv1.StatefulSet, pod *corev1.Pod) error {
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *metav1.NewPreconditionDeleteOptions(string(pod.UID)))
	if apierrors.IsConflict(err) {
		return apierrors.NewNotFound(corev1.Resource("pods"), pod.Name)
	}
	if !apierrors.IsNotFound(err) {
		c.record(set, "Delete", pod, err)
	}
	return err
}

// record tells in an event how an action on a pod went.
func (c *Controller) record(set *appsv1.StatefulSet, action string, pod *corev1.Pod, err error) {
	if err != nil {
		c.recorder.Eventf(set, corev1.EventTypeWarning, "Failed"+action, "%s Pod %s in StatefulSet %s failed error: %s", action, pod.Name, set.Name, err)
		return
	}
	c.recorder.Eventf(set, corev1.EventTypeNormal, "Successful"+action, "%s Pod %s in StatefulSet %s successful", action, pod.Name, set.Name)
}
