// SPDX-License-Identifier: Apache-2.0

// Package scheduler decides on which node a pod runs.
//
// It keeps a snapshot of the cluster that informer events change by differences (snapshot.go), a
// queue of pods without a node (queue.go), and takes one pod at a time through the filters
// (filters.go) and the scores (scores.go). A decision is accounted at once and written to the API
// server in the background (bind.go), so that the next decision does not wait for it. A pod that
// fits nowhere sleeps until an event on some node could help it (events.go); if pods of lower
// priority are in its way, they are asked to go (preempt.go).
//
// Everything it knows comes from the API: after a restart it starts from the informers' lists.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	policylisters "k8s.io/client-go/listers/policy/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

// Name is the schedulerName of the pods that this scheduler takes care of unless it is configured otherwise, and the
// source of its events.
const Name = v1.DefaultSchedulerName

// bindingsInFlight bounds the API calls that write decisions.
const bindingsInFlight = 64

// Config is what the scheduler needs. All fields but Metrics and Profiles are required.
type Config struct {
	Client    kubernetes.Interface
	Informers informers.SharedInformerFactory // Pods, Nodes and PodDisruptionBudgets are used
	Log       *slog.Logger
	Metrics   prometheus.Registerer
	Profiles  Profiles // nil: the default profile alone
}

// Scheduler is a running scheduler.
type Scheduler struct {
	client   kubernetes.Interface
	log      *slog.Logger
	recorder recorders
	budgets  policylisters.PodDisruptionBudgetLister
	metrics  *metrics
	reports  *reporter
	now      func() time.Time

	// mu guards what decisions read and events change. A decision is made under it, together with
	// where the pod goes next, so no event can fall between the two and be lost.
	mu       sync.Mutex
	snapshot *snapshot
	queue    *queue
	search   *searcher
	binding  map[types.UID]*pending // decided, being written
	doomed   map[types.UID]bool     // victims whose deletion was asked for
	waits    map[types.UID]*volumeWait

	wake  chan struct{} // has an element when the queue may have something to try
	slots chan struct{} // one element a binding in flight
	work  sync.WaitGroup
	// stopping is closed when no more decisions are made.
	stopping chan struct{}
}

// Run schedules pods until ctx ends. It returns when decisions that were being written are.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Client == nil || cfg.Informers == nil || cfg.Log == nil {
		return errors.New("scheduler: Client, Informers and Log are required")
	}
	broadcaster := record.NewBroadcaster() // not ended by ctx: what is being bound then is still told
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: cfg.Client.CoreV1().Events("")})
	s, err := newScheduler(cfg, func(scheduler string) record.EventRecorder {
		return broadcaster.NewRecorder(scheme.Scheme, v1.EventSource{Component: scheduler})
	})
	if err != nil {
		return err
	}
	synced, stop, err := s.listen(cfg.Informers)
	if err != nil {
		return err
	}
	defer stop()
	cfg.Informers.Start(ctx.Done())
	// Before every pod and node is known, room that looks free may be taken.
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	s.mu.Lock()
	s.log.Info("scheduling begins", "nodes", len(s.snapshot.nodes), "bound", len(s.snapshot.pods), "pending", len(s.queue.byUID))
	s.mu.Unlock()
	s.work.Go(func() { s.reports.run(ctx) })
	s.loop(ctx)
	close(s.stopping)
	s.work.Wait()
	return nil
}

// recorders make what records events as a scheduler: the one that the pod named, whose profile decided.
type recorders func(scheduler string) record.EventRecorder

func (r recorders) of(pod *v1.Pod) record.EventRecorder { return r(pod.Spec.SchedulerName) }

func newScheduler(cfg Config, recorder recorders) (*Scheduler, error) {
	s := &Scheduler{
		client:   cfg.Client,
		log:      cfg.Log,
		recorder: recorder,
		budgets:  cfg.Informers.Policy().V1().PodDisruptionBudgets().Lister(),
		now:      time.Now,
		snapshot: newSnapshot(),
		queue:    newQueue(),
		search:   newSearcher(rand.Uint64()),
		binding:  map[types.UID]*pending{},
		doomed:   map[types.UID]bool{},
		waits:    map[types.UID]*volumeWait{},
		stopping: make(chan struct{}),
		wake:     make(chan struct{}, 1),
		slots:    make(chan struct{}, bindingsInFlight),
	}
	if cfg.Profiles != nil {
		s.snapshot.profiles = cfg.Profiles
	}
	s.reports = newReporter(cfg.Client, recorder, s.log)
	var err error
	if s.metrics, err = newMetrics(cfg.Metrics, s); err != nil {
		return nil, fmt.Errorf("scheduler: registering metrics: %w", err)
	}
	return s, nil
}

func (s *Scheduler) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		started, next := s.scheduleOne()
		if started {
			continue
		}
		<-s.slots
		if next.IsZero() { // nothing to wait for but events
			timer.Stop()
		} else {
			timer.Reset(next.Sub(s.now()))
		}
		select {
		case <-s.wake:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
	}
}

// scheduleOne takes pods from the queue until one has found a node, and starts the writing of that;
// the writer frees the slot. started is false when the queue has nothing to try before next.
func (s *Scheduler) scheduleOne() (started bool, next time.Time) {
	for {
		s.mu.Lock()
		now := s.now()
		item, next := s.queue.pop(now)
		if item == nil {
			s.mu.Unlock()
			return false, next
		}
		began := time.Now()
		chosen, failed := s.search.decide(item.pod, s.snapshot)
		if chosen != nil {
			volumes, err := s.assume(item, chosen)
			how := s.search.choice
			s.mu.Unlock()
			s.metrics.attempt("scheduled", began)
			s.work.Go(func() {
				defer func() { <-s.slots }()
				if err == nil && !volumes.empty() {
					err = s.bindVolumes(item.pod, &volumes, chosen.name)
				}
				switch {
				case err == nil:
					s.bind(item, chosen.name, &how)
				case !errors.Is(err, errStopping):
					s.bindingFailed(item, chosen.name, fmt.Errorf("running PreBind plugin %q: binding volumes: %w", "VolumeBinding", err))
				}
			})
			return true, time.Time{}
		}
		s.reject(item, failed, now)
		s.mu.Unlock()
		s.metrics.attempt("unschedulable", began)
	}
}

// assume accounts the pod as if it were bound already. It returns what is to be done about its volumes before it is.
func (s *Scheduler) assume(item *pending, n *node) (volumes volumePlan, err error) {
	if len(item.pod.claims) > 0 {
		volumes, err = s.snapshot.storage.assumeVolumes(item.pod, n.object)
	}
	s.queue.remove(item.pod.uid)
	s.binding[item.pod.uid] = item
	s.snapshot.nominate(item.pod, "")
	s.snapshot.setPod(item.pod, n.name)
	s.wakeForPod(podChange{after: item.pod}, s.now())
	return volumes, err
}

// reject puts the pod to sleep, makes room for it where that is allowed, and has the reasons told.
func (s *Scheduler) reject(item *pending, d *diagnosis, now time.Time) {
	r := report{pod: item.pod.object, reason: v1.PodReasonUnschedulable, nominated: item.pod.nominated}
	if d.nodes > 0 {
		if room := s.search.preempt(item.pod, s.snapshot, d, s.disruptionBudgets(), s.doomed, now); room != nil {
			s.makeRoom(item.pod, room, now)
			r.nominated = room.node.name
		} else if d.note != reasonVictimsTerminate && item.pod.nominated != "" {
			s.release(item.pod, now)
			r.nominated = ""
		}
	}
	r.message = d.message()
	s.queue.sleep(item, d.blockers, now)
	s.reports.tell(r)
}

// release takes a nomination back; others may have waited for what it reserved.
func (s *Scheduler) release(p *pod, now time.Time) {
	freed := s.snapshot.byName[p.nominated]
	s.snapshot.nominate(p, "")
	s.wakeFor(freed, now)
}

// poke tells the loop that the queue may have something to try.
func (s *Scheduler) poke() {
	select {
	case s.wake <- struct{}{}:
	default: // it has been told and not looked yet
	}
}
