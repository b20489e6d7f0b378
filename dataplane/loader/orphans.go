// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"skep.io/skep/bpf"
)

// Orphans finds and destroys UDP sockets whose backend has gone (bpf/orphans.c).
type Orphans struct {
	find    *link.Iter // nil where the kernel does not let it be
	destroy *link.Iter
}

const findOrphans = "find_orphans"

// LoadOrphans loads the iterators. They need Linux 6.5 with its type information: without, the error says
// so, and everything else works.
func (l *Loader) LoadOrphans() (*Orphans, error) {
	spec, err := bpf.LoadOrphans()
	if err != nil {
		return nil, fmt.Errorf("object orphans: %w", err)
	}
	return l.loadOrphans(spec)
}

func (l *Loader) loadOrphans(spec *ebpf.CollectionSpec) (*Orphans, error) {
	dir := filepath.Join(l.cfg.Dir, l.dir)
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: dir}})
	if _, both := spec.Programs[findOrphans]; both && errors.Is(err, unix.EPERM) {
		// Hardened kernels refuse iterators over what maps hold, and allow those over sockets.
		spec = spec.Copy()
		delete(spec.Programs, findOrphans)
		return l.loadOrphans(spec)
	}
	if err != nil {
		return nil, fmt.Errorf("loading orphans programs (Linux 6.5 or later is needed): %w", err)
	}
	defer coll.Close() // the links hold what they need
	o := &Orphans{}
	if find := coll.Programs[findOrphans]; find != nil {
		o.find, err = link.AttachIter(link.IterOptions{Program: find, Map: coll.Maps["socket_peers"]})
	}
	if err == nil {
		o.destroy, err = link.AttachIter(link.IterOptions{Program: coll.Programs["destroy_orphans"]})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("iterators over sockets: %w", err), o.Close())
	}
	return o, nil
}

// Finds tells whether this kernel lets Find tell where orphans are. Without, they are to be looked for everywhere.
func (o *Orphans) Finds() bool { return o.find != nil }

// Find gives the cookies of the network namespaces that have orphans.
func (o *Orphans) Find() (map[uint64]bool, error) {
	out := map[uint64]bool{}
	r, err := o.find.Open()
	if err != nil {
		return nil, fmt.Errorf("iterator over sockets: %w", err)
	}
	defer r.Close()
	var cookie [8]byte
	for {
		_, err := io.ReadFull(r, cookie[:])
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, fmt.Errorf("iterator over sockets: %w", err)
		}
		out[binary.NativeEndian.Uint64(cookie[:])] = true
	}
}

// Destroy destroys the orphans of the network namespace that the calling thread is in. Returns how many.
func (o *Orphans) Destroy() (n int, err error) {
	r, err := o.destroy.Open()
	if err != nil {
		return 0, fmt.Errorf("iterator over UDP sockets: %w", err)
	}
	defer r.Close()
	buf := make([]byte, 4096)
	for {
		k, err := r.Read(buf)
		n += k
		if errors.Is(err, io.EOF) || err == nil && k == 0 {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("iterator over UDP sockets: %w", err)
		}
	}
}

// Close releases the iterators.
func (o *Orphans) Close() error {
	var errs []error
	for _, it := range []*link.Iter{o.find, o.destroy} {
		if it != nil {
			errs = append(errs, it.Close())
		}
	}
	return errors.Join(errs...)
}
