// SPDX-License-Identifier: Apache-2.0

package services

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	dpmaps "skep.io/skep/dataplane/maps"
)

// kernel is a Store in memory that fails at random, sometimes after it did part of the work, and that
// looks through a reader's eyes after every step.
type kernel struct {
	services map[dpmaps.ServiceKey]dpmaps.Service
	slots    map[dpmaps.SlotKey]uint32
	tables   map[dpmaps.SlotKey]dpmaps.TableBlock
	backends map[uint32]dpmaps.Backend
	ranges   map[dpmaps.SourceRangeKey]uint32

	fail    func() bool
	full    bool   // no room for tables
	room    int    // for slots, for backends and for frontends each; 0: as many as come
	broken  string // what a reader saw and should not have
	readers []dpmaps.Service
}

var errInjected = errors.New("injected")

func newKernel() *kernel {
	return &kernel{
		services: map[dpmaps.ServiceKey]dpmaps.Service{}, slots: map[dpmaps.SlotKey]uint32{}, backends: map[uint32]dpmaps.Backend{},
		ranges: map[dpmaps.SourceRangeKey]uint32{}, tables: map[dpmaps.SlotKey]dpmaps.TableBlock{},
		fail: func() bool { return false },
	}
}

func (k *kernel) ReadServices() (dpmaps.Snapshot, error) {
	tables := map[dpmaps.SlotKey]bool{}
	for key := range k.tables {
		tables[key] = true
	}
	return dpmaps.Snapshot{Tables: tables, Services: maps.Clone(k.services), Slots: maps.Clone(k.slots), Backends: maps.Clone(k.backends), Ranges: maps.Clone(k.ranges)}, nil
}

// look follows every frontend, and every one that a program read before and may still be using.
func (k *kernel) look() {
	for _, s := range append(slices.Collect(maps.Values(k.services)), k.readers...) {
		for i := range s.Count {
			id, ok := k.slots[dpmaps.SlotKey{Service: s.ID, Generation: s.Generation, Slot: i}]
			if !ok {
				k.broken = fmt.Sprintf("set %d generation %d has no slot %d of %d", s.ID, s.Generation, i, s.Count)
				return
			}
			if b, ok := k.backends[id]; !ok || b.Service != s.ID {
				k.broken = fmt.Sprintf("set %d generation %d slot %d leads to backend %d: %+v", s.ID, s.Generation, i, id, b)
				return
			}
		}
		if s.Flags&dpmaps.ServiceMaglev != 0 {
			if err := k.wholeTable(s); err != nil {
				k.broken = fmt.Sprintf("set %d generation %d: %v", s.ID, s.Generation, err)
				return
			}
		}
		if s.Flags&dpmaps.ServiceRanges != 0 && len(k.rangesOf(s)) == 0 {
			k.broken = fmt.Sprintf("set %d generation %d is for nobody", s.ID, s.Generation)
			return
		}
	}
}

// fits says whether a map of n entries has room for one more.
func (k *kernel) fits(known bool, n int) error {
	if k.room > 0 && !known && n >= k.room {
		return fmt.Errorf("map: %w", unix.E2BIG)
	}
	return nil
}

func (k *kernel) step(f func()) error {
	if k.fail() {
		return errInjected
	}
	f()
	k.look()
	if k.fail() {
		return errInjected // it was done, but the caller does not know
	}
	return nil
}

func (k *kernel) PutBackends(ids []uint32, values []dpmaps.Backend) error {
	for i := range ids {
		_, known := k.backends[ids[i]]
		if err := k.fits(known, len(k.backends)); err != nil {
			return err
		}
		if err := k.step(func() { k.backends[ids[i]] = values[i] }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) PutSlots(keys []dpmaps.SlotKey, values []uint32) error {
	for i := range keys {
		_, known := k.slots[keys[i]]
		if err := k.fits(known, len(k.slots)); err != nil {
			return err
		}
		if err := k.step(func() { k.slots[keys[i]] = values[i] }); err != nil {
			return err
		}
	}
	return nil
}

// wholeTable follows every entry of a consistent table.
func (k *kernel) wholeTable(s dpmaps.Service) error {
	for i := range dpmaps.TableSize(int(s.Count)) {
		block, ok := k.tables[dpmaps.SlotKey{Service: s.ID, Generation: s.Generation, Slot: uint32(i / 64)}]
		if !ok {
			return fmt.Errorf("block %d of the table of %d backends is missing", i/64, s.Count)
		}
		if b, ok := k.backends[block[i%64]]; !ok || b.Service != s.ID {
			return fmt.Errorf("entry %d leads to backend %d: %+v", i, block[i%64], b)
		}
	}
	return nil
}

func (k *kernel) PutTable(keys []dpmaps.SlotKey, values []dpmaps.TableBlock) error {
	for i := range keys {
		if k.full {
			return fmt.Errorf("table: %w", unix.E2BIG)
		}
		if err := k.step(func() { k.tables[keys[i]] = values[i] }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) DeleteTable(keys []dpmaps.SlotKey) error {
	for _, key := range keys {
		if err := k.step(func() { delete(k.tables, key) }); err != nil {
			return err
		}
	}
	return nil
}

// rangesOf is whom a frontend is for.
func (k *kernel) rangesOf(s dpmaps.Service) (out []netip.Prefix) {
	for key := range k.ranges {
		if key.Service == s.ID && key.Generation == s.Generation {
			out = append(out, key.Prefix())
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

func (k *kernel) PutRanges(keys []dpmaps.SourceRangeKey) error {
	for _, key := range keys {
		if err := k.step(func() { k.ranges[key] = 1 }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) DeleteRanges(keys []dpmaps.SourceRangeKey) error {
	for _, key := range keys {
		if err := k.step(func() { delete(k.ranges, key) }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) PutService(v dpmaps.Service) error {
	_, known := k.services[v.Key]
	if err := k.fits(known, len(k.services)); err != nil {
		return err
	}
	return k.step(func() {
		if old, ok := k.services[v.Key]; ok {
			k.readers = append(k.readers, old)
		}
		k.services[v.Key] = v
	})
}

func (k *kernel) DeleteService(key dpmaps.ServiceKey) error {
	return k.step(func() {
		if old, ok := k.services[key]; ok {
			k.readers = append(k.readers, old)
		}
		delete(k.services, key)
	})
}

func (k *kernel) DeleteSlots(keys []dpmaps.SlotKey) error {
	for _, key := range keys {
		if err := k.step(func() { delete(k.slots, key) }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) DeleteBackends(ids []uint32) error {
	for _, id := range ids {
		if err := k.step(func() { delete(k.backends, id) }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) WaitReaders() error { return k.step(func() { k.readers = nil }) }

func addrs(last ...int) []netip.AddrPort {
	var out []netip.AddrPort
	for _, n := range last {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 42, 0, byte(n)}), 8080))
	}
	return out
}

func front(n int) Frontend {
	return Frontend{Addr: netip.AddrFrom4([4]byte{10, 43, 0, byte(n)}), Port: 80, Proto: dpmaps.TCP}
}

// check that the kernel holds what is wanted, no more and no less.
func (k *kernel) check(t interface{ Fatalf(string, ...any) }, want map[string][]Set) {
	fronts, slots, backends, ranges, blocks := 0, 0, 0, 0, 0
	for _, sets := range want {
		for _, s := range sets {
			slots += len(s.Backends)
			backends += len(s.Backends)
			ranges += len(s.Ranges)
			if s.tabled() {
				blocks += tableBlocks(dpmaps.TableSize(len(s.Backends)))
			}
			for _, f := range s.Frontends {
				fronts++
				v, ok := k.services[f.Key()]
				if !ok {
					t.Fatalf("frontend %v of %s is missing", f, s.Name)
				}
				var got []netip.AddrPort
				for i := range v.Count {
					b := k.backends[k.slots[dpmaps.SlotKey{Service: v.ID, Generation: v.Generation, Slot: i}]]
					got = append(got, netip.AddrPortFrom(b.Addr.Addr(), b.Port.Number()))
				}
				slices.SortFunc(got, netip.AddrPort.Compare)
				if !slices.Equal(got, s.Backends) {
					t.Fatalf("frontend %v leads to %v, want %v", f, got, s.Backends)
				}
				if maglev := v.Flags&dpmaps.ServiceMaglev != 0; maglev != (f.Maglev && s.tabled()) {
					t.Fatalf("frontend %v of %d backends has a table: %t", f, len(s.Backends), maglev)
				}
				if ranged := v.Flags&dpmaps.ServiceRanges != 0; ranged != f.Ranged || ranged && !slices.Equal(k.rangesOf(v), s.Ranges) {
					t.Fatalf("frontend %v is for %v (%t), want %v", f, k.rangesOf(v), ranged, s.Ranges)
				}
			}
		}
	}
	if len(k.ranges) != ranges {
		t.Fatalf("the kernel has %d ranges, want %d: %v", len(k.ranges), ranges, k.ranges)
	}
	if len(k.tables) != blocks {
		t.Fatalf("the kernel has %d blocks of tables, want %d", len(k.tables), blocks)
	}
	if len(k.services) != fronts || len(k.slots) != slots || len(k.backends) != backends {
		t.Fatalf("the kernel has %d frontends, %d slots, %d backends; want %d, %d, %d: %+v", len(k.services), len(k.slots), len(k.backends), fronts, slots, backends, k.slots)
	}
}

// TestReconcilerProperty: any sequence of changes, restarts and failures of one operation in ten ends
// in the right state, and no reader ever meets half a service.
func TestReconcilerProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := newKernel()
		chance := rapid.SampledFrom([]int{0, 0, 10, 3}).Draw(t, "one in")
		rng := rapid.Uint64().Draw(t, "seed") | 1
		inject := func() bool {
			rng ^= rng << 13
			rng ^= rng >> 7
			rng ^= rng << 17
			return chance > 0 && rng%uint64(chance) == 0
		}
		k.fail = inject
		r, err := NewReconciler(k)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string][]Set{}
		draw := func(key string) []Set {
			var sets []Set
			for i := range rapid.IntRange(0, 2).Draw(t, "sets") {
				s := Set{Name: fmt.Sprintf("%s:%d", key, i), Proto: dpmaps.TCP}
				base := int(key[0]-'a')*20 + i*10
				for r := range 3 {
					if rapid.Bool().Draw(t, "range") {
						s.Ranges = append(s.Ranges, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r * 2)}), 16-r%2))
					}
				}
				slices.SortFunc(s.Ranges, netip.Prefix.Compare)
				for f := range rapid.IntRange(1, 3).Draw(t, "frontends") {
					to := front(base + f)
					to.Maglev = rapid.IntRange(0, 3).Draw(t, "maglev") == 0
					to.Ranged = len(s.Ranges) > 0 && rapid.Bool().Draw(t, "ranged")
					s.Frontends = append(s.Frontends, to)
				}
				for b := range 5 {
					if rapid.Bool().Draw(t, "backend") {
						s.Backends = append(s.Backends, addrs(b+1)...)
					}
				}
				sets = append(sets, s)
			}
			return sets
		}
		settle := func() {
			k.fail = func() bool { return false }
			for key := range want {
				if err := r.Apply(key, want[key]); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Prune(); err != nil {
				t.Fatal(err)
			}
			if err := r.Collect(); err != nil {
				t.Fatal(err)
			}
			k.check(t, want)
			services, slots, blocks, backends := r.Size()
			if services != len(k.services) || slots != len(k.slots) || blocks != len(k.tables) || backends != len(k.backends) {
				t.Fatalf("sizes %d %d %d are not %d %d %d", services, slots, backends, len(k.services), len(k.slots), len(k.backends))
			}
			k.fail = inject
		}
		pruned := true // an empty kernel has nothing to prune
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			switch key := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "service"); rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				settle()
				pruned = true
			case 1: // the process dies and another starts
				if r, err = NewReconciler(k); err != nil {
					t.Fatal(err)
				}
				k.readers = nil
				pruned = false
			case 2, 3:
				if pruned { // as the controller does
					_ = r.Collect()
				}
			default:
				want[key] = draw(key)
				_ = r.Apply(key, want[key])
			}
			if k.broken != "" {
				t.Fatalf("a reader: %s", k.broken)
			}
		}
		settle()
		if k.broken != "" {
			t.Fatalf("a reader: %s", k.broken)
		}
	})
}

// TestRestartKeepsIDs: what did not change is not written again.
func TestRestartKeepsIDs(t *testing.T) {
	k := newKernel()
	r, _ := NewReconciler(k)
	web := []Set{{Name: "web", Proto: dpmaps.TCP, Frontends: []Frontend{front(1), front(2)}, Backends: addrs(1, 2, 3)}}
	web[0].Frontends[1].Maglev = true
	none := []Set{{Name: "none", Proto: dpmaps.TCP, Frontends: []Frontend{front(3)}}}
	for key, sets := range map[string][]Set{"web": web, "none": none} {
		if err := r.Apply(key, sets); err != nil {
			t.Fatal(err)
		}
	}
	again, _ := NewReconciler(k)
	writes := 0
	k.fail = func() bool { writes++; return false }
	for key, sets := range map[string][]Set{"web": web, "none": none} {
		if err := again.Apply(key, sets); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(again.Prune(), again.Collect()); err != nil {
		t.Fatal(err)
	}
	if writes != 0 {
		t.Errorf("%d operations for nothing", writes)
	}
}

// TestTableFull: without room for a consistent table a service works at random, says so, and gets one later.
func TestTableFull(t *testing.T) {
	k := newKernel()
	r, _ := NewReconciler(k)
	f := front(1)
	f.Maglev = true
	web := []Set{{Name: "web", Proto: dpmaps.TCP, Frontends: []Frontend{f}, Backends: addrs(1, 2, 3)}}
	k.full = true
	for range 2 {
		if err := r.Apply("web", web); !errors.Is(err, unix.E2BIG) {
			t.Errorf("no room: %v", err)
		}
		if v := k.services[f.Key()]; v.Count != 3 || v.Flags&dpmaps.ServiceMaglev != 0 || k.broken != "" {
			t.Errorf("%+v, %s", v, k.broken)
		}
	}
	k.full = false
	if err := errors.Join(r.Apply("web", web), r.Collect()); err != nil {
		t.Fatal(err)
	}
	k.check(t, map[string][]Set{"web": web})
}

// TestRoomOfOthers: what does not fit takes no room from what does, however often it is tried, and whichever map is full.
func TestRoomOfOthers(t *testing.T) {
	set := func(name string, n int, ends ...int) []Set {
		return []Set{{Name: name, Proto: dpmaps.TCP, Frontends: []Frontend{front(n)}, Backends: addrs(ends...)}}
	}
	for _, c := range []struct {
		name            string
		slots, backends int // that others hold
		frontends       int
		big             []Set
	}{
		{"slots", 14, 0, 0, set("big", 2, 1, 2, 3, 4, 5, 6, 7, 8)},
		{"backends", 0, 14, 0, set("big", 2, 1, 2, 3, 4, 5, 6, 7, 8)},
		{"frontends", 0, 0, 19, set("big", 2, 1, 2)},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKernel()
			k.room = 20
			r, _ := NewReconciler(k)
			for i := range c.slots {
				k.slots[dpmaps.SlotKey{Service: 999, Slot: uint32(i)}] = 1
			}
			for i := range c.backends {
				k.backends[uint32(1000+i)] = dpmaps.Backend{}
			}
			for i := range c.frontends {
				f := front(100 + i)
				k.services[f.Key()] = dpmaps.Service{Key: f.Key()}
			}
			for i := range 10 {
				web := set("web", 1, 1+i%2)
				if err := errors.Join(r.Apply("web", web), r.Collect()); err != nil {
					t.Fatalf("round %d: web: %v", i, err)
				}
				if err := r.Apply("big", c.big); !errors.Is(err, unix.E2BIG) {
					t.Fatalf("round %d: big: %v", i, err)
				}
				if err := r.Collect(); err != nil {
					t.Fatal(err)
				}
				if services, slots, _, backends := r.Size(); slots != len(k.slots)-c.slots || backends != len(k.backends)-c.backends || k.broken != "" {
					t.Fatalf("round %d: sizes %d %d %d: %v, %s", i, services, slots, backends, k.slots, k.broken)
				}
			}
			k.room = 0
			if err := errors.Join(r.Apply("big", c.big), r.Collect()); err != nil {
				t.Fatal(err)
			}
			if got := k.services[c.big[0].Frontends[0].Key()].Count; int(got) != len(c.big[0].Backends) {
				t.Errorf("big has %d backends", got)
			}
		})
	}
}

// TestCostOfOneChange: writing one changed endpoint does not depend on the number of services.
func TestCostOfOneChange(t *testing.T) {
	cost := func(services int) (ops int) {
		k := newKernel()
		r, _ := NewReconciler(k)
		for i := range services {
			key := fmt.Sprint(i)
			f := Frontend{Addr: netip.AddrFrom4([4]byte{10, 43, byte(i >> 8), byte(i)}), Port: 80, Proto: dpmaps.TCP}
			_ = r.Apply(key, []Set{{Name: key, Proto: dpmaps.TCP, Frontends: []Frontend{f}, Backends: addrs(1, 2)}})
		}
		f := Frontend{Addr: netip.AddrFrom4([4]byte{10, 43, 0, 0}), Port: 80, Proto: dpmaps.TCP}
		k.fail = func() bool { ops++; return false }
		_ = r.Apply("0", []Set{{Name: "0", Proto: dpmaps.TCP, Frontends: []Frontend{f}, Backends: addrs(1, 3)}})
		return ops
	}
	if few, many := cost(2), cost(200); few != many || few > 10 {
		t.Errorf("%d operations among 2 services, %d among 200", few, many)
	}
}
