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
