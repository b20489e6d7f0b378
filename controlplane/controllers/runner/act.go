// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller"
)

// Settled tells whether the cache has seen every creation and deletion that Act made for the owner that key names.
// Ask before reading pods: an event that comes in between can only make the answer too careful.
func (p Pods[T]) Settled(key string) bool {
	return p.Expectations.SatisfiedExpectations(logr.Discard(), key)
}

// Forget drops what is still expected for an owner that is gone.
func (p Pods[T]) Forget(key string) { p.Expectations.DeleteExpectations(logr.Discard(), key) }

// Act creates n pods of owner, the i-th by create(i), and deletes others, each by remove. One failing does not keep
// the rest from being tried. Until the cache has seen all that succeeded, the owner is not settled.
func (p Pods[T]) Act(ctx context.Context, owner T, n int, create func(i int) error, others []*corev1.Pod, remove func(*corev1.Pod) error) error {
	if n == 0 && len(others) == 0 {
		return nil
	}
	key := Key(owner)
	keys := make([]string, len(others))
	for i, pod := range others {
		keys[i] = controller.PodKey(pod)
	}
	if err := p.Expectations.ExpectDeletions(logr.Discard(), key, keys); err != nil {
		return fmt.Errorf("%s %s: %w", p.Kind.Kind, key, err)
	}
	p.Expectations.RaiseExpectations(logr.Discard(), key, n, 0)

	created, createErr := SlowStart(n, func(i int) error {
		err := create(i)
		if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			// Nothing more will come of this owner; leave the expectation to its deletion.
			return nil
		}
		return err
	})
	for range n - created {
		p.Expectations.CreationObserved(logr.Discard(), key)
	}
	deleteErr := InParallel(len(others), func(i int) error {
		err := remove(others[i])
		if err == nil {
			return nil
		}
		p.Expectations.DeletionObserved(logr.Discard(), key, keys[i])
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
	switch {
	case createErr == nil:
		return deleteErr
	case deleteErr == nil:
		return createErr
	}
	return errors.Join(createErr, deleteErr)
}

// StatusClient is the part of a typed client that WriteStatus needs.
type StatusClient[T metav1.Object] interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (T, error)
	UpdateStatus(ctx context.Context, obj T, opts metav1.UpdateOptions) (T, error)
}

// WriteStatus writes what with makes of obj, which it must not change. It tries once more with a fresh read if
// somebody wrote in between, since changes of spec and status meet all the time. An object that is gone is no error.
func WriteStatus[T metav1.Object](ctx context.Context, client StatusClient[T], obj T, with func(T) T) error {
	_, err := client.UpdateStatus(ctx, with(obj), metav1.UpdateOptions{})
	if apierrors.IsConflict(err) {
		fresh, getErr := client.Get(ctx, obj.GetName(), metav1.GetOptions{})
		if getErr == nil && fresh.GetUID() == obj.GetUID() {
			_, err = client.UpdateStatus(ctx, with(fresh), metav1.UpdateOptions{})
		}
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("update status of %s: %w", Key(obj), err)
	}
	return nil
}

// UntilAvailable is how long it takes until the next ready pod has been ready for minReadySeconds; zero if none
// waits for that.
func UntilAvailable(pods []*corev1.Pod, minReadySeconds int32, now time.Time) time.Duration {
	minReady := time.Duration(minReadySeconds) * time.Second
	if minReady == 0 {
		return 0
	}
	var next time.Duration
	for _, pod := range pods {
		ready := podutil.GetPodReadyCondition(pod.Status)
		if ready == nil || ready.Status != corev1.ConditionTrue || ready.LastTransitionTime.IsZero() {
			continue
		}
		if d := ready.LastTransitionTime.Add(minReady).Sub(now); d >= 0 && !podutil.IsPodAvailable(pod, minReadySeconds, metav1.NewTime(now)) {
			// A moment more: availability begins strictly after the last second.
			if d += time.Millisecond; next == 0 || d < next {
				next = d
			}
		}
	}
	return next
}
