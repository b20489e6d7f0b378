// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestMonitorThread(t *testing.T) {
	for _, c := range []struct {
		name    string
		threads []int
		want    int
		found   bool
	}{
		{"alone", []int{100}, 0, false},
		{"in order", []int{100, 101, 102, 110}, 101, true},
		{"ids wrapped around after the monitor", []int{3, 100, 102}, 102, true},
		{"ids wrapped around before the monitor", []int{3, 7, 100}, 3, true},
	} {
		if got, found := monitorThread(c.threads, 100, 1000); got != c.want || found != c.found {
			t.Errorf("%s: got %d %v, want %d %v", c.name, got, found, c.want, c.found)
		}
	}
}

// TestCoalesceTimers runs in a process of its own: the slack stays with its threads.
func TestCoalesceTimers(t *testing.T) {
	const child = "SKEP_TEST_COALESCE_TIMERS"
	if os.Getenv(child) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root: CAP_SYS_NICE")
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCoalesceTimers$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "PASS: TestCoalesceTimers") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := coalesceTimers(); err != nil {
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
		case strings.TrimSpace(string(slack)) == strconv.FormatInt(timerSlack.Nanoseconds(), 10):
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
