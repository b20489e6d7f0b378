// SPDX-License-Identifier: Apache-2.0

// Package runner is what skep's controllers share: one queue a controller, filled by informer events
// and timers, worked off with back-off, and measured. A controller brings a Sync function; the runner
// decides when it is called, never twice at the same time for one key.
package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
)

// Back-off of a key that keeps failing. A conflict with another writer is usually over after the first.
const (
	firstRetry = 5 * time.Millisecond
	lastRetry  = time.Minute
	// longestHold is how long events about a key that keeps failing wait for its next retry. Pods of an owner whose
	// quota is full change all the time, and each change would be another request to be refused.
	longestHold = time.Second
)

// ErrStaleCache is returned by a Sync that saw its cache behind its own writes. It is retried like
// every error but not logged: waiting for the watch is normal.
var ErrStaleCache = errors.New("informer cache is behind this controller's own writes")

// Deps are what every controller is made from.
type Deps struct {
	Client    kubernetes.Interface
	Informers informers.SharedInformerFactory
	// Recorder gives an event recorder for a component name such as "deployment-controller".
	Recorder func(component string) record.EventRecorder
	Log      *slog.Logger
	Metrics  *Metrics
	Clock    clock.PassiveClock
}

// Sync brings the object that key names one step nearer to what is desired. It is called again after
// requeueAfter if that is positive, and with back-off if it returns an error.
type Sync func(ctx context.Context, key string) (requeueAfter time.Duration, err error)

// Queue is a controller's work: keys that wait, and the workers that sync them.
type Queue struct {
	name    string
	workers int
	sync    Sync
	log     *slog.Logger
	metrics *Metrics
	clock   clock.PassiveClock
	queue   workqueue.TypedDelayingInterface[string]
	retries workqueue.TypedRateLimiter[string]

	mu   sync.Mutex
	held map[string]time.Time // keys that failed, until when events about them wait
}

// New makes the queue of the controller called name.
func New(name string, workers int, deps Deps, sync Sync) *Queue {
	return &Queue{
		name:    name,
		workers: workers,
		sync:    sync,
		log:     deps.Log.With("controller", name),
		metrics: deps.Metrics,
		clock:   deps.Clock,
		queue:   workqueue.NewTypedDelayingQueueWithConfig(workqueue.TypedDelayingQueueConfig[string]{Name: name, Clock: ticking(deps.Clock)}),
		retries: workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry),
		held:    map[string]time.Time{},
	}
}

// ticking is a clock that can also wake, if c is one; nil stands for the real one.
func ticking(c clock.PassiveClock) clock.WithTicker {
	if c, ok := c.(clock.WithTicker); ok {
		return c
	}
	return nil
}

// Add asks for key to be synced as soon as a worker is free; soon, if its last syncs failed.
func (q *Queue) Add(key string) { q.queue.Add(key) }

// hold is how much longer events about key have to wait. It is asked when the key's turn has come, as events also
// come while it is being synced.
func (q *Queue) hold(key string) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if until, held := q.held[key]; held {
		return until.Sub(q.clock.Now())
	}
	return 0
}

// succeeded forgets how often a key has failed.
func (q *Queue) succeeded(key string) {
	q.retries.Forget(key)
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.held, key)
}

// retry has a failed key synced again, later from time to time. What another writer or the watch settles by an event
// is not held.
func (q *Queue) retry(key string, hold bool) {
	wait := q.retries.When(key)
	if hold {
		q.mu.Lock()
		q.held[key] = q.clock.Now().Add(min(wait, longestHold))
		q.mu.Unlock()
	}
	q.queue.AddAfter(key, wait)
}

// AddAfter asks for key to be synced once d has passed.
func (q *Queue) AddAfter(key string, d time.Duration) { q.queue.AddAfter(key, d) }

// Run works until ctx ends, beginning when every cache named has its first list.
func (q *Queue) Run(ctx context.Context, synced ...cache.InformerSynced) error {
	defer q.queue.ShutDown()
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("%s: caches did not fill", q.name)
	}
	q.log.Debug("controller started", "workers", q.workers)

	var wg sync.WaitGroup
	for range q.workers {
		wg.Go(func() {
			for q.next(ctx) {
			}
		})
	}
	<-ctx.Done()
	q.queue.ShutDown()
	wg.Wait()
	return nil
}

func (q *Queue) next(ctx context.Context) bool {
	key, shutdown := q.queue.Get()
	if shutdown {
		return false
	}
	defer q.queue.Done(key)
	if wait := q.hold(key); wait > 0 {
		q.queue.AddAfter(key, wait)
		return true
	}

	start := q.clock.Now()
	after, err := q.sync(ctx, key)
	q.metrics.observe(q.name, outcome(err), q.clock.Since(start), q.queue.Len())

	switch {
	case err == nil || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		// Nothing can be created in a namespace that is going; its deletion will end this.
		q.succeeded(key)
		if after > 0 {
			q.queue.AddAfter(key, after)
		}
	case ctx.Err() != nil:
		return false
	default:
		if isRoutine(err) {
			q.log.Debug("sync will be retried", "key", key, "err", err)
		} else {
			q.log.Warn("sync failed, will be retried", "key", key, "attempts", q.retries.NumRequeues(key)+1, "err", err)
		}
		q.retry(key, !isRoutine(err))
	}
	return true
}

// isRoutine tells errors that the next attempt with a fresher cache settles.
func isRoutine(err error) bool {
	return errors.Is(err, ErrStaleCache) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err)
}

func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case isRoutine(err):
		return "conflict"
	default:
		return "error"
	}
}
