// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"skep.io/skep/dataplane/maps"
)

func tuple(proto uint8, from, to string) maps.Tuple {
	f, t := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	return maps.Tuple{
		Saddr: maps.AddressOf(f.Addr()), Daddr: maps.AddressOf(t.Addr()),
		Sport: maps.PortOf(f.Port()), Dport: maps.PortOf(t.Port()), Proto: proto,
	}
}

func TestPlan(t *testing.T) {
	const now = uint64(100 * time.Hour)
	ago := func(d time.Duration) uint64 { return now - uint64(d) }
	const seen, fin, rst, reply, nat = maps.FlowSeen, maps.FlowFin, maps.FlowRst, maps.FlowReply, maps.FlowTranslated
	back := func(flags uint32) (out uint32) { // the same facts about the direction that is not canonical
		out = flags & rst
		if flags&seen != 0 {
			out |= maps.FlowSeenBack
		}
		if flags&fin != 0 {
			out |= maps.FlowFinBack
		}
		return out
	}
	type dir struct {
		flags uint32
		ago   time.Duration
	}
	for _, c := range []struct {
		name          string
		proto         uint8
		forward, back dir
		want          int // 1: all entries expire
	}{
		{"established and quiet for an hour", maps.TCP, dir{seen, time.Hour}, dir{seen | reply, time.Hour}, 0},
		{"established and quiet for a day", maps.TCP, dir{seen, 24 * time.Hour}, dir{seen | reply, 24 * time.Hour}, 1},
		{"one direction is alive", maps.TCP, dir{seen, 24 * time.Hour}, dir{seen | reply, time.Second}, 0},
		{"never answered", maps.TCP, dir{seen, 3 * time.Minute}, dir{reply, 3 * time.Minute}, 1},
		{"half closed", maps.TCP, dir{seen | fin, time.Hour}, dir{seen | reply, time.Hour}, 0},
		{"closed", maps.TCP, dir{seen | fin, time.Minute}, dir{seen | fin | reply, time.Minute}, 1},
		{"closed just now", maps.TCP, dir{seen | fin, time.Second}, dir{seen | fin | reply, time.Second}, 0},
		{"reset by one", maps.TCP, dir{seen, time.Minute}, dir{seen | rst | reply, time.Minute}, 1},
		{"UDP answered", maps.UDP, dir{seen, time.Minute}, dir{seen | reply, time.Minute}, 0},
		{"UDP answered long ago", maps.UDP, dir{seen, 4 * time.Minute}, dir{seen | reply, 4 * time.Minute}, 1},
		{"UDP one way, sending", maps.UDP, dir{seen, time.Second}, dir{reply, time.Hour}, 0},
		{"UDP one way, over", maps.UDP, dir{seen, time.Minute}, dir{reply, time.Minute}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			plain := tuple(c.proto, "10.42.0.1:1000", "10.42.0.2:80")
			service := tuple(c.proto, "192.0.2.9:1000", "192.0.2.1:30080")
			translated := tuple(c.proto, "192.0.2.1:2000", "10.42.0.2:80")
			for name, flows := range map[string]map[maps.Tuple]maps.Flow{
				"plain": {
					plain.Canonical(): {Flags: c.forward.flags | back(c.back.flags), LastSeen: ago(min(c.forward.ago, c.back.ago))},
				},
				"translated": {
					service.Canonical():              {Flags: c.forward.flags | nat, LastSeen: ago(c.forward.ago), To: translated},
					translated.Reverse().Canonical(): {Flags: c.back.flags | nat, LastSeen: ago(c.back.ago), To: service.Reverse()},
				},
			} {
				got := Plan(flows, now, Defaults)
				if want := c.want * len(flows); len(got) != want {
					t.Errorf("%s: %d of %d entries expire, want %d", name, len(got), len(flows), want)
				}
				for _, e := range got {
					if e.LastSeen != flows[e.Tuple].LastSeen {
						t.Errorf("%s: last seen is not what was read", name)
					}
				}
			}
		})
	}
}

// TestClockBehind: an entry newer than the clock's reading is not old.
func TestClockBehind(t *testing.T) {
	x := tuple(maps.UDP, "10.0.0.1:1", "10.0.0.2:2")
	if got := Plan(map[maps.Tuple]maps.Flow{x: {LastSeen: 10}}, 5, Defaults); len(got) != 0 {
		t.Error(got)
	}
}

type table struct {
	flows  map[maps.Tuple]maps.Flow
	failed bool
}

func (x *table) Flows() (map[maps.Tuple]maps.Flow, error) {
	if x.failed = !x.failed; x.failed {
		return nil, errors.New("injected")
	}
	return x.flows, nil
}

func (x *table) Tally() (Tally, error) { return Tally{}, nil }

func (x *table) Forget(t maps.Tuple, lastSeen uint64) error {
	if x.flows[t].LastSeen == lastSeen {
		delete(x.flows, t)
	}
	return nil
}

func TestCollect(t *testing.T) {
	x := tuple(maps.UDP, "10.0.0.1:1", "10.0.0.2:2")
	tab := &table{flows: map[maps.Tuple]maps.Flow{x: {LastSeen: 1}}}
	c := Collector{Table: tab, Lifetimes: Lifetimes{}}
	if _, err := c.Collect(); err == nil {
		t.Error("no error")
	}
	if p, err := c.Collect(); p != (Pass{UDP: 1, Removed: 1}) || err != nil || len(tab.flows) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestNext(t *testing.T) {
	for what, c := range map[string]struct {
		delay time.Duration
		pass  Pass
		room  int
		want  time.Duration
	}{
		"much was over":             {longest, Pass{TCP: 50, UDP: 50, Removed: 50}, 1000, shortest},
		"nothing was":               {shortest, Pass{TCP: 100}, 1000, 2 * shortest},
		"nothing for long":          {longest, Pass{TCP: 100}, 1000, longest},
		"half full":                 {longest, Pass{TCP: 10, UDP: 600}, 1000, middle},
		"nearly full":               {longest, Pass{TCP: 800, UDP: 1}, 1000, shortest},
		"two maps, neither is full": {longest, Pass{TCP: 400, UDP: 400}, 1000, longest},
		"of unknown size":           {longest, Pass{TCP: 100}, 0, longest},
	} {
		if got := next(c.delay, c.pass, c.room); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
}

func TestMax(t *testing.T) {
	const gib = 1 << 30
	for memory, want := range map[uint64]uint32{0: Fewest, 4 * gib: Fewest, 24 * gib: 98304, 64 * gib: 1 << 18, 4096 * gib: Most} {
		if got := Max(memory); got != want {
			t.Errorf("%d GiB: %d, want %d", memory/gib, got, want)
		}
	}
}

// TestJustUsed: a flow that was used after it was read stays.
func TestJustUsed(t *testing.T) {
	x := tuple(maps.UDP, "10.0.0.1:1", "10.0.0.2:2")
	tab := &table{flows: map[maps.Tuple]maps.Flow{x: {LastSeen: 1}}, failed: true}
	used := &usedMeanwhile{tab}
	c := Collector{Table: used, Lifetimes: Lifetimes{}}
	if p, err := c.Collect(); p.Removed != 1 || err != nil || len(tab.flows) != 1 {
		t.Errorf("%+v, %v; left %v", p, err, tab.flows)
	}
}

type usedMeanwhile struct{ *table }

func (u *usedMeanwhile) Forget(t maps.Tuple, lastSeen uint64) error {
	u.flows[t] = maps.Flow{LastSeen: lastSeen + 1}
	return u.table.Forget(t, lastSeen)
}
