// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"testing"
	"time"
)

func TestQueueOrder(t *testing.T) {
	q := newQueue()
	now := time.Unix(0, 0)
	for _, p := range []*pod{
		newPendingPod(testPod("first")), newPendingPod(testPod("second")),
		newPendingPod(testPod("urgent", priority(10))), newPendingPod(testPod("lowly", priority(-1))),
	} {
		q.put(p, now)
	}
	for _, want := range []string{"urgent", "first", "second", "lowly"} {
		if item, _ := q.pop(now); item == nil || item.pod.key.Name != want {
			t.Fatalf("got %v, want %s", item, want)
		}
	}
	if item, next := q.pop(now); item != nil || !next.IsZero() {
		t.Error("an empty queue gave something")
	}
}

func TestQueueBackoff(t *testing.T) {
	q := newQueue()
	now := time.Unix(0, 0)
	q.put(newPendingPod(testPod("p")), now)
	// Errors wait longer each time, up to a bound.
	for _, want := range []time.Duration{1, 2, 4, 8, 10, 10} {
		item, _ := q.pop(now)
		q.retry(item, now)
		early, next := q.pop(now.Add(want*time.Second - 1))
		if early != nil {
			t.Fatal("an error was retried before its backoff ended")
		}
		if got := next.Sub(now); got != want*time.Second {
			t.Errorf("backoff is %v, want %v", got, want*time.Second)
		}
		now = next
	}
	// A pod that an event woke waits behind others, but not for nothing.
	item, _ := q.pop(now)
	q.sleep(item, 0, now)
	if other, next := q.pop(now); other != nil || !next.IsZero() {
		t.Error("a sleeping pod was given out")
	}
	q.wake(item, now)
	q.put(newPendingPod(testPod("fresh", priority(-5))), now)
	for _, want := range []string{"fresh", "p"} {
		if item, _ := q.pop(now); item == nil || item.pod.key.Name != want {
			t.Errorf("got %v, want %s", item, want)
		}
	}
}

func TestQueueRemove(t *testing.T) {
	now := time.Unix(0, 0)
	for name, where := range map[string]func(*queue, *pending){
		"active":  func(q *queue, item *pending) { q.put(item.pod, now) },
		"backoff": func(q *queue, item *pending) { q.retry(item, now) },
		"asleep":  func(q *queue, item *pending) { q.sleep(item, 0, now) },
	} {
		q := newQueue()
		p := newPendingPod(testPod("p"))
		q.put(p, now)
		item, _ := q.pop(now)
		where(q, item)
		q.remove(p.uid)
		if len(q.byUID)+len(q.active)+len(q.backoff)+len(q.asleep) != 0 {
			t.Errorf("%s: something was left", name)
		}
	}
}
