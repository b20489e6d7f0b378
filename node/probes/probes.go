// SPDX-License-Identifier: Apache-2.0

// Package probes asks containers how they are: startup, liveness and readiness probes by HTTP(S), TCP, exec and gRPC.
// Each probe of each container has one goroutine with one timer. What changes goes to Report, each failure to Failed.
package probes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/probe"
	grpcprobe "k8s.io/kubernetes/pkg/probe/grpc"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"
)

// Kind of a probe.
type Kind string

// Kinds of probes, by the words that kubelet's events use.
const (
	Startup   Kind = "Startup"
	Liveness  Kind = "Liveness"
	Readiness Kind = "Readiness"
)

// Target is one running container to probe.
type Target struct {
	ContainerID string
	Container   *corev1.Container // never changed
	PodIP       string
	StartedAt   time.Time
	// Started and Ready are what is known already: true for containers that an earlier agent has probed.
	Started, Ready bool
	// ReadinessOnly leaves liveness and startup alone, for pods that are ending.
	ReadinessOnly bool
}

// Result is what a probe came to after its thresholds; it is reported when it changes.
type Result struct {
	PodUID      types.UID
	ContainerID string
	Kind        Kind
	OK          bool
}

// Failure is one probe that failed, whether or not a threshold was reached.
type Failure struct {
	PodUID    types.UID
	Container string
	Kind      Kind
	Warning   bool // the probe succeeded, but has something to say
	Errored   bool // the probe could not be made
	Message   string
}

// Config of Probes.
type Config struct {
	// Exec runs a command in a container.
	Exec func(ctx context.Context, id string, command []string, timeout time.Duration) (stdout, stderr []byte, exitCode int, err error)
	// Report takes each change; it must not block.
	Report func(Result)
	// Failed takes each failure; it must not block.
	Failed func(Failure)
}

// Probes of this node's containers.
type Probes struct {
	cfg  Config
	http httpprobe.Prober
	tcp  tcpprobe.Prober
	grpc grpcprobe.Prober

	mu     sync.Mutex
	closed bool
	pods   map[types.UID]map[string]*container
	wg     sync.WaitGroup
}

// container is one container under probe.
type container struct {
	target Target
	cancel context.CancelFunc
	// startedOnce guards started, which is closed once the startup probe has succeeded: the others wait for it.
	startedOnce sync.Once
	started     chan struct{}
}

func (c *container) start() { c.startedOnce.Do(func() { close(c.started) }) }

// New returns probes that run nothing yet.
func New(cfg Config) *Probes {
	return &Probes{
		cfg: cfg, http: httpprobe.New(false), tcp: tcpprobe.New(), grpc: grpcprobe.New(),
		pods: map[types.UID]map[string]*container{},
	}
}

// Set has exactly the targets probed: new ones start, those not named stop.
func (p *Probes) Set(pod types.UID, targets []Target) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	have := p.pods[pod]
	want := map[string]*container{}
	for _, t := range targets {
		if t.Container.StartupProbe == nil && t.Container.LivenessProbe == nil && t.Container.ReadinessProbe == nil {
			continue
		}
		if c := have[t.ContainerID]; c != nil && c.target.ReadinessOnly == t.ReadinessOnly {
			want[t.ContainerID] = c
			delete(have, t.ContainerID)
			continue
		}
		want[t.ContainerID] = p.begin(pod, t)
	}
	for _, c := range have {
		c.cancel()
	}
	if len(want) == 0 {
		delete(p.pods, pod)
		return
	}
	p.pods[pod] = want
}

// Close stops all probes and waits for them.
func (p *Probes) Close() {
	p.mu.Lock()
	p.closed = true
	for _, pod := range p.pods {
		for _, c := range pod {
			c.cancel()
		}
	}
	p.pods = map[types.UID]map[string]*container{}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Probes) begin(pod types.UID, t Target) *container {
	ctx, cancel := context.WithCancel(context.Background())
	c := &container{target: t, cancel: cancel, started: make(chan struct{})}
	run := func(k Kind, spec *corev1.Probe, known bool) {
		if spec == nil {
			return
		}
		p.wg.Add(1)
		go func() {
			defer p.wg.Done()
			(&loop{p: p, pod: pod, c: c, kind: k, spec: spec, ok: known}).run(ctx)
		}()
	}
	if t.Container.StartupProbe == nil || t.Started {
		c.start()
	} else if !t.ReadinessOnly {
		run(Startup, t.Container.StartupProbe, false)
	}
	if !t.ReadinessOnly {
		run(Liveness, t.Container.LivenessProbe, true)
	}
	run(Readiness, t.Container.ReadinessProbe, t.Ready)
	return c
}

// loop is one probe of one container.
type loop struct {
	p    *Probes
	pod  types.UID
	c    *container
	kind Kind
	spec *corev1.Probe
	ok   bool // what was last reported, or is assumed

	last   bool // outcome of the last probe
	streak int  // how often in a row
}

func (l *loop) run(ctx context.Context) {
	if l.kind != Startup {
		select {
		case <-l.c.started:
		case <-ctx.Done():
			return
		}
	}
	period := max(time.Duration(l.spec.PeriodSeconds)*time.Second, time.Second)
	timer := time.NewTimer(l.first(period))
	defer timer.Stop()
	var tick time.Time // the regular probe that the next ones are counted from
	early := earlyRetry
	if l.kind == Liveness || l.ok || l.spec.Exec != nil {
		early = period
	}
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		now := time.Now()
		regular := tick.IsZero() || now.Sub(tick) >= period
		if regular {
			if !tick.IsZero() {
				early = period // past the first period nothing is hurried any more
			}
			tick = now
		}
		if done := l.once(ctx, !regular); done || ctx.Err() != nil {
			return
		}
		next := max(time.Until(tick.Add(period)), 0)
		if !l.last && early < next {
			next = early
			early *= 2
		}
		timer.Reset(next)
	}
}

// earlyRetry is how soon a probe that failed first is made again, doubling until the first period is over. A container
// that needs 50 ms to listen should not stay unready for the ten seconds of a usual period. Such retries only count when
// they succeed, and commands are spared them.
const earlyRetry = 50 * time.Millisecond

// first is how long to wait before the first probe. Containers that were there before this agent are spread over a
// period, so that an agent that starts does not probe all at once.
func (l *loop) first(period time.Duration) time.Duration {
	d := time.Until(l.c.target.StartedAt.Add(time.Duration(l.spec.InitialDelaySeconds) * time.Second))
	if d > 0 {
		return d
	}
	if l.c.target.Ready || l.c.target.Started && l.kind == Liveness {
		return rand.N(period)
	}
	return 0
}

// once probes and counts; early failures do not count. done says that this probe has nothing more to find out.
func (l *loop) once(ctx context.Context, early bool) (done bool) {
	result, message, err := l.probe(ctx)
	if ctx.Err() != nil {
		return true // the container was taken away under the probe
	}
	ok := err == nil && (result == probe.Success || result == probe.Warning)
	if early && !ok {
		return false
	}
	switch {
	case err != nil:
		l.p.cfg.Failed(Failure{PodUID: l.pod, Container: l.c.target.Container.Name, Kind: l.kind, Errored: true, Message: err.Error()})
	case result == probe.Warning:
		l.p.cfg.Failed(Failure{PodUID: l.pod, Container: l.c.target.Container.Name, Kind: l.kind, Warning: true, Message: message})
	case !ok:
		l.p.cfg.Failed(Failure{PodUID: l.pod, Container: l.c.target.Container.Name, Kind: l.kind, Message: message})
	}
	if ok == l.last {
		l.streak++
	} else {
		l.last, l.streak = ok, 1
	}
	threshold := max(int(l.spec.FailureThreshold), 1)
	if ok {
		threshold = max(int(l.spec.SuccessThreshold), 1)
	}
	if l.streak < threshold {
		return false
	}
	changed := ok != l.ok
	l.ok = ok
	switch l.kind {
	case Startup:
		// Either way there is an answer: the container has started, or is to be killed.
		l.p.cfg.Report(Result{PodUID: l.pod, ContainerID: l.c.target.ContainerID, Kind: l.kind, OK: ok})
		if ok {
			l.c.start()
		}
		return true
	case Liveness:
		if !ok {
			l.p.cfg.Report(Result{PodUID: l.pod, ContainerID: l.c.target.ContainerID, Kind: l.kind})
			return true
		}
	default:
		if changed {
			l.p.cfg.Report(Result{PodUID: l.pod, ContainerID: l.c.target.ContainerID, Kind: l.kind, OK: ok})
		}
	}
	return false
}

// probe makes one probe, within the probe's timeout.
func (l *loop) probe(ctx context.Context) (probe.Result, string, error) {
	t := &l.c.target
	timeout := max(time.Duration(l.spec.TimeoutSeconds)*time.Second, time.Second)
	switch h := l.spec.ProbeHandler; {
	case h.Exec != nil:
		return l.exec(ctx, h.Exec.Command, timeout)
	case h.HTTPGet != nil:
		req, err := httpprobe.NewRequestForHTTPGetAction(h.HTTPGet, t.Container, t.PodIP, "probe")
		if err != nil {
			return probe.Unknown, "", err
		}
		return l.p.http.Probe(req.WithContext(ctx), timeout)
	case h.TCPSocket != nil:
		port, err := probe.ResolveContainerPort(h.TCPSocket.Port, t.Container)
		if err != nil {
			return probe.Unknown, "", err
		}
		host := h.TCPSocket.Host
		if host == "" {
			host = t.PodIP
		}
		return l.p.tcp.Probe(host, port, timeout)
	case h.GRPC != nil:
		service := ""
		if h.GRPC.Service != nil {
			service = *h.GRPC.Service
		}
		return l.p.grpc.Probe(t.PodIP, service, int(h.GRPC.Port), timeout)
	default:
		return probe.Unknown, "", fmt.Errorf("missing probe handler for container %s", t.Container.Name)
	}
}

// maxOutput bounds what of a command's output goes into an event.
const maxOutput = 10 << 10

func (l *loop) exec(ctx context.Context, command []string, timeout time.Duration) (probe.Result, string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	stdout, stderr, code, err := l.p.cfg.Exec(ctx, l.c.target.ContainerID, command, timeout)
	out := strings.TrimSpace(string(append(stdout, stderr...)))
	if len(out) > maxOutput {
		out = out[:maxOutput]
	}
	if err != nil {
		if ctx.Err() != nil {
			return probe.Failure, fmt.Sprintf("command timed out: %q timed out after %s", strings.Join(command, " "), timeout), nil
		}
		return probe.Unknown, "", err
	}
	if code != 0 {
		return probe.Failure, out, nil
	}
	return probe.Success, out, nil
}
