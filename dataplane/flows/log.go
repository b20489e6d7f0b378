// SPDX-License-Identifier: Apache-2.0

package flows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/maps"
)

// Moment is one moment on two clocks.
type Moment struct {
	Time      time.Time
	Monotonic int64 // ns, as the kernel programs count
}

// Now reads both clocks.
func Now() Moment {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail with a valid clock
	return Moment{time.Now(), ts.Nano()}
}

// Ring is where events come from; *maps.Events is the real one.
type Ring interface {
	Next() (maps.FlowEvent, error)
	Flush() error
	Close() error
}

// Log keeps the last events of this node, and hands new ones to whoever follows. Events stay in the kernel
// until somebody asks or the ring is half full.
type Log struct {
	ring         Ring
	setFollowers func(uint32) error
	read         func(*maps.FlowEvent, Moment) Flow
	keep         int
	log          *slog.Logger

	mu        sync.Mutex
	recent    []Flow // a ring
	next      int    // in recent, once it is full
	followers map[*follower]struct{}
	flushing  []chan struct{} // wait for the flush that is under way,
	waiting   []chan struct{} // and for the one after it
	closed    bool
}

type follower struct {
	flows  chan Flow
	missed uint32
}

// followerBuffer bounds what a slow follower can have waiting; it is told how many it missed.
const followerBuffer = 1024

// NewLog keeps so many events. setFollowers tells the programs how many follow.
func NewLog(ring Ring, setFollowers func(uint32) error, read func(*maps.FlowEvent, Moment) Flow, keep int, log *slog.Logger) *Log {
	return &Log{ring: ring, setFollowers: setFollowers, read: read, keep: keep, log: log, followers: map[*follower]struct{}{}}
}

// Run reads events until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, l.Close)
	defer stop()
	defer l.end()
	if err := l.setFollowers(0); err != nil { // an earlier process may have had some
		return err
	}
	for {
		e, err := l.ring.Next()
		switch {
		case errors.Is(err, maps.ErrFlushed):
			l.flushed()
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("events of flows: %w", err)
		default:
			l.add(l.read(&e, Now()))
		}
	}
}

// Close ends Run, or what NewLog began if Run never did.
func (l *Log) Close() { _ = l.ring.Close() } // nothing is left to be lost

func (l *Log) add(f Flow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.recent) < l.keep {
		l.recent = append(l.recent, f)
	} else {
		l.recent[l.next] = f
		l.next = (l.next + 1) % l.keep
	}
	for w := range l.followers {
		told := f
		told.Suppressed += w.missed
		select {
		case w.flows <- told:
			w.missed = 0
		default:
			w.missed = told.Suppressed + 1
		}
	}
}

// flush returns when all that was in the ring when it was called has been read.
func (l *Log) flush(ctx context.Context) error {
	done := make(chan struct{})
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return errors.New("the data plane is shutting down")
	}
	l.waiting = append(l.waiting, done)
	l.mu.Unlock()
	if err := l.ring.Flush(); err != nil {
		return fmt.Errorf("events of flows: %w", err)
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// flushed ends a flush. Who came while it was under way may have missed its beginning, and gets another.
func (l *Log) flushed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, done := range l.flushing {
		close(done)
	}
	l.flushing, l.waiting = l.waiting, nil
	if len(l.flushing) > 0 {
		if err := l.ring.Flush(); err != nil {
			l.log.Error("events of flows cannot be asked for", "err", err)
		}
	}
}

func (l *Log) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, done := range append(l.flushing, l.waiting...) {
		close(done)
	}
	l.flushing, l.waiting = nil, nil
	for w := range l.followers {
		close(w.flows)
		delete(l.followers, w)
	}
}

// Recent gives what is known to each, oldest first, up to this moment; and with follow, what comes until ctx
// ends.
func (l *Log) Recent(ctx context.Context, follow bool, each func(Flow) error) error {
	w := &follower{flows: make(chan Flow, followerBuffer)}
	if err := l.flush(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	past := append(append([]Flow(nil), l.recent[l.next:]...), l.recent[:l.next]...)
	if follow && !l.closed {
		l.followers[w] = struct{}{}
	}
	err := l.tellFollowers()
	l.mu.Unlock()
	defer l.unfollow(w)
	if err != nil {
		return err
	}
	for i := range past {
		if err := each(past[i]); err != nil {
			return err
		}
	}
	if !follow {
		return nil
	}
	// What came before the programs knew of the follower woke nobody.
	if err := l.flush(ctx); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case f, ok := <-w.flows:
			if !ok {
				return nil
			}
			if err := each(f); err != nil {
				return err
			}
		}
	}
}

func (l *Log) unfollow(w *follower) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.followers[w]; !ok {
		return
	}
	delete(l.followers, w)
	if err := l.tellFollowers(); err != nil {
		l.log.Error("programs go on waking a reader for each event", "err", err)
	}
}

// tellFollowers is called with mu held.
func (l *Log) tellFollowers() error { return l.setFollowers(uint32(len(l.followers))) }
