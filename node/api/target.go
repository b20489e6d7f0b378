// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/runtime"
)

// httpError is an error with the status that kubelet answers with.
type httpError struct {
	code int
	text string
}

func (e *httpError) Error() string { return e.text }

func fail(code int, format string, args ...any) error {
	return &httpError{code, fmt.Sprintf(format, args...)}
}

func writeError(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	var h *httpError
	if errors.As(err, &h) {
		code = h.code
	}
	http.Error(w, err.Error(), code)
}

// pod finds the pod that a request's path names.
func (s *Server) pod(r *http.Request) (*corev1.Pod, error) {
	pod, ok := s.cfg.Pods.Pod(r.PathValue("namespace"), r.PathValue("pod"))
	if !ok {
		return nil, fail(http.StatusNotFound, "pod %q does not exist", r.PathValue("pod"))
	}
	if uid := r.PathValue("uid"); uid != "" && uid != string(pod.UID) {
		return nil, fail(http.StatusNotFound, "pod %q with uid %s does not exist", pod.Name, uid)
	}
	return pod, nil
}

// running finds the running container that a request's path names.
func (s *Server) running(r *http.Request) (runtime.Container, error) {
	pod, err := s.pod(r)
	if err != nil {
		return runtime.Container{}, err
	}
	name := r.PathValue("container")
	all, err := s.attempts(r.Context(), pod, name)
	if err != nil {
		return runtime.Container{}, err
	}
	for _, c := range slices.Backward(all) {
		if c.State == runtime.Running {
			return c, nil
		}
	}
	if !declared(pod, name) {
		return runtime.Container{}, fail(http.StatusNotFound, "container %q not found in pod %q", name, pod.Name)
	}
	return runtime.Container{}, fail(http.StatusNotFound, "container not found (%q)", name)
}

// attempts lists the containers of one name, the newest last.
func (s *Server) attempts(ctx context.Context, pod *corev1.Pod, name string) ([]runtime.Container, error) {
	all, err := s.cfg.Containers.ListPod(ctx, pod.UID)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(slices.Clone(all), func(c runtime.Container) bool { return c.Name != name })
	slices.SortStableFunc(all, func(a, b runtime.Container) int {
		if a.Attempt != b.Attempt {
			return a.Attempt - b.Attempt
		}
		return a.CreatedAt.Compare(b.CreatedAt)
	})
	return all, nil
}

func declared(pod *corev1.Pod, name string) bool {
	for _, c := range pod.Spec.Containers {
		if c.Name == name {
			return true
		}
	}
	for _, c := range pod.Spec.InitContainers {
		if c.Name == name {
			return true
		}
	}
	for _, c := range pod.Spec.EphemeralContainers {
		if c.Name == name {
			return true
		}
	}
	return false
}

func statusOf(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// logged finds the container whose log is meant.
func (s *Server) logged(ctx context.Context, pod *corev1.Pod, name string, previous bool) (runtime.Container, error) {
	if !declared(pod, name) {
		return runtime.Container{}, fail(http.StatusNotFound, "container %q not found in pod %q", name, pod.Name)
	}
	all, err := s.attempts(ctx, pod, name)
	if err != nil {
		return runtime.Container{}, err
	}
	if previous {
		// The one before the newest; while the next attempt waits, the newest is itself a previous one.
		if n := len(all); n > 0 && all[n-1].State == runtime.Exited && waits(pod, name) {
			return all[n-1], nil
		} else if n > 1 {
			return all[n-2], nil
		}
		return runtime.Container{}, fail(http.StatusBadRequest, "previous terminated container %q in pod %q not found", name, pod.Name)
	}
	for _, c := range slices.Backward(all) {
		if c.State != runtime.Created {
			return c, nil
		}
	}
	reason := "ContainerCreating"
	if st := statusOf(pod, name); st != nil && st.State.Waiting != nil && st.State.Waiting.Reason != "" {
		reason = st.State.Waiting.Reason
	}
	switch reason {
	case "ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull":
		return runtime.Container{}, fail(http.StatusBadRequest, "container %q in pod %q is waiting to start: trying and failing to pull image", name, pod.Name)
	}
	return runtime.Container{}, fail(http.StatusBadRequest, "container %q in pod %q is waiting to start: %s", name, pod.Name, reason)
}

func waits(pod *corev1.Pod, name string) bool {
	st := statusOf(pod, name)
	return st != nil && st.State.Waiting != nil
}
