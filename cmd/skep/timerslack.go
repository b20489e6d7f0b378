// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// setTimerSlack sets the timer slack of this process's threads; threads that they start later
// inherit it (prctl(2), PR_SET_TIMERSLACK; /proc/PID/timerslack_ns, Linux 4.6, for another thread
// needs CAP_SYS_NICE). Go's monitor thread stays precise: it takes processors back from threads
// that block in the kernel.
func setTimerSlack(slack time.Duration) error {
	pid := os.Getpid()
	limit, err := pidMax()
	if err != nil {
		return err
	}
	value := strconv.AppendInt(nil, slack.Nanoseconds(), 10)
	done := map[int]bool{}
	for {
		threads, err := threadIDs()
		if err != nil {
			return err
		}
		monitor := monitorThread(threads, pid, limit)
		before := len(done)
		var errs []error
		for _, tid := range threads {
			if tid == monitor || done[tid] {
				continue
			}
			done[tid] = true
			// By /proc/TID: the file exists for processes only, and finds threads by their ids too.
			err := os.WriteFile(filepath.Join("/proc", strconv.Itoa(tid), "timerslack_ns"), value, 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) { // a thread that ended
				errs = append(errs, err)
			}
		}
		// A thread may have been started meanwhile by one that still had the old slack.
		if err := errors.Join(errs...); err != nil || len(done) == before {
			return err
		}
	}
}

func threadIDs() ([]int, error) {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var threads []int
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			threads = append(threads, tid)
		}
	}
	return threads, nil
}

// monitorThread finds the thread of Go's runtime.sysmon: the first that the process starts, before
// any other code runs. Ids are given out in ascending order and wrap around at limit. It is 0 if there is none.
func monitorThread(threads []int, pid, limit int) int {
	others := slices.DeleteFunc(slices.Clone(threads), func(tid int) bool { return tid == pid })
	if len(others) == 0 {
		return 0
	}
	return slices.MinFunc(others, func(a, b int) int {
		return cmp.Compare((a-pid+limit)%limit, (b-pid+limit)%limit)
	})
}

func pidMax() (int, error) {
	const file = "/proc/sys/kernel/pid_max"
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("%s: %q is not a number of processes", file, text)
	}
	return n, nil
}
