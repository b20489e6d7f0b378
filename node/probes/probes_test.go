// SPDX-License-Identifier: Apache-2.0

package probes

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench collects what probes say.
type bench struct {
	*Probes
	results  chan Result
	failures chan Failure
	exec     func(ctx context.Context, command []string) (int, error)
}

func newBench(t *testing.T) *bench {
	b := &bench{results: make(chan Result, 1000), failures: make(chan Failure, 1000)}
	b.Probes = New(Config{
		Exec: func(ctx context.Context, _ string, command []string, _ time.Duration) ([]byte, []byte, int, error) {
			code, err := b.exec(ctx, command)
			return []byte("out"), []byte("err"), code, err
		},
		Report: func(r Result) { b.results <- r }, Failed: func(f Failure) { b.failures <- f },
	})
	t.Cleanup(b.Close)
	return b
}

func (b *bench) next(t *testing.T) Result {
	t.Helper()
	select {
	case r := <-b.results:
		return r
	case <-time.After(30 * time.Second):
		t.Fatal("no result after 30 s")
		return Result{}
	}
}

func (b *bench) fails(t *testing.T) Failure {
	t.Helper()
	select {
	case f := <-b.failures:
		return f
	case <-time.After(30 * time.Second):
		t.Fatal("no failure after 30 s")
		return Failure{}
	}
}

func target(id string, c corev1.Container) Target {
	return Target{ContainerID: id, Container: &c, PodIP: "127.0.0.1", StartedAt: time.Now()}
}

func portOf(t *testing.T, addr string) int32 {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return int32(a.Port)
}

func TestHandlers(t *testing.T) {
	var agent, header, host atomic.Value
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		agent.Store(r.UserAgent())
		header.Store(r.Header.Get("X-Bee"))
		host.Store(r.Host)
		if r.URL.Path == "/bad" {
			http.Error(w, "no", http.StatusTeapot)
		}
	})
	plain := httptest.NewServer(handler)
	defer plain.Close()
	secure := httptest.NewTLSServer(handler)
	defer secure.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer()
	hs := health.NewServer()
	hs.SetServingStatus("up", healthpb.HealthCheckResponse_SERVING)
	hs.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
	healthpb.RegisterHealthServer(gs, hs)
	go func() { _ = gs.Serve(hl) }()
	defer gs.Stop()

	url := func(s *httptest.Server) intstr.IntOrString {
		return intstr.FromInt32(portOf(t, s.Listener.Addr().String()))
	}
	up, down := "up", "down"
	get := func(g corev1.HTTPGetAction) corev1.ProbeHandler { return corev1.ProbeHandler{HTTPGet: &g} }
	tests := []struct {
		name    string
		handler corev1.ProbeHandler
		exec    func(ctx context.Context, command []string) (int, error)
		fails   string // empty: succeeds
	}{
		{"http", get(corev1.HTTPGetAction{Path: "/ok", Port: url(plain), HTTPHeaders: []corev1.HTTPHeader{{Name: "X-Bee", Value: "yes"}, {Name: "Host", Value: "hive.test"}}}), nil, ""},
		{"http by port name", get(corev1.HTTPGetAction{Port: intstr.FromString("web")}), nil, ""},
		{"http status", get(corev1.HTTPGetAction{Path: "/bad", Port: url(plain)}), nil, "HTTP probe failed with statuscode: 418"},
		{"https", get(corev1.HTTPGetAction{Scheme: corev1.URISchemeHTTPS, Port: url(secure)}), nil, ""},
		{"tcp", corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(portOf(t, l.Addr().String()))}}, nil, ""},
		{"tcp refused", corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(1)}}, nil, "connection refused"},
		{"grpc", corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: portOf(t, hl.Addr().String()), Service: &up}}, nil, ""},
		{"grpc down", corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: portOf(t, hl.Addr().String()), Service: &down}}, nil, "NOT_SERVING"},
		{"exec", corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}, func(context.Context, []string) (int, error) { return 0, nil }, ""},
		{"exec code", corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"false"}}}, func(context.Context, []string) (int, error) { return 1, nil }, "outerr"},
		{"exec error", corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"x"}}}, func(context.Context, []string) (int, error) { return 0, errors.New("boom") }, "boom"},
		{"exec time-out", corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"x"}}}, func(ctx context.Context, _ []string) (int, error) { <-ctx.Done(); return 0, ctx.Err() }, "timed out after 1s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			b.exec = tt.exec
			c := corev1.Container{Name: "c", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: portOf(t, plain.Listener.Addr().String())}},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: tt.handler}}
			b.Set("uid", []Target{target("id", c)})
			if tt.fails == "" {
				if r := b.next(t); !r.OK || r.Kind != Readiness || r.ContainerID != "id" || r.PodUID != "uid" {
					t.Errorf("result %+v", r)
				}
				return
			}
			if f := b.fails(t); !strings.Contains(f.Message, tt.fails) || f.Container != "c" {
				t.Errorf("failure %+v, want %q", f, tt.fails)
			}
		})
	}
	if header.Load() != "" && agent.Load() == nil {
		t.Error("the server was not asked")
	}
	if a, _ := agent.Load().(string); !strings.HasPrefix(a, "kube-probe/") {
		t.Errorf("user agent %q", a)
	}
}

// script answers probes from a list; the last answer stands.
func script(answers ...bool) func(context.Context, []string) (int, error) {
	var mu sync.Mutex
	return func(context.Context, []string) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		ok := answers[0]
		if len(answers) > 1 {
			answers = answers[1:]
		}
		if ok {
			return 0, nil
		}
		return 1, nil
	}
}

func execProbe(change func(*corev1.Probe)) *corev1.Probe {
	p := &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"x"}}}}
	if change != nil {
		change(p)
	}
	return p
}

func TestThresholds(t *testing.T) {
	t.Run("readiness", func(t *testing.T) {
		t.Parallel()
		b := newBench(t)
		b.exec = script(true, false, true, true, false, false, false)
		b.Set("u", []Target{target("id", corev1.Container{ReadinessProbe: execProbe(func(p *corev1.Probe) { p.SuccessThreshold, p.FailureThreshold = 2, 2 })})})
		if r := b.next(t); !r.OK {
			t.Errorf("first %+v: one success is not two", r)
		}
		if r := b.next(t); r.OK {
			t.Errorf("second %+v", r)
		}
	})
	t.Run("liveness", func(t *testing.T) {
		t.Parallel()
		b := newBench(t)
		b.exec = script(true, false, false, true)
		b.Set("u", []Target{target("id", corev1.Container{LivenessProbe: execProbe(func(p *corev1.Probe) { p.FailureThreshold = 2 })})})
		if r := b.next(t); r.OK || r.Kind != Liveness {
			t.Errorf("%+v", r)
		}
	})
	t.Run("startup holds the others", func(t *testing.T) {
		t.Parallel()
		b := newBench(t)
		b.exec = script(false, true)
		b.Set("u", []Target{target("id", corev1.Container{
			StartupProbe: execProbe(func(p *corev1.Probe) { p.FailureThreshold = 3 }), ReadinessProbe: execProbe(nil)})})
		if r := b.next(t); !r.OK || r.Kind != Startup {
			t.Errorf("first %+v", r)
		}
		if r := b.next(t); !r.OK || r.Kind != Readiness {
			t.Errorf("second %+v", r)
		}
	})
	t.Run("startup gives up", func(t *testing.T) {
		t.Parallel()
		b := newBench(t)
		b.exec = script(false)
		b.Set("u", []Target{target("id", corev1.Container{StartupProbe: execProbe(func(p *corev1.Probe) { p.FailureThreshold = 2 })})})
		if r := b.next(t); r.OK || r.Kind != Startup {
			t.Errorf("%+v", r)
		}
	})
	t.Run("adopted", func(t *testing.T) {
		t.Parallel()
		b := newBench(t)
		b.exec = script(false)
		tg := target("id", corev1.Container{StartupProbe: execProbe(nil), ReadinessProbe: execProbe(nil)})
		tg.Started, tg.Ready = true, true
		b.Set("u", []Target{tg})
		if r := b.next(t); r.OK || r.Kind != Readiness {
			t.Errorf("%+v: what was ready is only told of when it is not", r)
		}
	})
}

// A container that needs a moment to listen is ready soon after, not a period later, and its owner is told of one failure.
func TestEarlyRetry(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	b := newBench(t)
	began := time.Now()
	b.Set("u", []Target{target("id", corev1.Container{ReadinessProbe: &corev1.Probe{PeriodSeconds: 600,
		ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(portOf(t, addr))}}}})})
	b.fails(t)
	if l, err = net.Listen("tcp", addr); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if r := b.next(t); !r.OK {
		t.Errorf("%+v", r)
	}
	if took := time.Since(began); took > 5*time.Minute {
		t.Errorf("ready after %v", took)
	}
	if len(b.failures) != 0 {
		t.Errorf("%d more failures were told", len(b.failures))
	}
}

func TestSetStopsWhatIsNotNamed(t *testing.T) {
	b := newBench(t)
	running := make(chan string, 10)
	b.exec = func(ctx context.Context, _ []string) (int, error) {
		running <- "probe"
		<-ctx.Done()
		return 0, ctx.Err()
	}
	c := corev1.Container{ReadinessProbe: execProbe(func(p *corev1.Probe) { p.TimeoutSeconds = 3600 })}
	b.Set("u", []Target{target("a", c), target("b", c)})
	<-running
	<-running
	b.Set("u", []Target{target("a", c)}) // b stops; a goes on
	b.Set("u", nil)
	b.Close()
	if len(b.results) != 0 || len(b.failures) != 0 {
		t.Error("probes of containers that are gone were reported")
	}
	b.Set("u", []Target{target("a", c)})
	if len(running) != 0 {
		t.Error("a probe started after Close")
	}
}
