// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The upstream parts keep hundreds of independent timers of half a second to a few (a bookmark timer
// for each kind's watch cache, two tickers for each work queue). With the kernel's default slack each
// is a wake-up of its own, and those wake-ups are most of what an idle server costs; with a tenth of
// a second one wake-up serves many timers. Packets and file descriptors wake the process as soon as
// ever. But Go's scheduler also sleeps for microseconds while it looks for work, which must not take
// longer when there is some: so timers are late only while nothing happens.
const (
	preciseTimers = 50 * time.Microsecond // the kernel's default
	lateTimers    = 100 * time.Millisecond

	// lookEvery is how often a pacer looks whether the process is busy, and quietLooks how often it
	// has to be found quiet before its timers may be late.
	lookEvery  = 2 * time.Second
	quietLooks = 3
)

// pacer lets the timers of a quiet process wait for each other.
type pacer struct {
	log    *slog.Logger
	wrote  atomic.Bool
	late   atomic.Bool
	hurry  chan struct{} // of capacity 1
	quiet  int           // looks in a row that found the process quiet
	looked time.Time
	used   time.Duration // processor time at that look
}

func newPacer(log *slog.Logger) *pacer { return &pacer{log: log, hurry: make(chan struct{}, 1)} }

// busy says that something was asked of the process that it should not be late for.
func (p *pacer) busy() {
	p.wrote.Store(true)
	if p.late.Load() {
		select {
		case p.hurry <- struct{}{}:
		default: // it will be seen
		}
	}
}

// watch makes the process busy when it asks an API server for anything but the renewal of a lease; a
// watch's reply that gives an agent work is followed by such a request at once.
func (p *pacer) watch(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		if !strings.HasPrefix(r.URL.Path, "/apis/coordination.k8s.io/") {
			p.busy()
		}
		return next.RoundTrip(r)
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// run sets the slack of the process's timers by what it does, until ctx ends. Where the host does
// not permit it, the timers stay as they are.
func (p *pacer) run(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.hurry:
		case <-ticker.C:
		}
		late := p.look(time.Now(), processorTime())
		if late == p.late.Load() {
			continue
		}
		p.late.Store(late) // first: what comes now has to hurry
		slack := preciseTimers
		if late {
			slack = lateTimers
		}
		if err := setTimerSlack(slack); err != nil {
			p.log.Info("timers stay precise, which costs an idle server processor time", "error", err)
			return nil
		}
	}
}

// look decides whether timers may be late, from what happened since the look before.
func (p *pacer) look(now time.Time, used time.Duration) (late bool) {
	const busyShare = 10 // a tenth of a core
	busy := p.wrote.Swap(false) || (used-p.used)*busyShare > now.Sub(p.looked)
	p.looked, p.used = now, used
	if busy {
		p.quiet = 0
	} else {
		p.quiet++
	}
	return p.quiet >= quietLooks
}

// processorTime is what this process has used so far.
func processorTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0 // then only writes count
	}
	return time.Duration(t.Nano())
}

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
