// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// How long failed pods are left alone on a node where one failed just before, as in Kubernetes.
const (
	firstBackOff = time.Second
	lastBackOff  = 15 * time.Minute
)

// place is a DaemonSet's generation on a node: a new template gets a new chance at once.
type place struct {
	daemonSet  types.UID
	generation int64
	node       string
}

// backOff remembers when pods were replaced because they had failed.
type backOff struct {
	mu     sync.Mutex
	places map[place]pause
}

type pause struct {
	since time.Time
	delay time.Duration
}

func newBackOff() *backOff { return &backOff{places: map[place]pause{}} }

// remaining is how long a failed pod must still be left alone.
func (b *backOff) remaining(at place, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	last, ok := b.places[at]
	if !ok {
		return 0
	}
	return max(0, last.since.Add(last.delay).Sub(now))
}

// replaced notes that a failed pod is replaced now, and doubles the pause until the next. What has been quiet for
// twice the longest pause is forgotten.
func (b *backOff) replaced(at place, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for key, last := range b.places {
		if now.Sub(last.since) > 2*lastBackOff {
			delete(b.places, key)
		}
	}
	delay := firstBackOff
	if last, ok := b.places[at]; ok {
		delay = min(2*last.delay, lastBackOff)
	}
	b.places[at] = pause{since: now, delay: delay}
}

// forget drops everything about a DaemonSet that is gone.
func (b *backOff) forget(daemonSet types.UID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for key := range b.places {
		if key.daemonSet == daemonSet {
			delete(b.places, key)
		}
	}
}
