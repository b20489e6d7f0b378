// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-client/pkg/logs"

	"skep.io/skep/node/runtime"
)

// logs answers with a container's log, and follows it when asked to.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	opts, err := parseLogOptions(r.URL.Query())
	if err != nil {
		writeError(w, err)
		return
	}
	pod, err := s.pod(r)
	if err != nil {
		writeError(w, err)
		return
	}
	c, err := s.logged(r.Context(), pod, r.PathValue("container"), opts.Previous)
	if err != nil {
		writeError(w, err)
		return
	}
	out := &flushWriter{w: w, c: http.NewResponseController(w)}
	var stdout, stderr io.Writer = out, out
	if opts.Stream != nil {
		switch *opts.Stream {
		case corev1.LogStreamStdout:
			stderr = nil
		case corev1.LogStreamStderr:
			stdout = nil
		}
	}
	w.Header().Set("Content-Type", "text/plain")
	if c.LogPath == "" {
		return
	}
	if opts.Follow {
		// Headers now: a quiet container must not look like a dead connection.
		_ = out.c.Flush()
	}
	state := containerState{pod: c.PodUID, containers: s.cfg.Containers}
	err = logs.ReadLogs(r.Context(), c.LogPath, c.ID, readerOptions(opts, time.Now()), state, stdout, stderr)
	if err != nil && r.Context().Err() == nil {
		s.cfg.Log.Warn("reading a container log", "namespace", pod.Namespace, "pod", pod.Name, "container", c.Name, "error", err)
		if !out.used {
			writeError(w, fail(http.StatusBadRequest, "%v", err))
		}
	}
}

func readerOptions(o *corev1.PodLogOptions, now time.Time) *logs.LogOptions {
	out := &logs.LogOptions{Timestamp: o.Timestamps, Follow: o.Follow, TailLines: o.TailLines, LimitBytes: o.LimitBytes}
	switch {
	case o.SinceTime != nil:
		out.Since = o.SinceTime.Time
	case o.SinceSeconds != nil:
		out.Since = now.Add(-time.Duration(*o.SinceSeconds) * time.Second)
	}
	return out
}

// parseLogOptions reads kubelet's query parameters.
func parseLogOptions(q url.Values) (*corev1.PodLogOptions, error) {
	o := &corev1.PodLogOptions{}
	number := func(name string, least int64) (*int64, error) {
		if q.Get(name) == "" {
			return nil, nil
		}
		n, err := strconv.ParseInt(q.Get(name), 10, 64)
		if err != nil || n < least {
			return nil, fail(http.StatusUnprocessableEntity, "invalid %s %q", name, q.Get(name))
		}
		return &n, nil
	}
	flag := func(name string) (bool, error) {
		switch v := q.Get(name); v {
		case "":
			return q.Has(name), nil
		default:
			b, err := strconv.ParseBool(v)
			if err != nil {
				return false, fail(http.StatusBadRequest, "invalid %s %q", name, v)
			}
			return b, nil
		}
	}
	var err error
	if o.Follow, err = flag("follow"); err != nil {
		return nil, err
	}
	if o.Previous, err = flag("previous"); err != nil {
		return nil, err
	}
	if o.Timestamps, err = flag("timestamps"); err != nil {
		return nil, err
	}
	if o.TailLines, err = number("tailLines", 0); err != nil {
		return nil, err
	}
	if tail := q.Get("tail"); tail != "" && tail != "all" && o.TailLines == nil {
		if o.TailLines, err = number("tail", 0); err != nil {
			return nil, err
		}
	}
	if o.LimitBytes, err = number("limitBytes", 1); err != nil {
		return nil, err
	}
	if o.SinceSeconds, err = number("sinceSeconds", 1); err != nil {
		return nil, err
	}
	if since := q.Get("sinceTime"); since != "" {
		t, err := time.Parse(time.RFC3339, since)
		if err != nil {
			return nil, fail(http.StatusBadRequest, "invalid sinceTime %q", since)
		}
		if o.SinceSeconds != nil {
			return nil, fail(http.StatusUnprocessableEntity, "at most one of sinceTime and sinceSeconds may be given")
		}
		o.SinceTime = &metav1.Time{Time: t}
	}
	switch stream := q.Get("stream"); stream {
	case "", corev1.LogStreamAll:
	case corev1.LogStreamStdout, corev1.LogStreamStderr:
		if o.TailLines != nil {
			return nil, fail(http.StatusUnprocessableEntity, "tailLines may not be given with stream %s", stream)
		}
		o.Stream = &stream
	default:
		return nil, fail(http.StatusBadRequest, "invalid stream %q", stream)
	}
	return o, nil
}

// containerState tells the log reader whether more can come. The reader asks nothing else of a
// runtime, so the rest of the interface stays nil.
type containerState struct {
	internalapi.RuntimeService

	pod        types.UID
	containers Containers
}

func (s containerState) ContainerStatus(ctx context.Context, id string, _ bool) (*runtimeapi.ContainerStatusResponse, error) {
	state := runtimeapi.ContainerState_CONTAINER_EXITED
	all, err := s.containers.ListPod(ctx, s.pod)
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		if c.ID == id && c.State != runtime.Exited {
			state = runtimeapi.ContainerState_CONTAINER_RUNNING
		}
	}
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: id, State: state}}, nil
}

// flushWriter sends each write on at once: who follows a log wants to see it.
type flushWriter struct {
	w    http.ResponseWriter
	c    *http.ResponseController
	used bool
}

func (f *flushWriter) Write(p []byte) (int, error) {
	f.used = true
	n, err := f.w.Write(p)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}
