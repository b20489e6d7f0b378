// SPDX-License-Identifier: Apache-2.0

// Package conntrack removes flows that have ended or been silent for long from the kernel's maps, so
// that the LRU need not evict live ones.
package conntrack

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/maps"
)

// Lifetimes of a silent flow.
type Lifetimes struct {
	TCP       time.Duration // both directions seen
	TCPOpen   time.Duration // only one direction seen
	TCPClosed time.Duration // ended by FIN in both directions, or RST
	UDP       time.Duration // both directions seen
	UDPOpen   time.Duration
}

// Defaults are close to netfilter's.
var Defaults = Lifetimes{
	TCP:       6 * time.Hour,
	TCPOpen:   2 * time.Minute,
	TCPClosed: 10 * time.Second,
	UDP:       3 * time.Minute,
	UDPOpen:   30 * time.Second,
}

// Expired is a flow to forget, if it still is as it was read.
type Expired struct {
	Tuple    maps.Tuple
	LastSeen uint64
}

// Plan says which of flows are over. now is the clock of their LastSeen, in ns. Both directions of a
// flow live and die together: the later of the two counts. It is pure.
func Plan(flows map[maps.Tuple]maps.Flow, now uint64, life Lifetimes) []Expired {
	var out []Expired
	for t, f := range flows {
		seen, flags, both := f.LastSeen, f.Flags, false
		if pair, ok := flows[other(t, f)]; ok {
			seen = max(seen, pair.LastSeen)
			both = f.Flags&pair.Flags&maps.FlowSeen != 0
			// Closed by FIN only when both directions have sent theirs.
			if pair.Flags&maps.FlowFin == 0 {
				flags &^= maps.FlowFin
			}
			flags |= pair.Flags & maps.FlowRst
		}
		if now > seen && now-seen > uint64(lifetime(t.Proto, flags, both, life)) {
			out = append(out, Expired{Tuple: t, LastSeen: f.LastSeen})
		}
	}
	return out
}

// other is where the entry of the opposite direction is: the answer to what the packet becomes.
func other(t maps.Tuple, f maps.Flow) maps.Tuple {
	if f.Flags&maps.FlowTranslated != 0 {
		return f.To.Reverse()
	}
	return t.Reverse()
}

func lifetime(proto uint8, flags uint32, both bool, life Lifetimes) time.Duration {
	switch {
	case proto == maps.TCP && flags&(maps.FlowFin|maps.FlowRst) != 0:
		return life.TCPClosed
	case proto == maps.TCP && both:
		return life.TCP
	case proto == maps.TCP:
		return life.TCPOpen
	case both:
		return life.UDP
	}
	return life.UDPOpen
}

// Table is where flows are.
type Table interface {
	Flows() (map[maps.Tuple]maps.Flow, error)
	// Forget deletes a flow only if its last_seen is what was read.
	Forget(t maps.Tuple, lastSeen uint64) error
}

// Collector runs Plan again and again.
type Collector struct {
	Table     Table
	Lifetimes Lifetimes
	Log       *slog.Logger
	// Observe is told the number of flows and of those removed, after each pass. May be nil.
	Observe func(flows, removed int)
}

// Passes come sooner when much was found.
const (
	shortest = 5 * time.Second
	longest  = time.Minute
)

// Run collects until ctx ends.
func (c *Collector) Run(ctx context.Context) {
	delay := shortest
	timer := time.NewTimer(delay)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		flows, removed, err := c.Collect()
		if err != nil {
			c.Log.Error("flows were not collected, will retry", "err", err)
		}
		delay = next(delay, flows, removed)
		timer.Reset(delay)
	}
}

func next(delay time.Duration, flows, removed int) time.Duration {
	if removed*4 > flows {
		return shortest
	}
	return min(delay*2, longest)
}

// Collect makes one pass.
func (c *Collector) Collect() (flows, removed int, err error) {
	all, err := c.Table.Flows()
	if err != nil {
		return 0, 0, err
	}
	now, err := Now()
	if err != nil {
		return 0, 0, err
	}
	expired := Plan(all, now, c.Lifetimes)
	for _, e := range expired {
		if err := c.Table.Forget(e.Tuple, e.LastSeen); err != nil {
			return len(all), removed, fmt.Errorf("flow %v: %w", e.Tuple, err)
		}
		removed++
	}
	if c.Observe != nil {
		c.Observe(len(all), removed)
	}
	return len(all), removed, nil
}

// Now reads the clock that programs stamp flows with.
func Now() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		return 0, fmt.Errorf("coarse monotonic clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}
