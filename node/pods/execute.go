// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/steps"
)

// How long to leave alone what failed.
const (
	firstRetry  = 500 * time.Millisecond
	retryLimit  = time.Minute
	firstPull   = 10 * time.Second
	pullLimit   = 5 * time.Minute
	configRetry = 10 * time.Second // CreateContainerConfigError: a change of what it refers to wakes the worker before that
	pullErrShow = 2 * time.Second  // ErrImagePull stands this long before it becomes ImagePullBackOff
)

// prepare takes what an action needs from the worker and returns the action: it runs anywhere, and the function that it
// returns runs in the worker's goroutine again.
func (w *worker) prepare(a Action) func(ctx context.Context) func() {
	pod := w.granted()
	switch a.Kind {
	case CreateSandbox:
		return func(ctx context.Context) func() { return w.createSandbox(ctx, pod) }
	case RemoveSandbox:
		return func(ctx context.Context) func() {
			err := w.set.cfg.Sandboxes.Remove(ctx, pod.UID)
			return w.outcome(a, err, func() { w.box, w.boxFailure, w.limits = nil, nil, nil })
		}
	case MountVolumes:
		// What changes from here on makes them stale again.
		w.volumes.Stale, w.volumes.Present, w.volumes.Files = false, true, true
		return func(ctx context.Context) func() { return w.mountVolumes(ctx, pod) }
	case UnmountVolumes:
		return func(ctx context.Context) func() {
			err := w.set.cfg.Volumes.Unmount(ctx, pod.UID)
			return w.outcome(a, err, func() { w.volumes.Present, w.volumes.Ready = false, false })
		}
	case RemoveFiles:
		return func(ctx context.Context) func() {
			err := w.set.cfg.Volumes.Unmount(ctx, pod.UID)
			steps.Passed(ctx, "files: volumes gone")
			if err == nil {
				err = w.set.files.remove(pod)
			}
			return w.outcome(a, err, func() { w.volumes = VolumeState{} })
		}
	case EnsureImage:
		return w.ensureImage(a, pod)
	case StartContainer:
		w.starting[a.Container] = true
		box, img := w.box, w.images[a.Container].Image
		return func(ctx context.Context) func() {
			f := w.startContainer(ctx, pod, a, func(ctx context.Context) (runtime.ContainerSpec, error) {
				return w.set.containerSpec(ctx, pod, specOf(pod, a.Container), box, img, a)
			})
			return func() {
				delete(w.starting, a.Container)
				w.listed = false
				if f != nil {
					w.set.stats.failed.WithLabelValues(string(a.Kind)).Inc()
				}
				if f == nil {
					delete(w.starts, a.Container)
					w.retries.forget(a.key())
					w.retries.forget(string(CreateSandbox)) // it is whole
					return
				}
				if f.RetryAt.IsZero() {
					f.RetryAt = w.retries.failed(a.key(), firstRetry, retryLimit)
				}
				w.starts[a.Container] = f
			}
		}
	case StartPause:
		box := w.box
		return func(ctx context.Context) func() {
			err := w.set.startPause(ctx, pod, box)
			if err != nil && ctx.Err() == nil {
				w.set.event(pod, "", corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: %v", err)
			}
			return w.outcome(a, err, func() { w.listed = false })
		}
	case Resize:
		return w.resize(a, pod)
	case StopContainer:
		if a.Resize {
			w.resized[a.ID] = true
		}
		if a.Again {
			w.again[a.ID] = true
		}
		told := w.stopping[a.ID]
		w.stopping[a.ID] = true
		ip := ""
		if w.box != nil && len(w.box.Addrs) > 0 {
			ip = w.box.Addrs[0].String()
		}
		return func(ctx context.Context) func() {
			err := w.set.stopContainer(ctx, pod, a, ip, told)
			if ctx.Err() != nil {
				err = nil // given up for one with less grace
			}
			return w.outcome(a, err, func() { w.listed = false })
		}
	case RemoveContainer:
		return func(ctx context.Context) func() {
			err := w.set.cfg.Runtime.Remove(ctx, a.ID)
			return w.outcome(a, err, func() {
				w.listed = false
				delete(w.reasons, a.ID)
				delete(w.stopping, a.ID)
			})
		}
	case DeletePod:
		w.leave(w.pod.UID)
		return func(ctx context.Context) func() {
			now := int64(0)
			err := w.set.cfg.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
				GracePeriodSeconds: &now, Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
			})
			if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
				// It is gone, or another pod has its name.
				return w.outcome(a, nil, func() { w.gone = true })
			}
			return w.outcome(a, err, func() {
				// The watch says when it is gone; should finalizers hold it, asking again is pointless.
				w.retries.failed(a.key(), time.Minute, time.Minute)
			})
		}
	default:
		panic("no such action: " + string(a.Kind))
	}
}

// outcome applies ok, or notes when to try again.
func (w *worker) outcome(a Action, err error, ok func()) func() {
	return func() {
		if err == nil {
			w.retries.forget(a.key())
			ok()
			return
		}
		if w.set.ctx.Err() != nil {
			return
		}
		at := w.retries.failed(a.key(), firstRetry, retryLimit)
		w.set.stats.failed.WithLabelValues(string(a.Kind)).Inc()
		w.listed = false
		w.set.cfg.Log.Error("pod action failed", "action", a.Kind, "pod", w.pod.Namespace+"/"+w.pod.Name, "container", a.Container, "retry", time.Until(at).Round(time.Millisecond), "error", err)
	}
}

func (w *worker) createSandbox(ctx context.Context, pod *corev1.Pod) func() {
	s := w.set
	var box *sandbox.Sandbox
	err := s.supports(ctx, pod)
	if err == nil {
		box, err = s.cfg.Sandboxes.Create(ctx, s.sandboxSpec(pod))
	}
	steps.Passed(ctx, "sandbox: handed out")
	if err == nil {
		err = s.writeEtc(pod, box)
	}
	return func() {
		if box != nil && w.box == nil {
			limits := podLimits(pod, w.set.cfg.Terms.PodPids)
			w.limits = &limits
		}
		if box != nil {
			w.box, w.bare, w.volumes.Files = box, err != nil, true
		}
		if err == nil {
			w.boxFailure = nil
			return
		}
		if ctx.Err() != nil && box == nil {
			return
		}
		have := w.box
		w.boxFailed(pod, err)
		if w.bare {
			w.box = have // only its files are missing; it must not be forgotten
		}
	}
}

// boxFailed has the sandbox made anew in a while.
func (w *worker) boxFailed(pod *corev1.Pod, err error) {
	w.box = nil
	at := w.retries.failed(string(CreateSandbox), firstRetry, retryLimit)
	w.set.stats.failed.WithLabelValues(string(CreateSandbox)).Inc()
	w.boxFailure = &Failure{Reason: "FailedCreatePodSandBox", Message: err.Error(), RetryAt: at}
	w.set.event(pod, "", corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: %v", err)
}

func (w *worker) mountVolumes(ctx context.Context, pod *corev1.Pod) func() {
	refresh, err := w.set.cfg.Volumes.Mount(ctx, pod)
	return func() {
		if err == nil {
			w.volumes.Ready, w.volumes.Refresh, w.volumes.Failure = true, refresh, nil
			w.retries.forget(string(MountVolumes))
			return
		}
		if ctx.Err() != nil {
			return
		}
		w.volumes.Stale = true
		at := w.retries.failed(string(MountVolumes), firstRetry, retryLimit)
		w.set.stats.failed.WithLabelValues(string(MountVolumes)).Inc()
		w.volumes.Failure = &Failure{Reason: "FailedMount", Message: err.Error(), RetryAt: at}
		for _, e := range each(err) {
			w.set.event(pod, "", corev1.EventTypeWarning, "FailedMount", "%v", e)
		}
	}
}

// each splits joined errors.
func each(err error) []error {
	var list interface{ Unwrap() []error }
	if errors.As(err, &list) {
		return list.Unwrap()
	}
	return []error{err}
}

// startContainer creates and starts one attempt. A zero RetryAt in the failure leaves the time to the caller.
func (w *worker) startContainer(ctx context.Context, pod *corev1.Pod, a Action, build func(context.Context) (runtime.ContainerSpec, error)) *Failure {
	s := w.set
	c := specOf(pod, a.Container)
	fail := func(reason string, retryAt time.Time, err error) *Failure {
		if ctx.Err() == nil {
			s.event(pod, c.Name, corev1.EventTypeWarning, "Failed", "Error: %v", err)
		}
		return &Failure{Reason: reason, Message: err.Error(), RetryAt: retryAt}
	}
	spec, err := build(ctx)
	if errors.Is(err, errConfig) {
		return fail(errConfig.Error(), time.Now().Add(configRetry), configMessage(err))
	}
	if err != nil {
		return fail("CreateContainerError", time.Time{}, err)
	}
	spec.Ready = func(ctx context.Context) error { return s.cfg.Sandboxes.Attached(ctx, pod.UID) }
	id, err := s.cfg.Runtime.Create(ctx, spec)
	if errors.Is(err, runtime.ErrImageNotFound) {
		// Somebody removed the image since it was looked for: the container has not failed, and the image is fetched anew.
		w.post(func() { delete(w.images, c.Name) })
		return &Failure{Reason: reasonContainerCreating, Message: fmt.Sprintf("Image %q was removed before the container was created", c.Image), RetryAt: time.Now()}
	}
	if err != nil {
		return fail("CreateContainerError", time.Time{}, err)
	}
	steps.Passed(ctx, "container: created")
	s.event(pod, c.Name, corev1.EventTypeNormal, "Created", "Container created")
	err = s.cfg.Runtime.Start(ctx, id)
	if errors.Is(err, runtime.ErrNotReady) {
		// The sandbox is to blame, and the container's attempt does not count.
		w.post(func() {
			if w.box == spec.Sandbox { // it was not made anew since
				w.boxFailed(pod, err)
			}
		})
		return &Failure{Reason: "FailedCreatePodSandBox", Message: err.Error(), RetryAt: time.Now()}
	}
	if err != nil {
		w.post(func() { w.reasons[id] = err.Error() })
		// What it left counts as an attempt that ended: the back-off between restarts applies.
		return fail("RunContainerError", time.Now(), err)
	}
	s.event(pod, c.Name, corev1.EventTypeNormal, "Started", "Container started")
	if !hasPostStart(c) {
		return nil
	}
	w.post(func() { w.listed = false }) // it runs, though it has not started until the hook is done
	ip := ""
	if len(spec.Sandbox.Addrs) > 0 {
		ip = spec.Sandbox.Addrs[0].String()
	}
	if err := s.hooks.run(ctx, c.Lifecycle.PostStart, c, id, ip, s.fellBack(pod, c.Name)); err != nil && ctx.Err() == nil {
		s.cfg.Log.Warn("postStart hook failed", "pod", pod.Namespace+"/"+pod.Name, "container", c.Name, "error", err)
		s.event(pod, c.Name, corev1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed")
		grace := time.Duration(corev1.DefaultTerminationGracePeriodSeconds) * time.Second
		if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
			grace = time.Duration(*g) * time.Second
		}
		stop := Action{Kind: StopContainer, Container: c.Name, ID: id, Grace: grace, Message: "FailedPostStartHook"}
		if err := s.stopContainer(ctx, pod, stop, ip, false); err != nil {
			s.cfg.Log.Error("stop container", "pod", pod.Namespace+"/"+pod.Name, "container", c.Name, "error", err)
		}
	}
	return nil
}

// fellBack says in an event that a hook was asked by HTTP, though it is declared to be HTTPS.
func (s *Set) fellBack(pod *corev1.Pod, container string) func(host string) {
	return func(host string) {
		s.event(pod, container, corev1.EventTypeWarning, "LifecycleHTTPFallback", "request to HTTPS lifecycle hook %s got HTTP response, retry with HTTP succeeded", host)
	}
}

// configMessage is the error without the sentinel in front, as kubelet shows it.
func configMessage(err error) error {
	return errors.New(strings.TrimPrefix(err.Error(), errConfig.Error()+": "))
}

// stopContainer runs the preStop hook and stops the container, both within the grace.
func (s *Set) stopContainer(ctx context.Context, pod *corev1.Pod, a Action, podIP string, told bool) error {
	end := time.Now().Add(a.Grace)
	c := specOf(pod, a.Container)
	if !told {
		s.event(pod, a.Container, corev1.EventTypeNormal, "Killing", "%s", a.Message)
		if c != nil && c.Lifecycle != nil && c.Lifecycle.PreStop != nil && a.Grace > 0 {
			hctx, cancel := context.WithDeadline(ctx, end)
			err := s.hooks.run(hctx, c.Lifecycle.PreStop, c, a.ID, podIP, s.fellBack(pod, a.Container))
			cancel()
			if err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("preStop hook failed", "pod", pod.Namespace+"/"+pod.Name, "container", a.Container, "error", err)
				s.event(pod, a.Container, corev1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed")
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	left := time.Until(end)
	if a.Grace > 0 {
		left = max(left, minGrace) // after a hook that took it all (kubelet: minimumGracePeriodInSeconds)
	}
	return s.cfg.Runtime.Stop(ctx, a.ID, max(left, 0))
}
