// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/runtime"
)

// ensureImage is the action: what it returns runs in the worker's goroutine.
func (w *worker) ensureImage(a Action, pod *corev1.Pod) func(ctx context.Context) func() {
	s := w.set
	want := wantedImage(pod, a.Container)
	old := w.images[a.Container]
	w.images[a.Container] = ImageState{Attempt: a.Attempt, Pulling: true, Failure: old.Failure}
	if want.volume != "" {
		w.volumes.Present, w.volumes.Files = true, true
	}
	return func(ctx context.Context) func() {
		began := time.Now()
		img, pulled, err := s.pulls.ensure(ctx, want.ref, want.policy,
			func() ([]runtime.Auth, error) { return credentials(ctx, pod, want.ref, s.cfg.Objects.Secret) },
			func() { s.event(pod, want.container, corev1.EventTypeNormal, "Pulling", "Pulling image %q", want.ref) })
		took := time.Since(began).Round(time.Millisecond)
		var mountErr error
		if err == nil && want.volume != "" {
			mountErr = s.cfg.Volumes.MountImage(ctx, pod, want.volume, img.ID)
		}
		return func() {
			if ctx.Err() != nil || errors.Is(mountErr, runtime.ErrImageNotFound) { // it was removed since: it comes again
				delete(w.images, a.Container)
				return
			}
			switch {
			case err != nil:
				w.imageFailed(a, want, err)
				return
			case mountErr != nil:
				w.imageVolumeFailed(a, want, mountErr)
				return
			case pulled:
				s.event(pod, want.container, corev1.EventTypeNormal, "Pulled", "Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.", want.ref, took, took, img.Size)
			default:
				s.event(pod, want.container, corev1.EventTypeNormal, "Pulled", "Container image %q already present on machine", want.ref)
			}
			w.retries.forget(a.key())
			w.images[a.Container] = ImageState{Attempt: a.Attempt, Image: img, Ready: true}
		}
	}
}

// imageVolumeFailed says that an image which is here cannot be mounted.
func (w *worker) imageVolumeFailed(a Action, want wanted, err error) {
	w.set.stats.failed.WithLabelValues(string(a.Kind)).Inc()
	at := w.retries.failed(a.key(), firstRetry, retryLimit)
	w.images[a.Container] = ImageState{Attempt: a.Attempt, Failure: &Failure{Reason: "ImageVolumeMountFailed", Message: err.Error(), RetryAt: at}}
	w.set.event(w.pod, "", corev1.EventTypeWarning, "FailedMount", "MountVolume.SetUp failed for volume %q : %v", want.volume, err)
}

// imageFailed says so as kubelet does: first ErrImagePull, then, while it waits, ImagePullBackOff.
func (w *worker) imageFailed(a Action, want wanted, err error) {
	s := w.set
	w.set.stats.failed.WithLabelValues(string(a.Kind)).Inc()
	at := w.retries.failed(a.key(), firstPull, pullLimit)
	f := imageFailure(err, at)
	w.images[a.Container] = ImageState{Attempt: a.Attempt, Failure: f}
	switch f.Reason {
	case errPull.Error():
		s.event(w.pod, want.container, corev1.EventTypeWarning, "Failed", "Failed to pull image %q: %s", want.ref, f.Message)
		w.after(pullErrShow, func() {
			if w.images[a.Container].Failure == f {
				w.images[a.Container] = ImageState{Attempt: a.Attempt, Failure: &Failure{Reason: "ImagePullBackOff", RetryAt: at,
					Message: fmt.Sprintf("Back-off pulling image %q: ErrImagePull: %s", want.ref, f.Message)}}
				s.event(w.pod, want.container, corev1.EventTypeNormal, "BackOff", "Back-off pulling image %q", want.ref)
				s.event(w.pod, want.container, corev1.EventTypeWarning, "Failed", "Error: ImagePullBackOff")
			}
		})
	case errNeverPull.Error():
		s.event(w.pod, want.container, corev1.EventTypeWarning, "ErrImageNeverPull", "%s", f.Message)
	default:
		s.event(w.pod, want.container, corev1.EventTypeWarning, "InspectFailed", "%s", f.Message)
	}
	s.event(w.pod, want.container, corev1.EventTypeWarning, "Failed", "Error: %s", f.Reason)
}
