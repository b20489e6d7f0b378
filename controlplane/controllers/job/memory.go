// SPDX-License-Identifier: Apache-2.0

package job

import (
	"maps"
	"sync"

	"k8s.io/apimachinery/pkg/types"
)

// memory is what the controller knows of its own writes before the caches show them, and the back-off of Jobs. All
// of it may be lost: after a restart the caches begin with everything that was written. The zero memory is empty.
type memory struct {
	mu   sync.Mutex
	jobs map[types.UID]*remembered
	// owners finds the Job whose pod is waited for.
	owners map[types.UID]types.UID
}

type remembered struct {
	written   version
	untracked map[types.UID]bool
	backoff   *Backoff
}

// of returns the entry of a Job, made if need be. The lock is held.
func (m *memory) of(job types.UID) *remembered {
	if m.jobs == nil {
		m.jobs, m.owners = map[types.UID]*remembered{}, map[types.UID]types.UID{}
	}
	r := m.jobs[job]
	if r == nil {
		r = &remembered{untracked: map[types.UID]bool{}}
		m.jobs[job] = r
	}
	return r
}

func (m *memory) forget(job types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.jobs[job]; r != nil {
		for pod := range r.untracked {
			delete(m.owners, pod)
		}
		delete(m.jobs, job)
	}
}

// wrote notes the version of a Job that the controller has written itself.
func (m *memory) wrote(job types.UID, v version) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.of(job).written = v
}

func (m *memory) written(job types.UID) version {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.jobs[job]; r != nil {
		return r.written
	}
	return ""
}

// untrack notes that the finalizer of a pod is being removed.
func (m *memory) untrack(job, pod types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.of(job).untracked[pod] = true
	m.owners[pod] = job
}

// untrackSeen ends that: the cache shows it, or it failed.
func (m *memory) untrackSeen(pod types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if job, ok := m.owners[pod]; ok {
		delete(m.owners, pod)
		delete(m.jobs[job].untracked, pod)
	}
}

func (m *memory) untracked(job types.UID) map[types.UID]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.jobs[job]; r != nil {
		return maps.Clone(r.untracked)
	}
	return nil
}

func (m *memory) setBackoff(job types.UID, b Backoff) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.of(job).backoff = &b
}

func (m *memory) backoff(job types.UID) *Backoff {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.jobs[job]; r != nil {
		return r.backoff
	}
	return nil
}
