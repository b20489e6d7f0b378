// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/steps"
)

// worker owns one pod. Everything below mu belongs to its goroutine; others hand it functions to run.
type worker struct {
	set   *Set
	shown atomic.Pointer[corev1.Pod] // for look-ups by others
	out   atomic.Bool                // it takes nothing of the node any more: refused, over, or deleted
	// allotted is what the node lets the pod have; written with Set.mu held.
	allotted atomic.Pointer[allotment]

	mu     sync.Mutex
	posted []func()
	notify chan struct{}

	pod           *corev1.Pod
	static        types.UID   // of a static pod; empty for others
	mirror        *corev1.Pod // what shows a static pod in the API; nil: nothing does
	gone          bool
	refused       *refusal
	ended         *Ending
	over          chan struct{} // closed when the API knows that the pod is over, or nothing of it is left
	startTime     time.Time
	stopTime      time.Time
	box           *sandbox.Sandbox
	bare          bool // Observed.Unfurnished
	boxFailure    *Failure
	limits        *cgroup.Limits // of the pod's cgroup; nil if they are not known
	resizing      bool           // a resize was begun and its end not told of
	resized       map[string]bool
	again         map[string]bool // by container id: stopped to start again, whatever it ends with
	resizeFailure *Failure
	volumes       VolumeState
	containers    []runtime.Container
	listed        bool // containers is what the runtime has
	starting      map[string]bool
	starts        map[string]*Failure
	images        map[string]ImageState
	probes        map[string]ProbeState
	messages      map[string]string
	reasons       map[string]string // by container id: why it could not start
	stopping      map[string]bool   // by container id: told to, the event is out
	waiting       map[string]int    // by container name: the attempt whose back-off was told of
	targets       []Target
	ops           map[string]*op
	retries       retries
	reported      *corev1.PodStatus
	timers        []*time.Timer
	born          time.Time // when this agent first saw the pod; zero once its start is measured
}

// op is an action on its way.
type op struct {
	action   Action
	cancel   context.CancelFunc
	deadline time.Time // StopContainer: when grace ends
}

func newWorker(s *Set, pod *corev1.Pod, r *remains) *worker {
	w := &worker{
		set: s, pod: pod, over: make(chan struct{}), notify: make(chan struct{}, 1), startTime: time.Now(), listed: true,
		starting: map[string]bool{}, starts: map[string]*Failure{}, images: map[string]ImageState{}, probes: map[string]ProbeState{},
		messages: map[string]string{}, reasons: map[string]string{}, stopping: map[string]bool{}, waiting: map[string]int{},
		resized: map[string]bool{}, again: map[string]bool{}, ops: map[string]*op{}, retries: retries{}, born: time.Now(),
	}
	w.shown.Store(pod)
	w.allotted.Store(&allotment{pod: pod})
	if t := pod.Status.StartTime; t != nil {
		w.startTime = t.Time
	}
	if r != nil {
		w.containers, w.box, w.born = r.containers, r.sandbox, time.Time{}
		w.volumes.Files = r.files || len(r.containers) > 0
		w.bare = len(r.containers) == 0 // a container is made only once they are written
		w.adopt()
	}
	w.volumes.Present = s.cfg.Volumes.Present(pod.UID)
	w.volumes.Files = w.volumes.Files || s.files.present(pod)
	return w
}

// adopt takes over what an earlier agent ran, and believes what it last said of its health, so that nothing that serves
// stops serving while the probes come round again.
func (w *worker) adopt() {
	for _, c := range w.containers {
		if c.State == runtime.Running {
			// Its volumes are there, or it would not run; Stale has them refreshed.
			w.volumes.Ready, w.volumes.Stale = true, true
		}
	}
	w.believe(w.pod.Status)
	w.listMessages()
}

// believe takes what was said of the health of containers that run.
func (w *worker) believe(status corev1.PodStatus) {
	known := map[string]corev1.ContainerStatus{}
	for _, s := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses) {
		known[s.ContainerID] = s
	}
	for _, c := range w.containers {
		if s, ok := known["containerd://"+c.ID]; ok && c.State == runtime.Running {
			w.probes[c.ID] = ProbeState{Started: s.Started != nil && *s.Started, Ready: s.Ready}
		}
	}
}

// post has f run in the worker's goroutine.
func (w *worker) post(f func()) {
	w.mu.Lock()
	w.posted = append(w.posted, f)
	w.mu.Unlock()
	select {
	case w.notify <- struct{}{}:
	default:
	}
}

func (w *worker) drain() {
	w.mu.Lock()
	list := w.posted
	w.posted = nil
	w.mu.Unlock()
	for _, f := range list {
		f()
	}
}

// after has f run in the worker's goroutine in a while.
func (w *worker) after(d time.Duration, f func()) {
	w.timers = append(w.timers, time.AfterFunc(d, func() { w.post(f) }))
}

func (w *worker) loop(ctx context.Context) {
	w.set.cfg.Volumes.Track(w.pod)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		w.drain()
		if !w.listed {
			w.list(ctx)
		}
		o := w.observe()
		p := plan(w.granted(), o)
		if p.Ending && w.stopTime.IsZero() {
			w.stopTime = o.Now
		}
		w.report(o, &p)
		w.act(&p)
		w.probe(p.Probes)
		w.tellWaiting(&p)
		w.tellResized(o)
		if p.Done && len(w.ops) == 0 {
			break
		}
		wait := time.Hour
		if next := earliest(p.Wake, w.retries.next()); !next.IsZero() {
			wait = max(time.Until(next), 0)
		}
		timer.Reset(wait)
		select {
		case <-w.notify:
		case <-timer.C:
		case <-ctx.Done():
			w.end(false)
			return
		}
	}
	w.end(true)
}

func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// end waits for what is on its way. A pod that is gone is no longer watched for; one that is left running stays as it is.
func (w *worker) end(gone bool) {
	for _, t := range w.timers {
		t.Stop()
	}
	w.set.cfg.Prober.Set(w.pod.UID, nil)
	for _, o := range w.ops {
		o.cancel()
	}
	for len(w.ops) > 0 {
		<-w.notify
		w.drain()
	}
	w.set.cfg.Volumes.Untrack(w.pod.UID)
	if gone {
		w.set.cfg.Log.Info("pod is gone", "pod", w.pod.Namespace+"/"+w.pod.Name, "uid", w.pod.UID)
	}
}

// seen takes in a newer version of the pod.
func (w *worker) seen(pod *corev1.Pod) {
	if older(pod, w.pod) {
		return
	}
	if !equality.Semantic.DeepEqual(pod.Labels, w.pod.Labels) || !equality.Semantic.DeepEqual(pod.Annotations, w.pod.Annotations) {
		w.volumes.Stale = true // downward API volumes show them
	}
	w.pod = pod
	w.shown.Store(pod)
	w.set.reallot(w)
}

// older compares resource versions, which the API server hands out in order; what is no number is taken as newer.
func older(a, b *corev1.Pod) bool {
	x, err1 := strconv.ParseUint(a.ResourceVersion, 10, 64)
	y, err2 := strconv.ParseUint(b.ResourceVersion, 10, 64)
	return err1 == nil && err2 == nil && x < y
}

// list asks the runtime what there is.
func (w *worker) list(ctx context.Context) {
	containers, err := w.set.cfg.Runtime.ListPod(ctx, w.pod.UID)
	if err != nil {
		if ctx.Err() == nil {
			w.set.cfg.Log.Error("list containers", "pod", w.pod.Namespace+"/"+w.pod.Name, "error", err)
			w.after(time.Second, func() {})
		}
		return
	}
	w.listed, w.containers = true, containers
	w.listMessages()
}

// listMessages reads the last words of containers that have ended.
func (w *worker) listMessages() {
	here := map[string]bool{}
	for i := range w.containers {
		c := &w.containers[i]
		here[c.ID] = true
		if c.Reason == "" && c.State == runtime.Created {
			if m, ok := w.reasons[c.ID]; ok {
				c.Reason, c.Message = "StartError", m
			}
		}
		if c.State != runtime.Exited {
			continue
		}
		if _, ok := w.messages[c.ID]; ok {
			continue
		}
		if spec := w.spec(c.Name); spec != nil {
			w.messages[c.ID] = w.set.files.terminationMessage(w.pod, spec, c.Attempt, c.ExitCode != 0)
		}
	}
	keepOnly(w.messages, here)
	keepOnly(w.probes, here)
	keepOnly(w.resized, here)
	keepOnly(w.again, here)
}

// keepOnly forgets what is noted of containers that are not here any more.
func keepOnly[V any](noted map[string]V, here map[string]bool) {
	maps.DeleteFunc(noted, func(id string, _ V) bool { return !here[id] })
}

// spec finds a container of the pod by name.
func (w *worker) spec(name string) *corev1.Container {
	return specOf(w.pod, name)
}

func specOf(pod *corev1.Pod, name string) *corev1.Container {
	for _, c := range containersOf(pod) {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// containersOf lists the containers of the spec: init containers first, those for debugging last.
func containersOf(pod *corev1.Pod) []*corev1.Container {
	spec := &pod.Spec
	out := make([]*corev1.Container, 0, len(spec.InitContainers)+len(spec.Containers)+len(spec.EphemeralContainers))
	for i := range spec.InitContainers {
		out = append(out, &spec.InitContainers[i])
	}
	for i := range spec.Containers {
		out = append(out, &spec.Containers[i])
	}
	for i := range spec.EphemeralContainers {
		// The same fields by definition of the API (core/v1: EphemeralContainerCommon).
		out = append(out, (*corev1.Container)(&spec.EphemeralContainers[i].EphemeralContainerCommon))
	}
	return out
}

func (w *worker) observe() *Observed {
	return &Observed{
		Now: time.Now(), BootID: w.set.cfg.BootID, StartTime: w.startTime, StopTime: w.stopTime, Gone: w.gone, Refused: w.refused, Ended: w.ended,
		Sandbox: w.box, Unfurnished: w.bare, SandboxFailure: w.boxFailure, Volumes: w.volumes, Containers: w.containers,
		Starting: w.starting, Starts: w.starts, Images: w.images, Probes: w.probes, Messages: w.messages,
		Resized: w.resized, Again: w.again, Limits: w.limits, PodPids: w.set.cfg.Terms.PodPids, Pending: w.allotted.Load().pending, ResizeFailure: w.resizeFailure,
		NodeIPs: addressesOf(w.set.cfg.NodeIPs),
	}
}

// act starts the plan's actions that are not on their way, and gives up those that an ending pod does not need.
func (w *worker) act(p *Plan) {
	begun := false // something that makes, rather than unmakes, is still on its way
	if p.Ending {
		for _, o := range w.ops {
			switch o.action.Kind {
			case CreateSandbox, MountVolumes, EnsureImage, StartContainer, StartPause:
				begun = true
				o.cancel()
			}
		}
	}
	now := time.Now()
	for _, a := range p.Actions {
		if begun && a.Kind != StopContainer {
			continue
		}
		key := a.key()
		if o := w.ops[key]; o != nil {
			if a.Kind == StopContainer && now.Add(a.Grace).Before(o.deadline.Add(-time.Second)) {
				o.cancel() // less grace than before: the next plan stops it again
			}
			continue
		}
		if a.Kind == DeletePod && w.ops[statusKey] != nil || !w.retries.due(key, now) {
			continue
		}
		w.launch(key, a)
	}
}

func (a Action) key() string {
	switch a.Kind {
	case EnsureImage, StartContainer:
		return string(a.Kind) + "/" + a.Container
	case StopContainer, RemoveContainer:
		return string(a.Kind) + "/" + a.ID
	default:
		return string(a.Kind)
	}
}

// launch runs an action beside the worker; what it returns is applied in the worker's goroutine.
func (w *worker) launch(key string, a Action) {
	ctx, cancel := context.WithCancel(steps.Of(w.set.ctx, w.pod.Namespace+"/"+w.pod.Name))
	w.ops[key] = &op{action: a, cancel: cancel, deadline: time.Now().Add(a.Grace)}
	do := w.prepare(a)
	began, name := time.Now(), w.pod.Namespace+"/"+w.pod.Name
	go func() {
		apply := do(ctx)
		steps.Passed(ctx, string(a.Kind)+": done")
		w.set.stats.acted(a.Kind, time.Since(began))
		w.set.cfg.Log.Debug("pod action", "action", a.Kind, "pod", name, "container", a.Container, "took", time.Since(began))
		w.post(func() {
			delete(w.ops, key)
			apply() // which looks at ctx: whether the action was given up
			cancel()
		})
	}()
}

// probe has the probes run that the plan names.
func (w *worker) probe(targets []Target) {
	if slices.Equal(targets, w.targets) {
		return
	}
	w.targets = targets
	ip := ""
	if w.box != nil && len(w.box.Addrs) > 0 {
		ip = w.box.Addrs[0].String()
	}
	if w.pod.Spec.HostNetwork && len(w.set.cfg.NodeIPs) > 0 {
		ip = w.set.cfg.NodeIPs[0].String()
	}
	list := make([]probes.Target, 0, len(targets))
	for _, t := range targets {
		c := w.spec(t.Container)
		if c == nil {
			continue
		}
		target := probes.Target{ContainerID: t.ID, Container: c, PodIP: ip, ReadinessOnly: t.ReadinessOnly, StartedAt: time.Now()}
		for i := range w.containers {
			if w.containers[i].ID == t.ID {
				target.StartedAt = w.containers[i].StartedAt
			}
		}
		target.Started, target.Ready = w.probes[t.ID].Started, w.probes[t.ID].Ready
		list = append(list, target)
	}
	w.set.cfg.Prober.Set(w.pod.UID, list)
}

// probed takes in what a probe said.
func (w *worker) probed(r probes.Result) {
	if !slices.ContainsFunc(w.containers, func(c runtime.Container) bool { return c.ID == r.ContainerID }) {
		return
	}
	s := w.probes[r.ContainerID]
	switch r.Kind {
	case probes.Startup:
		s.Started = r.OK
		if !r.OK {
			s.Failed = "startup"
		}
	case probes.Liveness:
		if !r.OK {
			s.Failed = "liveness"
		}
	case probes.Readiness:
		s.Ready = r.OK
	}
	w.probes[r.ContainerID] = s
}

// tellWaiting emits one event for each back-off between restarts.
func (w *worker) tellWaiting(p *Plan) {
	for _, name := range p.Waiting {
		attempt := 0
		for i := range w.containers {
			if w.containers[i].Name == name {
				attempt = max(attempt, w.containers[i].Attempt+1)
			}
		}
		if w.waiting[name] != attempt {
			w.waiting[name] = attempt
			w.set.event(w.pod, name, corev1.EventTypeWarning, "BackOff", "Back-off restarting failed container %s in pod %s_%s(%s)", name, w.pod.Name, w.pod.Namespace, w.pod.UID)
		}
	}
}

// retries is how long to leave alone what has failed, by the key of the action.
type retries map[string]*retry

type retry struct {
	at    time.Time
	delay time.Duration
}

// failed notes a failure; the delay doubles from first up to limit.
func (r retries) failed(key string, first, limit time.Duration) time.Time {
	e := r[key]
	if e == nil {
		e = &retry{}
		r[key] = e
	}
	e.delay = min(max(2*e.delay, first), limit)
	e.at = time.Now().Add(e.delay)
	return e.at
}

func (r retries) forget(key string) { delete(r, key) }

func (r retries) due(key string, now time.Time) bool {
	e := r[key]
	return e == nil || !now.Before(e.at)
}

// next is the earliest time at which something may be tried again.
func (r retries) next() time.Time {
	var t time.Time
	now := time.Now()
	for _, e := range r {
		if e.at.After(now) {
			t = earliest(t, e.at)
		}
	}
	return t
}
