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
	queue   workqueue.TypedRateLimitingInterface[string]
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
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry),
			workqueue.TypedRateLimitingQueueConfig[string]{Name: name}),
	}
}

// Add asks for key to be synced as soon as a worker is free.
func (q *Queue) Add(key string) { q.queue.Add(key) }

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

	start := q.clock.Now()
	after, err := q.sync(ctx, key)
	q.metrics.observe(q.name, outcome(err), q.clock.Since(start), q.queue.Len())

	switch {
	case err == nil || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		// Nothing can be created in a namespace that is going; its deletion will end this.
		q.queue.Forget(key)
		if after > 0 {
			q.queue.AddAfter(key, after)
		}
	case ctx.Err() != nil:
		return false
	default:
		if isRoutine(err) {
			q.log.Debug("sync will be retried", "key", key, "err", err)
		} else {
			q.log.Warn("sync failed, will be retried", "key", key, "attempts", q.queue.NumRequeues(key)+1, "err", err)
		}
		q.queue.AddRateLimited(key)
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
