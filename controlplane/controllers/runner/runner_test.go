// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/util/wait"
	clocktesting "k8s.io/utils/clock/testing"
)

// outcomes lets a test decide how each sync ends, and knows when they were.
type outcomes struct {
	clock *clocktesting.FakeClock
	mu    sync.Mutex
	at    []time.Time
	err   error
}

func (o *outcomes) sync(context.Context, string) (time.Duration, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.at = append(o.at, o.clock.Now())
	return 0, o.err
}

func (o *outcomes) become(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.err = err
}

func (o *outcomes) times() []time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]time.Time(nil), o.at...)
}

func startQueue(t *testing.T, o *outcomes) *Queue {
	t.Helper()
	metrics, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	q := New("test", 2, Deps{Log: slog.New(slog.DiscardHandler), Metrics: metrics, Clock: o.clock}, o.sync)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- q.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return q
}

// until lets time pass, with an event about the key at every step, until a condition holds.
func (o *outcomes) until(t *testing.T, q *Queue, step time.Duration, what string, condition func() bool) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), time.Millisecond, time.Minute, true, func(context.Context) (bool, error) {
		if condition() {
			return true, nil
		}
		q.Add("key")
		o.clock.Step(step)
		return false, nil
	})
	if err != nil {
		t.Fatalf("%s: %v (%d syncs)", what, err, len(o.times()))
	}
}

// However many events there are about a key that keeps failing, it is tried later from time to time; once it
// succeeds, events are answered at once again.
func TestFailingKeysAreNotHurriedByEvents(t *testing.T) {
	o := &outcomes{clock: clocktesting.NewFakeClock(time.Unix(1e9, 0)), err: errors.New("exceeded quota")}
	q := startQueue(t, o)
	begin := o.clock.Now()
	o.until(t, q, 3*time.Millisecond, "two seconds", func() bool { return o.clock.Since(begin) > 2*time.Second })
	at := o.times()
	if len(at) < 2 {
		t.Fatalf("%d syncs", len(at))
	}
	for i := 1; i < len(at); i++ {
		if gap, least := at[i].Sub(at[i-1]), min(firstRetry<<(i-1), longestHold); gap < least {
			t.Errorf("sync %d came %s after the one before, want at least %s", i, gap, least)
		}
	}
	o.become(nil)
	n := len(at)
	o.until(t, q, 100*time.Millisecond, "a sync that succeeds", func() bool { return len(o.times()) > n })
	now, n := o.clock.Now(), len(o.times())
	o.until(t, q, 0, "an event is answered without waiting", func() bool { return len(o.times()) > n })
	if !o.clock.Now().Equal(now) {
		t.Error("time had to pass")
	}
}

// What the cache or another writer settles is not held: its event comes with the answer.
func TestStaleCachesAreNotHeld(t *testing.T) {
	for _, err := range []error{ErrStaleCache, fmt.Errorf("web: %w", ErrStaleCache)} {
		o := &outcomes{clock: clocktesting.NewFakeClock(time.Unix(1e9, 0)), err: err}
		q := startQueue(t, o)
		o.until(t, q, 0, "ten syncs at one time", func() bool { return len(o.times()) >= 10 })
	}
}
