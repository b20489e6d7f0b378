// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
)

// A stop ends watches instead of waiting for them.
func TestStopEndsWatches(t *testing.T) {
	s := start(t, t.TempDir())
	w, err := s.client.CoreV1().ConfigMaps("").Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range w.ResultChan() {
		}
	}()
	cmd := exec.CommandContext(t.Context(), "kubectl", "--kubeconfig", s.kubeconfig, "get", "ns", "--watch", "--no-headers")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.stop()
	<-ended
	t.Logf("stopped in %v", time.Since(begin))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// A port that is taken is told by New, in words.
func TestPortTaken(t *testing.T) {
	s := start(t, t.TempDir())
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.address(), "https://"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.cfg
	cfg.Listener, cfg.BindAddress = nil, net.IPv4(127, 0, 0, 1)
	if cfg.Port, err = net.LookupPort("tcp", port); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), cfg); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "choose another") {
		t.Errorf("New: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(t.Context(), Config{NodePortRange: "x", ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("10.1.0.0/16")}})
	for _, want := range []string{"Store", "PKI", "AdvertiseAddress", "NodePortRange", "one of each"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
}

// A disk that fills up ends Run with the reason, and soon. It runs in a process of its own, as the
// store's goroutines do not come back from it.
func TestFullDiskEndsRun(t *testing.T) {
	const child = "SKEP_TEST_FULL_DISK"
	if os.Getenv(child) == "" {
		cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("skep-apiserver-test", dir, "tmpfs", 0, "size=256m"); err != nil {
		t.Fatalf("mount tmpfs (this test needs root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	st, err := store.Open(t.Context(), store.Config{DataDir: dir})
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
	s, err := New(t.Context(), Config{Store: st, PKI: ca, Listener: l, AdvertiseAddress: net.IPv4(192, 0, 2, 1), ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	<-s.Ready()
	client := kubernetes.NewForConfigOrDie(s.ClientConfig("admin", "system:masters")).CoreV1().ConfigMaps("default")
	if f, err := os.Create(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	} else if _, err := f.Write(make([]byte, 300<<20)); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filler: %v", err)
	}
	go func() {
		for t.Context().Err() == nil {
			cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "c"}, Data: map[string]string{"x": strings.Repeat("x", 1<<19)}}
			_, _ = client.Create(t.Context(), cm, metav1.CreateOptions{})
		}
	}()
	select {
	case err := <-done:
		if !errors.Is(err, store.ErrNoSpace) {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(generous):
		t.Fatal("Run goes on")
	}
}

// A server leaves no goroutine and no file descriptor behind. The first one in a process is let
// off: upstream keeps a dozen process-wide loops (clocks, certificate rotation of shared transports).
func TestStopLeavesNothing(t *testing.T) {
	run := func() { start(t, t.TempDir()).stop() }
	run()
	goroutines, fds := settle(t, 0, 0)
	run()
	g, f := settle(t, goroutines, fds)
	if g > goroutines || f > fds {
		var all strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&all, 1)
		t.Errorf("goroutines %d → %d, descriptors %d → %d\n%s", goroutines, g, fds, f, all.String())
	}
}

// settle counts goroutines and descriptors, at the latest when generous is over. With limits it
// waits until they are kept: a client of upstream's that was told to retry does so for some
// seconds. Without, until the counts have stood still.
func settle(t *testing.T, atMostG, atMostF int) (goroutines, fds int) {
	t.Helper()
	unchanged := 0
	for deadline := time.Now().Add(generous); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		g, f := runtime.NumGoroutine(), len(entries)
		unchanged++
		if g != goroutines || f != fds {
			unchanged = 0
		}
		goroutines, fds = g, f
		if g <= atMostG && f <= atMostF || atMostG == 0 && unchanged == 40 {
			break
		}
	}
	return goroutines, fds
}
