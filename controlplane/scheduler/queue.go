// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"container/heap"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

const (
	firstBackoff = 1 * time.Second
	lastBackoff  = 10 * time.Second
)

// place is where a pending pod waits.
type place int

const (
	nowhere place = iota
	active        // to be scheduled next
	backoff       // tried without success a short while ago
	asleep        // fits nowhere: waits for an event that could help
)

// pending is a pod that has no node yet.
type pending struct {
	pod      *pod
	since    time.Time // when it was first seen: the order among equal priorities
	sequence uint64    // breaks ties of since
	attempts int
	failed   time.Time // when it was last tried

	place place
	index int // in its heap
	until time.Time
	// erred: the last try failed for a reason outside the cluster's state, such as an API call; its
	// backoff must be sat out.
	erred bool
	// blockers is what was in the way at the last try.
	blockers blockers
}

func (p *pending) backoffEnd() time.Time {
	wait := firstBackoff
	for i := 1; i < p.attempts && wait < lastBackoff; i++ {
		wait *= 2
	}
	return p.failed.Add(min(wait, lastBackoff))
}

// queue holds the pods without a node. Time is passed in. It has the snapshot's owner.
type queue struct {
	byUID    map[types.UID]*pending
	active   activeHeap
	backoff  backoffHeap
	asleep   map[types.UID]*pending
	watching map[types.UID]*pending // those asleep whom pods on other nodes are in the way
	sequence uint64
}

func newQueue() *queue {
	return &queue{byUID: map[types.UID]*pending{}, asleep: map[types.UID]*pending{}, watching: map[types.UID]*pending{}}
}

// put adds a pod or replaces what is known about it. A pod that slept is tried again, since what
// changed may be what was in its way.
func (q *queue) put(p *pod, now time.Time) {
	item := q.byUID[p.uid]
	if item == nil {
		q.sequence++
		item = &pending{since: now, sequence: q.sequence}
		q.byUID[p.uid] = item
	}
	q.leave(item)
	item.pod = p
	q.ready(item, now)
}

// ready moves an item to where it can be popped from, after its backoff if it has to wait that out.
func (q *queue) ready(item *pending, now time.Time) {
	q.leave(item)
	if end := item.backoffEnd(); item.attempts > 0 && end.After(now) {
		item.place, item.until = backoff, end
		heap.Push(&q.backoff, item)
		return
	}
	item.place = active
	heap.Push(&q.active, item)
}

// wake moves a sleeping item.
func (q *queue) wake(item *pending, now time.Time) {
	if item.place == asleep {
		q.ready(item, now)
	}
}

// pop takes the next pod to try; the caller puts it back with sleep, retry or drops it with remove.
// When there is nothing to try at once, next is when there will be, if ever.
func (q *queue) pop(now time.Time) (item *pending, next time.Time) {
	for len(q.backoff) > 0 && !q.backoff[0].until.After(now) {
		q.ready(q.backoff[0], now)
	}
	if len(q.active) > 0 {
		item = q.active[0]
		q.leave(item)
		item.attempts++
		return item, time.Time{}
	}
	if len(q.backoff) == 0 {
		return nil, time.Time{}
	}
	// Nobody else wants the scheduler's time, so a pod that an event has woken need not sit out its
	// backoff. It ran into backoff by an event, so this cannot spin.
	if item = q.backoff[0]; !item.erred {
		q.leave(item)
		item.attempts++
		return item, time.Time{}
	}
	for _, other := range q.backoff {
		if !other.erred {
			q.leave(other)
			other.attempts++
			return other, time.Time{}
		}
	}
	return nil, q.backoff[0].until
}

// sleep puts a popped item aside until an event wakes it.
func (q *queue) sleep(item *pending, by blockers, now time.Time) {
	item.failed, item.erred, item.blockers = now, false, 0
	q.blocked(item, by)
	item.place = asleep
	q.asleep[item.pod.uid] = item
}

// blocked notes what else keeps a sleeping item off some node.
func (q *queue) blocked(item *pending, by blockers) {
	if item.blockers |= by; by.aboutOthers() {
		q.watching[item.pod.uid] = item
	}
}

// retry puts a popped item back after an error.
func (q *queue) retry(item *pending, now time.Time) {
	item.failed, item.erred = now, true
	q.ready(item, now)
}

func (q *queue) remove(uid types.UID) {
	if item := q.byUID[uid]; item != nil {
		q.leave(item)
		delete(q.byUID, uid)
	}
}

func (q *queue) leave(item *pending) {
	switch item.place {
	case active:
		heap.Remove(&q.active, item.index)
	case backoff:
		heap.Remove(&q.backoff, item.index)
	case asleep:
		delete(q.asleep, item.pod.uid)
		delete(q.watching, item.pod.uid)
	}
	item.place = nowhere
}

type activeHeap []*pending

func (h activeHeap) Len() int { return len(h) }
func (h activeHeap) Less(i, j int) bool {
	a, b := h[i], h[j]
	if a.pod.priority != b.pod.priority {
		return a.pod.priority > b.pod.priority
	}
	return a.sequence < b.sequence // as assigned, in the order of arrival
}
func (h activeHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i]; h[i].index, h[j].index = i, j }
func (h *activeHeap) Push(x any) {
	item := x.(*pending)
	item.index = len(*h)
	*h = append(*h, item)
}
func (h *activeHeap) Pop() any {
	old := *h
	item := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return item
}

type backoffHeap []*pending

func (h backoffHeap) Len() int           { return len(h) }
func (h backoffHeap) Less(i, j int) bool { return h[i].until.Before(h[j].until) }
func (h backoffHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i]; h[i].index, h[j].index = i, j }
func (h *backoffHeap) Push(x any) {
	item := x.(*pending)
	item.index = len(*h)
	*h = append(*h, item)
}
func (h *backoffHeap) Pop() any {
	old := *h
	item := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return item
}
