// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Snapshot is everything the services' maps hold.
type Snapshot struct {
	Services map[ServiceKey]Service
	Slots    map[SlotKey]uint32
	Tables   map[SlotKey]bool // blocks
	Backends map[uint32]Backend
	Ranges   map[SourceRangeKey]uint32
}

// ReadServices reads the services' maps.
func (m *Maps) ReadServices() (s Snapshot, err error) {
	if s.Services, err = dump[ServiceKey, Service](m.services); err != nil {
		return s, fmt.Errorf("services: %w", err)
	}
	if s.Slots, err = dump[SlotKey, uint32](m.slots); err != nil {
		return s, fmt.Errorf("slots: %w", err)
	}
	blocks, err := dump[SlotKey, TableBlock](m.tables)
	if err != nil {
		return s, fmt.Errorf("tables: %w", err)
	}
	s.Tables = make(map[SlotKey]bool, len(blocks))
	for k := range blocks {
		s.Tables[k] = true
	}
	if s.Backends, err = dump[uint32, Backend](m.backends); err != nil {
		return s, fmt.Errorf("backends: %w", err)
	}
	if s.Ranges, err = walk[SourceRangeKey, uint32](m.sourceRanges); err != nil {
		return s, fmt.Errorf("source ranges: %w", err)
	}
	for k := range s.Services {
		if err := m.claimPort(k); err != nil {
			return s, err
		}
	}
	return s, nil
}

// PutService swaps one frontend's entry.
func (m *Maps) PutService(v Service) error {
	if err := m.claimPort(v.Key); err != nil {
		return err
	}
	if err := m.services.Put(&v.Key, &v); err != nil {
		return full("services", err)
	}
	return nil
}

// DeleteService removes a frontend. That it is not there is no error.
func (m *Maps) DeleteService(k ServiceKey) error {
	if err := gone(m.services.Delete(&k)); err != nil {
		return err
	}
	return m.releasePort(k)
}

// claimPort sets the port's bit in node_ports, which programs look at before they look for a frontend
// under the unspecified address.
func (m *Maps) claimPort(k ServiceKey) error {
	if !k.Addr.Addr().IsUnspecified() {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	port := k.Port.Number()
	if m.onNode[port] == nil {
		if err := m.setPort(port, true); err != nil {
			return err
		}
		m.onNode[port] = map[ServiceKey]bool{}
	}
	m.onNode[port][k] = true
	return nil
}

// releasePort clears the bit when the last frontend of its port is gone.
func (m *Maps) releasePort(k ServiceKey) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	port := k.Port.Number()
	if !m.onNode[port][k] {
		return nil
	}
	if len(m.onNode[port]) == 1 {
		if err := m.setPort(port, false); err != nil {
			return err
		}
		delete(m.onNode, port)
		return nil
	}
	delete(m.onNode[port], k)
	return nil
}

func (m *Maps) setPort(port uint16, on bool) error {
	word, bits := uint32(port>>6), uint64(0)
	err := m.nodePorts.Lookup(&word, &bits)
	if err == nil {
		if bits &^= 1 << (port & 63); on {
			bits |= 1 << (port & 63)
		}
		err = m.nodePorts.Put(&word, &bits)
	}
	if err != nil {
		return fmt.Errorf("port %d of the node: %w", port, err)
	}
	return nil
}

// PutRanges writes the clients that a generation is for.
func (m *Maps) PutRanges(keys []SourceRangeKey) error {
	for i := range keys {
		if err := m.sourceRanges.Put(&keys[i], uint32(1)); err != nil {
			return full("source_ranges", err)
		}
	}
	return nil
}

// DeleteRanges removes them. That one is not there is no error.
func (m *Maps) DeleteRanges(keys []SourceRangeKey) error {
	for i := range keys {
		if err := gone(m.sourceRanges.Delete(&keys[i])); err != nil {
			return fmt.Errorf("source range %s: %w", keys[i].Prefix(), err)
		}
	}
	return nil
}

// PutBackends writes backends by id.
func (m *Maps) PutBackends(ids []uint32, values []Backend) error {
	return put(m.backends, "backends", ids, values)
}

// PutSlots writes a generation's slots.
func (m *Maps) PutSlots(keys []SlotKey, values []uint32) error {
	return put(m.slots, "slots", keys, values)
}

// PutTable writes blocks of a generation's consistent table.
func (m *Maps) PutTable(keys []SlotKey, values []TableBlock) error {
	return put(m.tables, "tables", keys, values)
}

// DeleteTable removes blocks. That one is not there is no error.
func (m *Maps) DeleteTable(keys []SlotKey) error {
	for i := range keys {
		if err := gone(m.tables.Delete(&keys[i])); err != nil {
			return fmt.Errorf("table %v: %w", keys[i], err)
		}
	}
	return nil
}

// DeleteBackends removes backends. That one is not there is no error.
func (m *Maps) DeleteBackends(ids []uint32) error {
	for i := range ids {
		if err := gone(m.backends.Delete(&ids[i])); err != nil {
			return fmt.Errorf("backend %d: %w", ids[i], err)
		}
	}
	return nil
}

// DeleteSlots removes slots. That one is not there is no error.
func (m *Maps) DeleteSlots(keys []SlotKey) error {
	for i := range keys {
		if err := gone(m.slots.Delete(&keys[i])); err != nil {
			return fmt.Errorf("slot %v: %w", keys[i], err)
		}
	}
	return nil
}

// WaitReaders returns when every program that was running has ended, so that what was unlinked
// before has no reader left. The kernel promises this of an update of a map of maps
// (maybe_wait_bpf_programs), which is all that the fence is for.
func (m *Maps) WaitReaders() error {
	if err := m.fence.Put(uint32(0), m.node); err != nil {
		return fmt.Errorf("waiting for programs to leave old entries: %w", err)
	}
	return nil
}

func put[K, V any](m *ebpf.Map, name string, keys []K, values []V) error {
	switch len(keys) {
	case 0:
		return nil
	case 1:
		return full(name, m.Put(&keys[0], &values[0]))
	}
	_, err := m.BatchUpdate(keys, values, nil)
	return full(name, err)
}

// takers are whose number decides how full a map is.
var takers = map[string]string{
	"services": "services or ports of them", "slots": "endpoints of services", "tables": "endpoints of services that are chosen consistently",
	"backends": "endpoints of services", "source_ranges": "loadBalancerSourceRanges", "announced": "addresses of load balancers, or devices of this node,",
	"endpoints": "pods on this node", "clients": "pods on this node", "node_addresses": "addresses on the node's devices",
	"ranges": "ranges of pods and services", "policy": "rules of policies, or kinds of pods that they tell apart,",
	"identities": "IP blocks in policies, or pods that policies tell apart,", "policy_drops": "combinations of policies on this node's pods",
}

func full(name string, err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("map %s is full: fewer %s are needed: %w", name, takers[name], err)
	}
	if err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	return nil
}

func gone(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
