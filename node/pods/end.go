// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Ending is why and how a node ends a pod that the API does not want ended. The pod has failed then, and whoever owns it
// makes another.
type Ending struct {
	Reason  string
	Message string
	// Grace is the most that the pod's containers get, whatever the pod asks for.
	Grace time.Duration
}

// Evict ends a pod because the node is short of something.
func (s *Set) Evict(uid types.UID, message string) {
	s.End(uid, Ending{Reason: reasonEvicted, Message: message, Grace: evictionGrace})
}

// EvictWithin is Evict for a shortage that is not urgent: the pod may have as much of its own grace.
func (s *Set) EvictWithin(uid types.UID, message string, most time.Duration) {
	s.End(uid, Ending{Reason: reasonEvicted, Message: message, Grace: most})
}

// Words of kubelet for a node that is about to be shut down (nodeshutdown_manager_linux.go).
const (
	reasonTerminated   = "Terminated"
	messageTerminated  = "Pod was terminated in response to imminent node shutdown."
	reasonNodeShutdown = "NodeShutdown"
	messageShutdown    = "Pod was rejected as the node is shutting down."
)

// Terminate ends a pod because the node is about to be shut down.
func (s *Set) Terminate(uid types.UID, grace time.Duration) {
	s.End(uid, Ending{Reason: reasonTerminated, Message: messageTerminated, Grace: grace})
}

// End ends a pod. What ends already goes on as it began.
func (s *Set) End(uid types.UID, e Ending) {
	s.withWorker(uid, func(w *worker) {
		if w.ended != nil || w.out.Load() {
			return
		}
		w.ended = &e
		s.event(w.pod, "", corev1.EventTypeWarning, e.Reason, "%s", e.Message)
		s.cfg.Log.Warn("pod is ended", "pod", w.pod.Namespace+"/"+w.pod.Name, "reason", e.Reason, "message", e.Message)
	})
}

// Close has new pods refused because the node is about to be shut down, or with false taken again.
func (s *Set) Close(closed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = nil
	if closed {
		s.closed = &refusal{Reason: reasonNodeShutdown, Message: messageShutdown}
	}
}

// Await returns once the API knows that these pods are over, or nothing of them is left, or with ctx's error.
func (s *Set) Await(ctx context.Context, uids []types.UID) error {
	for _, uid := range uids {
		s.mu.Lock()
		w := s.workers[uid]
		s.mu.Unlock()
		if w == nil {
			continue
		}
		select {
		case <-w.over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// finish tells Await.
func (w *worker) finish() {
	select {
	case <-w.over:
	default:
		close(w.over)
	}
}
