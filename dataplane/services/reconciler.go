// SPDX-License-Identifier: Apache-2.0

package services

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/maps"
)

// Store is what the reconciler writes to; *maps.Maps is the real one.
type Store interface {
	ReadServices() (maps.Snapshot, error)
	PutBackends(ids []uint32, values []maps.Backend) error
	PutSlots(keys []maps.SlotKey, values []uint32) error
	PutTable(keys []maps.SlotKey, values []maps.TableBlock) error
	PutRanges(keys []maps.SourceRangeKey) error
	PutService(v maps.Service) error
	DeleteService(k maps.ServiceKey) error
	DeleteSlots(keys []maps.SlotKey) error
	DeleteTable(keys []maps.SlotKey) error
	DeleteRanges(keys []maps.SourceRangeKey) error
	DeleteBackends(ids []uint32) error
	WaitReaders() error
}

// Reconciler makes the kernel's maps say what Services want. Order is everything: backends, slots of
// a new generation, then one word per frontend; what is no longer reachable goes to the garbage, which
// Collect deletes once no reader can still hold it.
//
// Every method may be repeated after an error and then does what is left. Apply, Delete and Prune are
// called by one goroutine; Collect may run beside them.
type Reconciler struct {
	store Store

	frontends   map[maps.ServiceKey]maps.Service // as last written, or found at start
	owners      map[maps.ServiceKey]string       // frontend -> name of the set that claimed it
	sets        map[string]*set                  // by name: wanted since this process started
	found       map[uint32]*set                  // by id: found at start, not yet claimed
	services    map[string][]string              // service -> names of its sets
	lastSet     uint32
	lastBackend uint32
	slots       int // written and not thrown away
	blocks      int // of tables
	backends    int

	mu      sync.Mutex
	garbage garbage
	signal  chan struct{}
}

// set is a backend set as the kernel has it.
type set struct {
	id        uint32
	lastGen   uint32
	settled   bool              // lastGen holds current and ranges
	current   []uint32          // backend ids of lastGen, in order
	ranges    []netip.Prefix    // clients that lastGen is for
	written   map[uint32]uint32 // generation -> slots written
	tables    map[uint32]int    // generation -> blocks of its consistent table written
	tabled    bool              // lastGen has a whole one
	ranged    map[uint32][]maps.SourceRangeKey
	backends  map[netip.AddrPort]uint32
	unwritten map[uint32]bool   // ids given but not surely written
	frontends []maps.ServiceKey // that may lead here
	affinity  uint32
	flags     uint32
	proto     uint8
}

type garbage struct {
	slots    []maps.SlotKey
	tables   []maps.SlotKey
	ranges   []maps.SourceRangeKey
	backends []uint32
}

func (g *garbage) empty() bool {
	return len(g.slots) == 0 && len(g.backends) == 0 && len(g.ranges) == 0 && len(g.tables) == 0
}

func newSet(id uint32) *set {
	return &set{
		id: id, written: map[uint32]uint32{}, tables: map[uint32]int{}, ranged: map[uint32][]maps.SourceRangeKey{},
		backends: map[netip.AddrPort]uint32{}, unwritten: map[uint32]bool{},
	}
}

// NewReconciler reads what an earlier process left, so that ids stay what they were.
func NewReconciler(store Store) (*Reconciler, error) {
	snap, err := store.ReadServices()
	if err != nil {
		return nil, err
	}
	r := &Reconciler{
		store:     store,
		frontends: snap.Services,
		owners:    map[maps.ServiceKey]string{},
		sets:      map[string]*set{},
		found:     map[uint32]*set{},
		services:  map[string][]string{},
		signal:    make(chan struct{}, 1),
	}
	get := func(id uint32) *set {
		s, ok := r.found[id]
		if !ok {
			s = newSet(id)
			r.found[id] = s
			r.lastSet = max(r.lastSet, id)
		}
		return s
	}
	for key := range snap.Slots {
		s := get(key.Service)
		s.written[key.Generation] = max(s.written[key.Generation], key.Slot+1)
		s.lastGen = max(s.lastGen, key.Generation)
	}
	for key := range snap.Tables {
		s := get(key.Service)
		s.tables[key.Generation] = max(s.tables[key.Generation], int(key.Slot)+1)
		s.lastGen = max(s.lastGen, key.Generation)
	}
	for key := range snap.Ranges {
		s := get(key.Service)
		s.ranged[key.Generation] = append(s.ranged[key.Generation], key)
		s.lastGen = max(s.lastGen, key.Generation)
	}
	for id, b := range snap.Backends {
		s := get(b.Service)
		addr := netip.AddrPortFrom(b.Addr.Addr(), b.Port.Number())
		if old, twice := s.backends[addr]; twice {
			// One of them was on its way out. Slots decide nothing here: both lead to the same place.
			r.garbage.backends = append(r.garbage.backends, min(old, id))
			id = max(old, id)
		}
		s.backends[addr] = id
		s.proto = b.Proto
		r.lastBackend = max(r.lastBackend, id)
	}
	for _, f := range snap.Services {
		s := get(f.ID)
		s.lastGen = max(s.lastGen, f.Generation)
	}
	for _, s := range r.found {
		s.recover(snap)
		r.backends += len(s.backends)
		for _, n := range s.written {
			r.slots += int(n)
		}
		for _, n := range s.tables {
			r.blocks += n
		}
	}
	return r, nil
}

// recover finds out whether the newest generation is whole and which backends it holds.
func (s *set) recover(snap maps.Snapshot) {
	for _, key := range s.ranged[s.lastGen] {
		s.ranges = append(s.ranges, key.Prefix())
	}
	slices.SortFunc(s.ranges, netip.Prefix.Compare)
	n := s.written[s.lastGen]
	for i := range n {
		id, ok := snap.Slots[maps.SlotKey{Service: s.id, Generation: s.lastGen, Slot: i}]
		if !ok {
			s.current = nil
			return
		}
		s.current = append(s.current, id)
	}
	s.tabled = s.hasTable(snap)
}

// Apply makes one service's sets so. key is its namespace/name.
func (r *Reconciler) Apply(key string, want []Set) error {
	var errs []error
	names := make([]string, 0, len(want))
	for i := range want {
		names = append(names, want[i].Name)
		if err := r.apply(&want[i]); err != nil {
			errs = append(errs, fmt.Errorf("service %s: %w", want[i].Name, err))
		}
	}
	// What the service had and has no more. Remembered until it succeeded.
	keep := names
	for _, name := range r.services[key] {
		if slices.Contains(names, name) {
			continue
		}
		if err := r.remove(name); err != nil {
			errs = append(errs, fmt.Errorf("service %s: %w", name, err))
			keep = append(keep, name)
		}
	}
	if len(keep) == 0 {
		delete(r.services, key)
	} else {
		r.services[key] = keep
	}
	return errors.Join(errs...)
}

func (r *Reconciler) apply(want *Set) error {
	s := r.claim(want)
	ids, fresh := r.backendIDs(s, want)
	if err := r.writeBackends(s, want, fresh); err != nil {
		return err
	}
	var full error
	if !s.settled || !slices.Equal(ids, s.current) || !slices.Equal(want.Ranges, s.ranges) || s.tabled != want.tabled() {
		var err error
		if full, err = r.writeGeneration(s, ids, want); err != nil {
			r.abandon(s)
			return err
		}
	}
	s.affinity, s.flags = want.AffinitySeconds, want.Flags
	if err := r.writeFrontends(s, want); err != nil {
		return err
	}
	r.discard(s, want)
	return full
}

// claim finds the set under its name, else the one its frontends led to before this process, else
// makes a new one.
func (r *Reconciler) claim(want *Set) *set {
	if s, ok := r.sets[want.Name]; ok {
		return s
	}
	var s *set
	for _, f := range want.Frontends {
		if old, ok := r.frontends[f.Key()]; ok {
			if s = r.found[old.ID]; s != nil && s.matches(want, old) {
				break
			}
			s = nil
		}
	}
	if s == nil {
		r.lastSet++
		s = newSet(r.lastSet)
	} else {
		delete(r.found, s.id)
		// A generation is adopted only if every frontend has it: else it is written anew.
		s.settled = s.current != nil || s.written[s.lastGen] == 0
		for _, f := range want.Frontends {
			v, ok := r.frontends[f.Key()]
			if !ok || v.ID != s.id || v.Generation != s.lastGen || int(v.Count) != len(s.current) {
				s.settled = false
			}
		}
	}
	s.proto = want.Proto
	r.sets[want.Name] = s
	return s
}

func (s *set) matches(want *Set, f maps.Service) bool {
	return (s.proto == 0 || s.proto == want.Proto) && f.Flags&maps.ServiceLocal == want.Flags&maps.ServiceLocal
}

func (r *Reconciler) backendIDs(s *set, want *Set) (ids []uint32, fresh []netip.AddrPort) {
	ids = make([]uint32, 0, len(want.Backends))
	for _, a := range want.Backends {
		id, ok := s.backends[a]
		if !ok {
			r.lastBackend++
			id = r.lastBackend
			s.backends[a] = id
			s.unwritten[id] = true
			r.backends++
		}
		if s.unwritten[id] {
			fresh = append(fresh, a)
		}
		ids = append(ids, id)
	}
	return ids, fresh
}

func (r *Reconciler) writeBackends(s *set, want *Set, fresh []netip.AddrPort) error {
	if len(fresh) == 0 {
		return nil
	}
	ids := make([]uint32, 0, len(fresh))
	values := make([]maps.Backend, 0, len(fresh))
	for _, a := range fresh {
		ids = append(ids, s.backends[a])
		values = append(values, maps.Backend{Addr: maps.AddressOf(a.Addr()), Port: maps.PortOf(a.Port()), Proto: want.Proto, Service: s.id})
	}
	if err := r.store.PutBackends(ids, values); err != nil {
		// What was written of them would take the room of sets that fit. No slot leads there yet.
		for _, a := range fresh {
			delete(s.unwritten, s.backends[a])
			delete(s.backends, a)
		}
		r.throw(garbage{backends: ids})
		return err
	}
	for _, id := range ids {
		delete(s.unwritten, id)
	}
	return nil
}

// writeGeneration writes slots under a number that was never used, as a failed write may have left
// some of them, or even a frontend that already leads to them.
//
// full says that there was no room for its consistent table: it works without.
func (r *Reconciler) writeGeneration(s *set, ids []uint32, want *Set) (full, err error) {
	ranges := want.Ranges
	s.settled = false
	s.lastGen++
	s.current, s.ranges, s.tabled = nil, nil, false
	s.written[s.lastGen] = uint32(len(ids))
	for _, p := range ranges {
		s.ranged[s.lastGen] = append(s.ranged[s.lastGen], maps.SourceRangeOf(s.id, s.lastGen, p))
	}
	r.slots += len(ids)
	keys := make([]maps.SlotKey, len(ids))
	for i := range keys {
		keys[i] = maps.SlotKey{Service: s.id, Generation: s.lastGen, Slot: uint32(i)}
	}
	if len(ranges) > 0 {
		if err := r.store.PutRanges(s.ranged[s.lastGen]); err != nil {
			return nil, err
		}
	}
	if len(ids) > 0 {
		if err := r.store.PutSlots(keys, ids); err != nil {
			return nil, err
		}
	}
	if want.tabled() {
		err := r.writeTable(s, ids, want.Backends)
		switch {
		case errors.Is(err, unix.E2BIG):
			full = err
			r.throw(garbage{tables: s.blocks(s.lastGen, s.tables[s.lastGen])})
			delete(s.tables, s.lastGen)
		case err != nil:
			return nil, err
		}
		s.tabled = err == nil
	}
	s.current, s.ranges, s.settled = ids, ranges, true
	return full, nil
}

// abandon throws away what was written of a generation that could not be written whole: no frontend leads there yet, and
// it would take the room of sets that fit.
func (r *Reconciler) abandon(s *set) {
	gen := s.lastGen
	g := garbage{tables: s.blocks(gen, s.tables[gen]), ranges: s.ranged[gen]}
	for i := range s.written[gen] {
		g.slots = append(g.slots, maps.SlotKey{Service: s.id, Generation: gen, Slot: i})
	}
	delete(s.written, gen)
	delete(s.tables, gen)
	delete(s.ranged, gen)
	r.throw(g)
}

func (r *Reconciler) writeFrontends(s *set, want *Set) error {
	wanted := make([]maps.ServiceKey, 0, len(want.Frontends))
	for _, f := range want.Frontends {
		key := f.Key()
		wanted = append(wanted, key)
		if !slices.Contains(s.frontends, key) {
			s.frontends = append(s.frontends, key)
		}
		v := maps.Service{
			Key: key, ID: s.id, Generation: s.lastGen, Count: uint32(len(s.current)),
			AffinitySeconds: s.affinity, Flags: s.flags,
		}
		if f.Ranged {
			v.Flags |= maps.ServiceRanges
		}
		if f.Maglev && s.tabled {
			v.Flags |= maps.ServiceMaglev
		}
		r.owners[key] = want.Name
		if r.frontends[key] == v {
			continue
		}
		if err := r.store.PutService(v); err != nil {
			r.frontends[key] = maps.Service{} // unknown: it may have been written
			return err
		}
		r.frontends[key] = v
	}
	for _, key := range s.frontends {
		if slices.Contains(wanted, key) {
			continue
		}
		if err := r.deleteFrontend(key, want.Name); err != nil {
			return err
		}
	}
	s.frontends = wanted
	return nil
}

// deleteFrontend removes one that the set called name has no more, unless another set took it over.
func (r *Reconciler) deleteFrontend(key maps.ServiceKey, name string) error {
	if r.owners[key] != name {
		return nil
	}
	if err := r.store.DeleteService(key); err != nil {
		r.frontends[key] = maps.Service{} // unknown: it may be gone
		return err
	}
	delete(r.frontends, key)
	delete(r.owners, key)
	return nil
}

// discard throws away what no frontend leads to any more: older generations, and backends that are
// in none of the wanted ones.
func (r *Reconciler) discard(s *set, want *Set) {
	var g garbage
	for gen, n := range s.written {
		if gen == s.lastGen {
			continue
		}
		for i := range n {
			g.slots = append(g.slots, maps.SlotKey{Service: s.id, Generation: gen, Slot: i})
		}
		delete(s.written, gen)
	}
	for gen, n := range s.tables {
		if gen != s.lastGen {
			g.tables = append(g.tables, s.blocks(gen, n)...)
			delete(s.tables, gen)
		}
	}
	for gen, keys := range s.ranged {
		if gen != s.lastGen {
			g.ranges = append(g.ranges, keys...)
			delete(s.ranged, gen)
		}
	}
	if len(s.backends) != len(want.Backends) {
		live := map[uint32]bool{}
		for _, id := range s.current {
			live[id] = true
		}
		for a, id := range s.backends {
			if !live[id] {
				g.backends = append(g.backends, id)
				delete(s.backends, a)
				delete(s.unwritten, id)
			}
		}
	}
	r.throw(g)
}

func (r *Reconciler) remove(name string) error {
	s, ok := r.sets[name]
	if !ok {
		return nil
	}
	for _, key := range s.frontends {
		if err := r.deleteFrontend(key, name); err != nil {
			return err
		}
	}
	delete(r.sets, name)
	r.throw(s.all())
	return nil
}

// all that a set has in the maps.
func (s *set) all() garbage {
	var g garbage
	for gen, n := range s.written {
		for i := range n {
			g.slots = append(g.slots, maps.SlotKey{Service: s.id, Generation: gen, Slot: i})
		}
	}
	for gen, n := range s.tables {
		g.tables = append(g.tables, s.blocks(gen, n)...)
	}
	for _, keys := range s.ranged {
		g.ranges = append(g.ranges, keys...)
	}
	for _, id := range s.backends {
		g.backends = append(g.backends, id)
	}
	return g
}

// Prune removes what an earlier process left and nobody has claimed. Call it when every Service has
// been applied once.
func (r *Reconciler) Prune() error {
	for key := range r.frontends {
		if _, owned := r.owners[key]; owned {
			continue
		}
		if err := r.store.DeleteService(key); err != nil {
			r.frontends[key] = maps.Service{}
			return fmt.Errorf("removing frontend %s:%d of an earlier run: %w", key.Addr.Addr(), key.Port.Number(), err)
		}
		delete(r.frontends, key)
	}
	for id, s := range r.found {
		r.throw(s.all())
		delete(r.found, id)
	}
	return nil
}

func (r *Reconciler) throw(g garbage) {
	if g.empty() {
		return
	}
	r.slots -= len(g.slots)
	r.blocks -= len(g.tables)
	r.backends -= len(g.backends)
	r.again(g)
}

func (r *Reconciler) again(g garbage) {
	r.mu.Lock()
	r.garbage.slots = append(r.garbage.slots, g.slots...)
	r.garbage.tables = append(r.garbage.tables, g.tables...)
	r.garbage.ranges = append(r.garbage.ranges, g.ranges...)
	r.garbage.backends = append(r.garbage.backends, g.backends...)
	r.mu.Unlock()
	select {
	case r.signal <- struct{}{}:
	default:
	}
}

// Garbage gets a value when there is something for Collect.
func (r *Reconciler) Garbage() <-chan struct{} { return r.signal }

// Collect waits until no program can still read what was thrown away, then deletes it.
func (r *Reconciler) Collect() error {
	r.mu.Lock()
	g := r.garbage
	r.garbage = garbage{}
	r.mu.Unlock()
	if g.empty() {
		return nil
	}
	err := r.store.WaitReaders()
	if err == nil {
		err = r.store.DeleteSlots(g.slots)
	}
	if err == nil {
		g.slots = nil
		err = r.store.DeleteTable(g.tables)
	}
	if err == nil {
		g.tables = nil
		err = r.store.DeleteRanges(g.ranges)
	}
	if err == nil {
		g.ranges = nil
		err = r.store.DeleteBackends(g.backends)
	}
	if err != nil {
		r.again(g)
		return fmt.Errorf("removing old slots and backends: %w", err)
	}
	return nil
}

// Size counts what is in the maps, for the metric of their pressure.
func (r *Reconciler) Size() (services, slots, blocks, backends int) {
	return len(r.frontends), r.slots, r.blocks, r.backends
}
