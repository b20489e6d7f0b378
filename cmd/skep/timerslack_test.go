// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestMonitorThread(t *testing.T) {
	for _, c := range []struct {
		name    string
		threads []int
		want    int
	}{
		{"alone", []int{100}, 0},
		{"in order", []int{100, 101, 102, 110}, 101},
		{"ids wrapped around after the monitor", []int{3, 100, 102}, 102},
		{"ids wrapped around before the monitor", []int{3, 7, 100}, 3},
	} {
		if got := monitorThread(c.threads, 100, 1000); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

// TestTimerSlack runs in a process of its own: the slack stays with its threads.
func TestTimerSlack(t *testing.T) {
	const child = "SKEP_TEST_TIMER_SLACK"
	if os.Getenv(child) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root: CAP_SYS_NICE")
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTimerSlack$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "PASS: TestTimerSlack") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := setTimerSlack(lateTimers); err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	precise, late := 0, 0
	for _, task := range tasks {
		slack, err := os.ReadFile(filepath.Join("/proc", filepath.Base(task), "timerslack_ns"))
		switch {
		case os.IsNotExist(err):
		case err != nil:
			t.Fatal(err)
		case strings.TrimSpace(string(slack)) == strconv.FormatInt(lateTimers.Nanoseconds(), 10):
			late++
		default:
			precise++
		}
	}
	// The monitor's, and those of threads that it started meanwhile.
	if late == 0 || precise == 0 || precise > late {
		t.Errorf("%d threads with slack, %d without", late, precise)
	}
}

func TestPacerIsLateOnlyWhileQuiet(t *testing.T) {
	type step struct {
		name  string
		wrote bool
		used  time.Duration // since the step before
		want  bool
	}
	quiet := step{name: "quiet", used: lookEvery / 50}
	late := step{name: "quiet for long", used: lookEvery / 50, want: true}
	steps := []step{
		quiet, quiet, late, late,
		{name: "a write", wrote: true, used: lookEvery / 50},
		quiet, quiet, late,
		{name: "work without a write", used: lookEvery / 5},
		quiet, quiet, late,
	}
	p := newPacer(slog.New(slog.DiscardHandler))
	now, used := time.Unix(1000, 0), 5*time.Second
	p.looked, p.used = now, used
	for i, s := range steps {
		if s.wrote {
			p.busy()
		}
		now, used = now.Add(lookEvery), used+s.used
		if got := p.look(now, used); got != s.want {
			t.Fatalf("step %d, %s: late %v, want %v", i, s.name, got, s.want)
		}
	}
}

func TestPacerHurriesWhenLate(t *testing.T) {
	p := newPacer(slog.New(slog.DiscardHandler))
	p.busy()
	if len(p.hurry) != 0 {
		t.Error("a write wakes a pacer whose timers are precise")
	}
	p.late.Store(true)
	p.busy()
	p.busy() // does not block
	if len(p.hurry) != 1 {
		t.Error("a write does not wake a pacer whose timers are late")
	}
}

func TestPacerWatchesRequests(t *testing.T) {
	p := newPacer(slog.New(slog.DiscardHandler))
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	client := &http.Client{Transport: p.watch(http.DefaultTransport)}
	for path, want := range map[string]bool{
		"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n": false,
		"/api/v1/namespaces/default/pods/web/status":                       true,
	} {
		response, err := client.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		if err := response.Body.Close(); err != nil {
			t.Fatal(err)
		}
		if got := p.wrote.Swap(false); got != want {
			t.Errorf("%s: busy %v, want %v", path, got, want)
		}
	}
}
