// SPDX-License-Identifier: Apache-2.0

package job

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// How long a failed pod's place stays empty: doubled with every failure after the first.
const (
	firstBackoff = 10 * time.Second
	lastBackoff  = 10 * time.Minute
)

// Backoff remembers a Job's failures since its last success. It lives in memory: whoever has none begins with the
// pods that are still there.
type Backoff struct {
	Failures int32
	// Last is when the last of them was.
	Last time.Time
	// known are the ended pods that are in it already, as long as they are tracked.
	known map[types.UID]bool
}

// remaining is how long no pod may be created yet.
func (b Backoff) remaining(now time.Time) time.Duration { return backoff(b.Failures, b.Last, now) }

func backoff(failures int32, last, now time.Time) time.Duration {
	if failures == 0 {
		return 0
	}
	d := firstBackoff
	for range failures - 1 {
		if d *= 2; d >= lastBackoff {
			d = lastBackoff
			break
		}
	}
	return max(0, d-now.Sub(last))
}

// next adds the pods that ended since b was made. What b has in it already is not added again, however often the
// same pods are seen.
func (b *Backoff) next(v *view) Backoff {
	next := Backoff{known: map[types.UID]bool{}}
	candidates := v.tracked
	if b != nil {
		next.Failures, next.Last = b.Failures, b.Last
	} else {
		candidates = v.Pods
	}
	var failures []time.Time
	var success time.Time
	for _, pod := range candidates {
		failed := hasFailed(v.Job, pod)
		if !failed && pod.Status.Phase != corev1.PodSucceeded || misplaced(v.Job, pod) {
			continue
		}
		if b != nil && b.known[pod.UID] {
			continue
		}
		if at := endedAt(pod); failed {
			failures = append(failures, at)
		} else if at.After(success) || success.IsZero() {
			success = at
		}
	}
	if !success.IsZero() {
		next.Failures, next.Last = 0, time.Time{}
	}
	for _, at := range failures {
		if success.IsZero() || at.After(success) {
			next.Failures++
			if at.After(next.Last) {
				next.Last = at
			}
		}
	}
	for _, pod := range v.tracked {
		if hasFailed(v.Job, pod) || pod.Status.Phase == corev1.PodSucceeded {
			next.known[pod.UID] = true
		}
	}
	return next
}
