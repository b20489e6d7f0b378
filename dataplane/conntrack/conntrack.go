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

// Plan says which of flows are over. now is the clock of their LastSeen, in ns. The two sides of a
// translated flow live and die together: the later of the two counts. It is pure.
func Plan(flows map[maps.Tuple]maps.Flow, now uint64, life Lifetimes) []Expired {
	var out []Expired
	for t, f := range flows {
		seen := f.LastSeen
		state := stateOf(f)
		if f.Flags&maps.FlowTranslated != 0 {
			if pair, ok := flows[f.To.Canonical()]; ok {
				seen = max(seen, pair.LastSeen)
				state = state.with(stateOf(pair))
			}
		}
		if now > seen && now-seen > uint64(state.lifetime(t.Proto, life)) {
			out = append(out, Expired{Tuple: t, LastSeen: f.LastSeen})
		}
	}
	return out
}

// state of a flow: how many directions were seen and have ended.
type state struct {
	seen, ended int
	reset       bool
}

func stateOf(f maps.Flow) state {
	count := func(bits ...uint32) (n int) {
		for _, b := range bits {
			if f.Flags&b != 0 {
				n++
			}
		}
		return n
	}
	return state{
		seen:  count(maps.FlowSeen, maps.FlowSeenBack),
		ended: count(maps.FlowFin, maps.FlowFinBack),
		reset: f.Flags&maps.FlowRst != 0,
	}
}

// with adds the other side, which sees the other direction.
func (s state) with(o state) state {
	return state{seen: s.seen + o.seen, ended: s.ended + o.ended, reset: s.reset || o.reset}
}

func (s state) lifetime(proto uint8, life Lifetimes) time.Duration {
	both := s.seen >= 2
	switch {
	case proto == maps.TCP && (s.ended >= 2 || s.reset):
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
	Tally() (Tally, error)
	// Forget deletes a flow only if its last_seen is what was read.
	Forget(t maps.Tuple, lastSeen uint64) error
}

// Collector runs Plan again and again.
type Collector struct {
	Table     Table
	Lifetimes Lifetimes
	Log       *slog.Logger
	// Room is how many flows of one protocol fit: the fuller its map, the sooner the next pass.
	Room int
	// Observe is told of each pass. May be nil.
	Observe func(Pass)

	evictions evictions
}

// Pass is what one found and did.
type Pass struct {
	TCP, UDP int // flows found; UDP also counts what is neither
	Removed  int
	Evicted  ByProtocol // at least, since the maps were made
	Failed   ByProtocol // could not be noted, since the maps were made
}

// Flows found in all.
func (p Pass) Flows() int { return p.TCP + p.UDP }

// Passes come sooner when much was found.
const (
	shortest = 5 * time.Second
	middle   = 15 * time.Second
	longest  = time.Minute
)

// Bounds of a map's size. A flow takes about 200 bytes, all of them from the start, as the kernel's lists of what was
// used last are made of elements that are there.
const (
	Least  = 1 << 10 // that an operator may ask for
	Fewest = 1 << 16 // by default
	Most   = 1 << 22
	// perFlow is how much memory a machine has for each flow of one protocol: of 24 GiB the maps take 40 MB. (Netfilter
	// gives a flow 16 KiB of a machine up to 4 GiB and never more than 262,144, but takes what it needs only.)
	perFlow = 1 << 18
)

// Max is how many flows of each protocol fit by default on a machine with so many bytes of memory.
func Max(memory uint64) uint32 {
	return uint32(min(max(memory/perFlow, Fewest), Most))
}

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
		pass, err := c.Collect()
		if err != nil {
			c.Log.Error("flows were not collected, will retry", "err", err)
		}
		delay = next(delay, pass, c.Room)
		timer.Reset(delay)
	}
}

// next says when to look again: soon after much was found or when a map is three quarters full, as what does not fit
// drives out a flow that may be alive; not late when it is half full.
func next(delay time.Duration, p Pass, room int) time.Duration {
	fullest := max(p.TCP, p.UDP) - p.Removed
	switch {
	case p.Removed*4 > p.Flows(), room > 0 && fullest*4 > room*3:
		return shortest
	case room > 0 && fullest*2 > room:
		return min(delay*2, middle)
	}
	return min(delay*2, longest)
}

// Collect makes one pass.
func (c *Collector) Collect() (p Pass, err error) {
	before, err := c.Table.Tally()
	if err != nil {
		return p, err
	}
	all, err := c.Table.Flows()
	if err != nil {
		return p, err
	}
	after, err := c.Table.Tally()
	if err != nil {
		return p, err
	}
	now, err := Now()
	if err != nil {
		return p, err
	}
	for t := range all {
		if t.Proto == maps.TCP {
			p.TCP++
		} else {
			p.UDP++
		}
	}
	p.Failed = after.Failed
	p.Evicted = c.evictions.add(before, after, ByProtocol{uint64(p.TCP), uint64(p.UDP)})
	for _, e := range Plan(all, now, c.Lifetimes) {
		if err := c.Table.Forget(e.Tuple, e.LastSeen); err != nil {
			return p, fmt.Errorf("flow %v: %w", e.Tuple, err)
		}
		p.Removed++
	}
	if c.Observe != nil {
		c.Observe(p)
	}
	return p, nil
}

// Now reads the clock that programs stamp flows with.
func Now() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		return 0, fmt.Errorf("coarse monotonic clock: %w", err)
	}
	return uint64(ts.Nano()), nil
}
