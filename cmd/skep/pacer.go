// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"net/http"
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

	// restEvery bounds how often a process that turns quiet gives memory back, which costs a collection of garbage.
	restEvery = time.Minute
)

// pacer lets the timers of a quiet process wait for each other, and has it give back the memory that it needed for what it
// did before: for its start, above all.
type pacer struct {
	log    *slog.Logger
	rest   func() // gives memory back
	worked bool   // since it last gave memory back
	rested time.Time
	wrote  atomic.Bool
	late   atomic.Bool
	hurry  chan struct{} // of capacity 1
	quiet  int           // looks in a row that found the process quiet
	looked time.Time
	used   time.Duration // processor time at that look
}

func newPacer(log *slog.Logger) *pacer {
	return &pacer{log: log, rest: func() { giveBackMemory(log) }, hurry: make(chan struct{}, 1)}
}

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
	setSlack := setTimerSlack
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.hurry:
		case <-ticker.C:
		}
		now := time.Now()
		late := p.look(now, processorTime())
		p.restIf(late, now)
		if late == p.late.Load() {
			continue
		}
		p.late.Store(late) // first: what comes now has to hurry
		slack, percent := preciseTimers, gcPercent
		if late {
			slack, percent = lateTimers, quietGCPercent
		}
		collectAt(percent)
		if err := setSlack(slack); err != nil {
			p.log.Info("timers stay precise, which costs an idle server processor time", "error", err)
			setSlack = func(time.Duration) error { return nil }
		}
	}
}

// restIf gives memory back if the process is quiet and has not done so since it was busy, or long enough ago.
func (p *pacer) restIf(quiet bool, now time.Time) {
	if !quiet {
		p.worked = true
		return
	}
	if !p.worked || now.Sub(p.rested) < restEvery {
		return
	}
	p.rest()
	p.worked, p.rested = false, now
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
