// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
)

// generous bounds waits for events that happen in milliseconds on an idle machine.
const generous = 60 * time.Second

// testServer is a running server with what a test needs to talk to it.
type testServer struct {
	*Server
	store      *store.Store
	pki        *pki.Authority
	kubeconfig string
	client     kubernetes.Interface // in-process, system:masters
	stop       func()
	toReady    time.Duration // from store.Open to ready
}

// start opens dir and runs a server in it on a free loopback port until the test ends or stop.
func start(t testing.TB, dir string, change ...func(*Config)) *testServer {
	t.Helper()
	begin := time.Now()
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelError}))
	st, err := store.Open(t.Context(), store.Config{DataDir: dir, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.Open(filepath.Join(dir, "pki"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Store: st, PKI: ca, Listener: l, AdvertiseAddress: net.IPv4(192, 0, 2, 1),
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd73:6b65:7043::/112")},
		Log:          log,
	}
	for _, f := range change {
		f(&cfg)
	}
	s, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{Server: s, store: st, pki: ca, kubeconfig: filepath.Join(dir, "kubeconfig")}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	ts.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(generous):
			t.Error("Run does not end")
		}
		if err := st.Close(); err != nil {
			t.Errorf("close store: %v", err)
		}
	}
	t.Cleanup(ts.stop)

	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatalf("Run ended before ready: %v", err)
	case <-time.After(generous):
		t.Fatal("not ready")
	}
	ts.toReady = time.Since(begin)
	cert, key, err := ca.IssueClient("admin", []string{"system:masters"})
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteKubeconfig(ts.kubeconfig, "https://"+l.Addr().String(), ca.CAPEM(), cert, key); err != nil {
		t.Fatal(err)
	}
	ts.client = kubernetes.NewForConfigOrDie(s.ClientConfig("test-admin", "system:masters"))
	return ts
}

// kubectl runs the system's kubectl with stdin and returns its output and error output.
func (s *testServer) kubectl(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "kubectl", append([]string{"--kubeconfig", s.kubeconfig, "--cache-dir", filepath.Dir(s.kubeconfig) + "/cache"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "HOME="+filepath.Dir(s.kubeconfig))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s *testServer) mustKubectl(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	out, err := s.kubectl(t, stdin, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// eventually polls until ok is nil.
func eventually(t testing.TB, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(generous)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestMain(m *testing.M) {
	if os.Getenv("SKEP_TEST_KLOG") == "" {
		klog.SetLogger(logr.Discard()) // upstream tells its start in some hundred lines
	}
	os.Exit(m.Run())
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	os.Stderr.Write(p)
	return len(p), nil
}
