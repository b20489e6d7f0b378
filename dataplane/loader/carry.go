// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"skep.io/skep/dataplane/maps"
)

// Maps of one layout are pinned in one directory, whose name says the layout. A process that starts with another finds the
// older directory beside its own: what looks the same is shared, what can be converted is copied, and the rest is
// made anew. Programs of the older process run on until they are replaced, so connections are copied once more then.

const mapsPrefix = "maps-"

// directory is where maps are pinned, and the LayoutVersion they were written under.
type directory struct {
	path    string
	version int
}

// directoryName of a layout.
func directoryName(specs []*ebpf.CollectionSpec) string {
	return fmt.Sprintf("%s%d-%s", mapsPrefix, maps.LayoutVersion, layout(specs))
}

// older lists directories of other layouts, the newest first. Version 1 was not always in their names.
func (c Config) older(current string) ([]directory, error) {
	entries, err := os.ReadDir(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("pinned maps: %w", err)
	}
	type dated struct {
		directory
		at int64
	}
	var found []dated
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), mapsPrefix)
		if !ok || e.Name() == current {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // gone meanwhile
		}
		d := dated{directory{filepath.Join(c.Dir, e.Name()), 1}, info.ModTime().UnixNano()}
		if version, _, ok := strings.Cut(rest, "-"); ok {
			if d.version, err = strconv.Atoi(version); err != nil {
				continue // half made, or none of ours
			}
		}
		found = append(found, d)
	}
	slices.SortFunc(found, func(a, b dated) int { return cmp.Compare(b.at, a.at) })
	out := make([]directory, 0, len(found))
	for _, d := range found {
		out = append(out, d.directory)
	}
	return out, nil
}

// unfinished is where a directory is made that shares maps; it gets its name when all are in it.
const unfinished = mapsPrefix + "new-unfinished"

// share makes the directory of this layout, with those of the older maps in it that look as this layout wants them.
func (c Config) share(name string, specs []*ebpf.CollectionSpec, older []directory) error {
	path, made := filepath.Join(c.Dir, name), filepath.Join(c.Dir, unfinished)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.RemoveAll(made); err != nil {
		return fmt.Errorf("what an earlier start left: %w", err)
	}
	if err := os.Mkdir(made, 0o700); err != nil {
		return fmt.Errorf("directory for pins: %w", err)
	}
	all := pinned(specs)
	for _, d := range older {
		same, err := alike(all, d)
		if err != nil {
			return err
		}
		for _, s := range same {
			if err := pinAgain(filepath.Join(d.path, s.Name), filepath.Join(made, s.Name)); err != nil {
				return err
			}
		}
		if len(same) > 0 {
			break
		}
	}
	if err := os.Rename(made, path); err != nil {
		return fmt.Errorf("directory for pins: %w", err)
	}
	return nil
}

// alike are those of a directory's maps that look as this layout wants them. What the agent writes is among them only if all of
// it does: programs that run on read the rest of it in maps of their own, and what is deleted from one they share would be
// missing there.
func alike(all []*ebpf.MapSpec, d directory) (same []*ebpf.MapSpec, err error) {
	if d.version != maps.LayoutVersion {
		return nil, nil
	}
	whole := true
	for _, s := range all {
		m, err := ebpf.LoadPinnedMap(filepath.Join(d.path, s.Name), nil)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			whole = whole && !isDesired(s.Name)
			continue
		case err != nil:
			return nil, fmt.Errorf("pinned map %s of %s: %w", s.Name, d.path, err)
		}
		if s.Compatible(m) == nil {
			same = append(same, s)
		} else if isDesired(s.Name) {
			whole = false
		}
		m.Close()
	}
	if !whole {
		same = slices.DeleteFunc(same, func(s *ebpf.MapSpec) bool { return isDesired(s.Name) })
	}
	return same, nil
}

// pinAgain gives a pinned map another pin.
func pinAgain(from, to string) error {
	m, err := ebpf.LoadPinnedMap(from, nil)
	if err != nil {
		return fmt.Errorf("pinned map %s: %w", from, err)
	}
	defer m.Close()
	another, err := m.Clone() // a clone is pinned nowhere: pinning m itself would move its pin
	if err != nil {
		return fmt.Errorf("pinned map %s: %w", from, err)
	}
	defer another.Close()
	if err := another.Pin(to); err != nil {
		return fmt.Errorf("pinning map %s: %w", to, err)
	}
	return nil
}

// pinned are the maps that outlive the process, each once.
func pinned(specs []*ebpf.CollectionSpec) (out []*ebpf.MapSpec) {
	seen := map[string]bool{}
	for _, s := range specs {
		for name, m := range s.Maps {
			if m.Pinning == ebpf.PinByName && !seen[name] {
				seen[name] = true
				out = append(out, m)
			}
		}
	}
	return out
}

// carry copies from older maps what this layout understands, and keeps what is here already. It returns the maps of which
// nothing could be copied although one is there.
func (l *Loader) carry(older []directory, only func(name string) bool) (lost []string, err error) {
	var errs []error
	for name, to := range l.pinned {
		if !only(name) {
			continue
		}
		for _, d := range older {
			ok, err := l.carryMap(name, d, to)
			if err != nil {
				errs = append(errs, fmt.Errorf("map %s of an older layout (%s): %w", name, d.path, err))
			}
			if !ok {
				lost = append(lost, name)
			}
		}
	}
	slices.Sort(lost)
	return slices.Compact(lost), errors.Join(errs...)
}

func (l *Loader) carryMap(name string, d directory, to *ebpf.Map) (ok bool, err error) {
	from, err := ebpf.LoadPinnedMap(filepath.Join(d.path, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return !isDesired(name), nil // that version had none
	}
	if err != nil {
		return false, err
	}
	defer from.Close()
	if same, err := sameMap(from, to); err != nil || same {
		return err == nil, err
	}
	convert := maps.Converter(name, maps.Layout{Version: d.version, Key: from.KeySize(), Value: from.ValueSize()},
		maps.Layout{Version: maps.LayoutVersion, Key: to.KeySize(), Value: to.ValueSize()})
	if convert == nil || !isTable(from.Type()) || !isTable(to.Type()) {
		return false, nil
	}
	flags := ebpf.UpdateNoExist
	if to.Type() == ebpf.Array {
		flags = ebpf.UpdateAny // all of its entries exist
	}
	var copied, missed uint64
	var key, value []byte
	it := from.Iterate()
	for it.Next(&key, &value) {
		k, v := convert(key, value)
		switch err := to.Update(k, v, flags); {
		case err == nil:
			copied++
		case errors.Is(err, ebpf.ErrKeyExist):
		default:
			missed++ // it is full, or an array is shorter: what is there works, and is complete soon
		}
	}
	l.cfg.Log.Info("entries of an older layout were taken over", "map", name, "copied", copied, "missed", missed)
	if err := l.countTakenOver(name, copied); err != nil {
		return false, err
	}
	// LRU maps change while they are read; that an iteration gave up says so and no more.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return false, err
	}
	return true, nil
}

// countTakenOver makes copied flows count as noted ones: evictions are found by what was noted and is there no more.
func (l *Loader) countTakenOver(name string, copied uint64) error {
	var ctx struct{ TCP, UDP uint64 }
	switch name {
	case "conntrack_tcp":
		ctx.TCP = copied
	case "conntrack_udp":
		ctx.UDP = copied
	}
	if ctx.TCP+ctx.UDP == 0 {
		return nil
	}
	if _, err := l.programs["count_taken_over"].Run(&ebpf.RunOptions{Context: ctx}); err != nil {
		return fmt.Errorf("counting flows of %s that were taken over: %w", name, err)
	}
	return nil
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	one, err := a.Info()
	if err != nil {
		return false, err
	}
	other, err := b.Info()
	if err != nil {
		return false, err
	}
	x, _ := one.ID()
	y, _ := other.ID()
	return x == y, nil
}

// isTable: entries that can be read and written from here, and that mean the same in another map.
func isTable(t ebpf.MapType) bool {
	return t == ebpf.Hash || t == ebpf.LRUHash || t == ebpf.LPMTrie || t == ebpf.Array
}

// isConnection: entries that programs make, and nobody else could again.
func isConnection(name string) bool {
	return name == "conntrack_tcp" || name == "conntrack_udp" || name == "affinity"
}

// isDesired: entries that the agent writes from what the API says; until it has, programs find nothing there.
func isDesired(name string) bool {
	switch name {
	case "services", "slots", "tables", "backends", "source_ranges", "node_ports", "announced", "endpoints", "clients",
		"policy", "identities", "policy_slots", "policy_state", "policy_drops":
		return true
	}
	return false
}

// Holds says that programs of an earlier process are left where they are, because their maps say what this layout's do
// not yet say. Release replaces them.
func (l *Loader) Holds() bool { return l.held != nil }

// Release puts this process's programs in the place of those that were left, and takes over what they noted meanwhile. Call it
// when the maps say all that they should.
func (l *Loader) Release() error {
	held := l.held
	l.held = nil
	var errs []error
	for name, attach := range held {
		if _, err := os.Stat(filepath.Join(l.cfg.links(), name)); err == nil { // its device may have gone
			errs = append(errs, attach())
		}
	}
	return errors.Join(errs...)
}

// RemoveOldMaps deletes maps of other layouts, after a last look for connections in them. Call it once every hook has the
// new programs.
func (l *Loader) RemoveOldMaps() error {
	older, err := l.cfg.older(l.dir)
	if err != nil {
		return err
	}
	_, err = l.carry(older, isConnection)
	errs := []error{err, os.RemoveAll(filepath.Join(l.cfg.Dir, unfinished))}
	for _, d := range older {
		l.cfg.Log.Info("removing maps of another layout", "dir", d.path)
		errs = append(errs, os.RemoveAll(d.path))
	}
	return errors.Join(errs...)
}
