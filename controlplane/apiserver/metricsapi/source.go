// SPDX-License-Identifier: Apache-2.0

package metricsapi

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

const (
	// fresh is how long an answer is given again. Autoscalers ask every 15 s, each for its own pods.
	fresh = 5 * time.Second
	// longest is the window that still says what is used now.
	longest = time.Minute
	// shortest is how long two readings are apart when there is no earlier one to compare with.
	shortest = time.Second
	// parallel bounds how many nodes are asked at once.
	parallel = 32
)

// source asks nodes, and remembers one reading and one answer of each.
type source struct {
	read func(ctx context.Context, node string) (*stats.Summary, error)
	now  func() time.Time
	wait func(ctx context.Context, d time.Duration) error

	mu    sync.Mutex
	nodes map[string]*node
}

// node is what is known of one. Its lock is held while it is asked, so that all who ask meanwhile share the answer.
type node struct {
	sync.Mutex
	last   *reading
	answer *nodeUsage
}

func newSource(read func(ctx context.Context, node string) (*stats.Summary, error)) *source {
	return &source{read: read, now: time.Now, wait: pause, nodes: map[string]*node{}}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// usage asks nodes. One that does not answer is left out; failed is told why.
func (s *source) usage(ctx context.Context, names []string, failed func(node string, err error)) map[string]nodeUsage {
	var mu sync.Mutex
	all := make(map[string]nodeUsage, len(names))
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, name := range names {
		g.Go(func() error {
			u, err := s.one(ctx, name)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed(name, err)
				return nil
			}
			all[name] = u
			return nil
		})
	}
	_ = g.Wait() // nobody returns an error
	return all
}

func (s *source) one(ctx context.Context, name string) (nodeUsage, error) {
	s.mu.Lock()
	n := s.nodes[name]
	if n == nil {
		n = &node{}
		s.nodes[name] = n
	}
	s.mu.Unlock()
	n.Lock()
	defer n.Unlock()
	if n.answer != nil && s.now().Sub(n.answer.at) < fresh {
		return *n.answer, nil
	}
	first, err := s.reading(ctx, name)
	if err != nil {
		return nodeUsage{}, err
	}
	before, after := n.last, first
	if before == nil || first.at.Sub(before.at) > longest || first.at.Sub(before.at) < shortest {
		if err := s.wait(ctx, shortest); err != nil {
			return nodeUsage{}, err
		}
		if after, err = s.reading(ctx, name); err != nil {
			return nodeUsage{}, err
		}
		before = &first
	}
	u := rates(*before, after)
	n.last, n.answer = &after, &u
	return u, nil
}

func (s *source) reading(ctx context.Context, name string) (reading, error) {
	began := s.now()
	summary, err := s.read(ctx, name)
	if err != nil {
		return reading{}, err
	}
	// The node's own times come in whole seconds, too coarse for short windows.
	ended := s.now()
	return reading{at: began.Add(ended.Sub(began) / 2), summary: summary}, nil
}

// keep forgets the nodes that are not named.
func (s *source) keep(names []string) {
	here := make(map[string]bool, len(names))
	for _, n := range names {
		here[n] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.nodes {
		if !here[n] {
			delete(s.nodes, n)
		}
	}
}
