// SPDX-License-Identifier: Apache-2.0

// Package services turns Services and EndpointSlices into what the kernel's maps must hold, writes
// what differs, and answers the same question to the ingress.
package services

import (
	"net/netip"
	"sync"

	networkingv1 "k8s.io/api/networking/v1"
)

// Table answers which addresses serve a port. Reading takes no lock.
type Table struct {
	services sync.Map // "namespace/name" -> []Port

	mu          sync.Mutex
	subscribers map[chan struct{}]struct{}
}

// NewTable is an empty table.
func NewTable() *Table {
	return &Table{subscribers: map[chan struct{}]struct{}{}}
}

// Lookup gives the ready addresses of a Service's port, those that terminate but still serve if none
// is ready. found says whether Service and port exist. The result must not be changed.
func (t *Table) Lookup(namespace, service string, port networkingv1.ServiceBackendPort) (addrs []netip.AddrPort, found bool) {
	v, ok := t.services.Load(namespace + "/" + service)
	if !ok {
		return nil, false
	}
	for _, p := range v.([]Port) {
		if port.Name != "" && p.Name == port.Name || port.Name == "" && p.Number == port.Number {
			return p.Addrs, true
		}
	}
	return nil, false
}

// Subscribe gives a channel that gets a value after every change, changes that come faster than they
// are read being joined. cancel ends it.
func (t *Table) Subscribe() (changed <-chan struct{}, cancel func()) {
	ch := make(chan struct{}, 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.subscribers[ch] = struct{}{}
	return ch, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.subscribers, ch)
	}
}

func (t *Table) set(key string, ports []Port) {
	t.services.Store(key, ports)
	t.notify()
}

func (t *Table) delete(key string) {
	t.services.Delete(key)
	t.notify()
}

func (t *Table) notify() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for ch := range t.subscribers {
		select {
		case ch <- struct{}{}:
		default: // one is waiting to be read
		}
	}
}
