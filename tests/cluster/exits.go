// SPDX-License-Identifier: Apache-2.0

package cluster

import "sync"

// exits remembers how processes ended, for those who ask later.
type exits struct {
	mu      sync.Mutex
	status  map[int]string
	waiting map[int]chan struct{}
}

func newExits() *exits {
	return &exits{status: map[int]string{}, waiting: map[int]chan struct{}{}}
}

func (e *exits) add(pid int, status string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.status[pid] = status
	if c, ok := e.waiting[pid]; ok {
		close(c)
		delete(e.waiting, pid)
	}
}

// done is closed once the process has ended.
func (e *exits) done(pid int) <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, ok := e.waiting[pid]
	if ok {
		return c
	}
	c = make(chan struct{})
	if _, ended := e.status[pid]; ended {
		close(c)
		return c
	}
	e.waiting[pid] = c
	return c
}

func (e *exits) how(pid int) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status[pid]
}
