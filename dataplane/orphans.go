// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
)

// servicesStore is where services are written to. It tells when UDP backends have gone.
type servicesStore struct {
	*maps.Maps
	gone chan struct{} // gets a value; those that come faster than they are read are joined

	mu  sync.Mutex // backends are deleted beside other writes
	udp map[uint32]struct{}
}

func newServicesStore(m *maps.Maps) *servicesStore {
	return &servicesStore{Maps: m, gone: make(chan struct{}, 1), udp: map[uint32]struct{}{}}
}

// ReadServices also learns which backends of an earlier process are UDP.
func (s *servicesStore) ReadServices() (maps.Snapshot, error) {
	snap, err := s.Maps.ReadServices()
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, b := range snap.Backends {
		if b.Proto == maps.UDP {
			s.udp[id] = struct{}{}
		}
	}
	return snap, err
}

// PutBackends notes which are UDP.
func (s *servicesStore) PutBackends(ids []uint32, values []maps.Backend) error {
	s.mu.Lock()
	for i, id := range ids {
		if values[i].Proto == maps.UDP {
			s.udp[id] = struct{}{}
		}
	}
	s.mu.Unlock()
	return s.Maps.PutBackends(ids, values)
}

// DeleteBackends tells of those that were UDP.
func (s *servicesStore) DeleteBackends(ids []uint32) error {
	if err := s.Maps.DeleteBackends(ids); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.udp)
	for _, id := range ids {
		delete(s.udp, id)
	}
	if len(s.udp) != before {
		s.tell()
	}
	return nil
}

func (s *servicesStore) tell() {
	select {
	case s.gone <- struct{}{}:
	default:
	}
}

func newDestroyed() prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name: "skep_dataplane_udp_sockets_destroyed_total",
		Help: "UDP sockets that were destroyed because the backend they were given has gone.",
	})
}

// watchOrphans destroys UDP sockets whose backend has gone, whenever one has, until ctx ends.
func (d *Dataplane) watchOrphans(ctx context.Context) {
	o, err := d.loader.LoadOrphans()
	if err != nil {
		d.cfg.Log.Warn("UDP sockets of backends that go away are not destroyed: their owners learn of it by their own time-outs", "err", err)
		return
	}
	defer o.Close()
	select { // before, nobody knows which backends are wanted
	case <-d.synced:
		d.store.tell() // what an earlier process had no time for
	case <-ctx.Done():
		return
	}
	for {
		select {
		case <-d.store.gone:
		case <-ctx.Done():
			return
		}
		for delay := 10 * time.Millisecond; ; delay = min(delay*2, 30*time.Second) {
			err := d.destroyOrphans(o)
			if err == nil {
				break
			}
			d.cfg.Log.Error("UDP sockets of backends that are gone stay, will retry", "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(delay):
			}
		}
	}
}

func (d *Dataplane) destroyOrphans(o *loader.Orphans) error {
	cookies, err := d.orphaned(o)
	if err != nil {
		return err
	}
	var errs []error
	for cookie := range cookies {
		destroy, name := o.Destroy, "the node"
		if cookie != d.loader.NetnsCookie() {
			var path string
			if path, name = d.names.netns(cookie); path == "" {
				d.cfg.Log.Debug("a UDP socket of a backend that is gone is in a network namespace that skep does not know", "cookie", cookie)
				continue
			}
			destroy = func() (int, error) { return destroyIn(path, o) }
		}
		n, err := destroy()
		if n > 0 {
			d.destroyed.Add(float64(n))
			d.cfg.Log.Info("destroyed UDP sockets whose backend is gone", "of", name, "sockets", n)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a namespace that is gone has no sockets
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// orphaned are the network namespaces that have orphans, by their cookies; all, where the kernel does not tell.
func (d *Dataplane) orphaned(o *loader.Orphans) (map[uint64]bool, error) {
	if o.Finds() {
		return o.Find()
	}
	all := d.names.namespaces()
	all[d.loader.NetnsCookie()] = true
	return all, nil
}

// destroyIn enters a network namespace with a thread that ends with it.
func destroyIn(path string, o *loader.Orphans) (n int, err error) {
	ns, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("entering %s: %w", path, err)
			return
		}
		n, err = o.Destroy()
	}()
	<-done
	return n, err
}
