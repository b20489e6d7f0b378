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

// timerSlack is how late a timer of an idle server may fire. The upstream parts keep hundreds of
// independent timers of half a second to a few (a bookmark timer for each kind's watch cache, two
// tickers for each work queue); with the kernel's default of 50 µs each is a wake-up of its own, and
// those wake-ups are most of what an idle server costs. With some milliseconds one wake-up serves
// several timers. Packets and file descriptors wake the process as soon as ever. With 50 ms an idle
// server took another fifth less, but the slowest of 50 pod starts took half as long again.
const timerSlack = 20 * time.Millisecond

// coalesceTimers sets the timer slack of this process's threads; threads that they start later
// inherit it (prctl(2), PR_SET_TIMERSLACK; /proc/PID/timerslack_ns, Linux 4.6, for another thread
// needs CAP_SYS_NICE). Go's monitor thread stays precise: it takes processors back from threads
// that block in the kernel.
func coalesceTimers() error {
	pid := os.Getpid()
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	var threads []int
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			threads = append(threads, tid)
		}
	}
	limit, err := pidMax()
	if err != nil {
		return err
	}
	monitor := monitorThread(threads, pid, limit)
	var errs []error
	for _, tid := range threads {
		if tid == monitor {
			continue
		}
		// By /proc/TID: the file exists for processes only, and finds threads by their ids too.
		file := filepath.Join("/proc", strconv.Itoa(tid), "timerslack_ns")
		err := os.WriteFile(file, strconv.AppendInt(nil, timerSlack.Nanoseconds(), 10), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a thread that ended
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
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
