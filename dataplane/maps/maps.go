// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Maps are the pinned maps. Methods may be called from several goroutines; two writers of the same
// table would not see each other.
type Maps struct {
	services, slots, backends *ebpf.Map
	tables                    *ebpf.Map
	sourceRanges, nodePorts   *ebpf.Map
	affinity, clients         *ebpf.Map
	announced                 *ebpf.Map
	endpoints, nodeAddresses  *ebpf.Map
	node, ranges              *ebpf.Map
	conntrackTCP              *ebpf.Map
	conntrackUDP              *ebpf.Map
	counters                  *ebpf.Map
	listeners                 *ebpf.Map
	policy, identities        *ebpf.Map
	policySlots, policyState  *ebpf.Map
	policyDrops               *ebpf.Map
	flowEvents, flowFollowers *ebpf.Map

	fence *ebpf.Map // not pinned, see WaitReaders

	mu     sync.Mutex
	onNode map[uint16]map[ServiceKey]bool // frontends under unspecified addresses, by port
}

// Names lists the maps, as the C sources name them.
var names = []string{"services", "slots", "tables", "backends", "source_ranges", "node_ports", "affinity", "clients", "announced", "endpoints", "node_addresses", "node", "ranges",
	"conntrack_tcp", "conntrack_udp", "counters", "listeners", "policy", "identities", "policy_slots", "policy_state", "policy_drops",
	"flow_events", "flow_followers"}

// New takes handles of its own from maps by name.
func New(byName map[string]*ebpf.Map) (*Maps, error) {
	m := &Maps{onNode: map[uint16]map[ServiceKey]bool{}}
	for i, dst := range m.all() {
		src, ok := byName[names[i]]
		if !ok {
			m.Close()
			return nil, fmt.Errorf("no map %q among those loaded", names[i])
		}
		clone, err := src.Clone()
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("map %q: %w", names[i], err)
		}
		*dst = clone
	}
	inner := &ebpf.MapSpec{Type: m.node.Type(), KeySize: m.node.KeySize(), ValueSize: m.node.ValueSize(), MaxEntries: m.node.MaxEntries()}
	fence, err := ebpf.NewMap(&ebpf.MapSpec{Name: "fence", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("fence: %w", err)
	}
	m.fence = fence
	return m, nil
}

func (m *Maps) all() []**ebpf.Map {
	return []**ebpf.Map{&m.services, &m.slots, &m.tables, &m.backends, &m.sourceRanges, &m.nodePorts, &m.affinity, &m.clients, &m.announced, &m.endpoints, &m.nodeAddresses,
		&m.node, &m.ranges, &m.conntrackTCP, &m.conntrackUDP, &m.counters, &m.listeners,
		&m.policy, &m.identities, &m.policySlots, &m.policyState, &m.policyDrops,
		&m.flowEvents, &m.flowFollowers}
}

// Close releases the handles; pinned maps stay.
func (m *Maps) Close() {
	for _, p := range m.all() {
		if *p != nil {
			(*p).Close()
		}
	}
	if m.fence != nil {
		m.fence.Close()
	}
}

// Capacity is the number of entries that fit, by map name.
func (m *Maps) Capacity() map[string]uint32 {
	out := map[string]uint32{}
	for i, p := range m.all() {
		out[names[i]] = (*p).MaxEntries()
	}
	return out
}

// Counted are the maps whose entries Count counts: small ones, which no table of this process counts.
var Counted = []string{"announced", "clients", "node_addresses", "ranges", "source_ranges"}

// Count counts the entries of a map, by asking the kernel for each.
func (m *Maps) Count(name string) (n int, err error) {
	counted := map[string]*ebpf.Map{
		"announced": m.announced, "clients": m.clients, "node_addresses": m.nodeAddresses, "ranges": m.ranges, "source_ranges": m.sourceRanges,
	}[name]
	var key any // nil is before the first
	for {
		next, err := counted.NextKeyBytes(key)
		if err != nil {
			return 0, fmt.Errorf("map %s: %w", name, err)
		}
		if next == nil || n > int(counted.MaxEntries()) { // one that changes meanwhile may start anew
			return n, nil
		}
		key = next
		n++
	}
}

// SetEndpoint makes a pod's address known.
func (m *Maps) SetEndpoint(a netip.Addr, e Endpoint) error {
	key := AddressOf(a)
	if err := full("endpoints", m.endpoints.Put(&key, &e)); err != nil {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	return nil
}

// Endpoint finds the pod that has an address; ok is false if none has.
func (m *Maps) Endpoint(a netip.Addr) (e Endpoint, ok bool, err error) {
	key := AddressOf(a)
	switch err := m.endpoints.Lookup(&key, &e); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return e, false, nil
	case err != nil:
		return e, false, fmt.Errorf("endpoint %s: %w", a, err)
	}
	return e, true, nil
}

// DeleteEndpoint forgets a pod's address if it is still that of the device ifindex.
func (m *Maps) DeleteEndpoint(a netip.Addr, ifindex uint32) error {
	key := AddressOf(a)
	var e Endpoint
	err := m.endpoints.Lookup(&key, &e)
	if errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && e.Ifindex != ifindex {
		return nil
	}
	if err == nil {
		err = m.endpoints.Delete(&key)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	return nil
}

// Endpoints lists all pods' addresses.
func (m *Maps) Endpoints() (map[netip.Addr]Endpoint, error) {
	all, err := dump[Address, Endpoint](m.endpoints)
	if err != nil {
		return nil, fmt.Errorf("endpoints: %w", err)
	}
	out := make(map[netip.Addr]Endpoint, len(all))
	for k, v := range all {
		out[k.Addr()] = v
	}
	return out, nil
}

// SetClient says who is in a network namespace.
func (m *Maps) SetClient(cookie uint64, c Client) error {
	if err := full("clients", m.clients.Put(&cookie, &c)); err != nil {
		return fmt.Errorf("network namespace %d: %w", cookie, err)
	}
	return nil
}

// DeleteClient forgets a network namespace.
func (m *Maps) DeleteClient(cookie uint64) error {
	if err := gone(m.clients.Delete(&cookie)); err != nil {
		return fmt.Errorf("network namespace %d: %w", cookie, err)
	}
	return nil
}

// Clients lists the network namespaces that are known.
func (m *Maps) Clients() (map[uint64]Client, error) {
	all, err := dump[uint64, Client](m.clients)
	if err != nil {
		return nil, fmt.Errorf("clients: %w", err)
	}
	return all, nil
}

// SetAnnounced makes the node answer for an address on a device.
func (m *Maps) SetAnnounced(k AnnouncedKey, v Announced) error {
	return full("announced", m.announced.Put(&k, &v))
}

// DeleteAnnounced ends that.
func (m *Maps) DeleteAnnounced(k AnnouncedKey) error {
	if err := gone(m.announced.Delete(&k)); err != nil {
		return fmt.Errorf("announced address %s: %w", k.Addr.Addr(), err)
	}
	return nil
}

// Announced lists what the node answers for.
func (m *Maps) Announced() (map[AnnouncedKey]Announced, error) {
	all, err := dump[AnnouncedKey, Announced](m.announced)
	if err != nil {
		return nil, fmt.Errorf("announced addresses: %w", err)
	}
	return all, nil
}

// SetNodeAddresses makes exactly these the node's addresses.
func (m *Maps) SetNodeAddresses(want []netip.Addr) error {
	have, err := dump[Address, uint32](m.nodeAddresses)
	if err != nil {
		return fmt.Errorf("node addresses: %w", err)
	}
	for _, a := range want {
		key, one := AddressOf(a), uint32(1)
		delete(have, key)
		if err := full("node_addresses", m.nodeAddresses.Put(&key, &one)); err != nil {
			return fmt.Errorf("node address %s: %w", a, err)
		}
	}
	for key := range have {
		if err := m.nodeAddresses.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("node address %s: %w", key.Addr(), err)
		}
	}
	return nil
}

// SetNode stores the addresses that the node lends.
func (m *Maps) SetNode(n Node) error {
	if err := m.node.Put(uint32(0), &n); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

// SetRanges makes exactly these the ranges in which unknown addresses are refused.
func (m *Maps) SetRanges(want map[netip.Prefix]uint32) error {
	keys := map[RangeKey]bool{}
	for p, kind := range want {
		key := RangeOf(p)
		keys[key] = true
		if err := full("ranges", m.ranges.Put(&key, &kind)); err != nil {
			return fmt.Errorf("range %s: %w", p, err)
		}
	}
	have, err := walk[RangeKey, uint32](m.ranges)
	if err != nil {
		return fmt.Errorf("ranges: %w", err)
	}
	for key := range have {
		if !keys[key] {
			if err := gone(m.ranges.Delete(&key)); err != nil {
				return fmt.Errorf("range %s: %w", key.Addr.Addr(), err)
			}
		}
	}
	return nil
}

// SetListener steers a port to a listening socket.
func (m *Maps) SetListener(port uint16, fd uintptr) error {
	if err := m.listeners.Put(uint32(port), uint64(fd)); err != nil {
		return fmt.Errorf("listener of port %d: %w", port, err)
	}
	return nil
}

// Counters sums every counter over the CPUs.
func (m *Maps) Counters() ([]uint64, error) {
	out := make([]uint64, m.counters.MaxEntries())
	for i := range out {
		var perCPU []uint64
		if err := m.counters.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("counter %d: %w", i, err)
		}
		for _, n := range perCPU {
			out[i] += n
		}
	}
	return out, nil
}

// Flows lists every tracked flow.
func (m *Maps) Flows() (map[Tuple]Flow, error) {
	out := map[Tuple]Flow{}
	for _, t := range []*ebpf.Map{m.conntrackTCP, m.conntrackUDP} {
		part, err := dump[Tuple, Flow](t)
		if err != nil {
			return nil, fmt.Errorf("flows: %w", err)
		}
		for k, v := range part {
			out[k] = v
		}
	}
	return out, nil
}

// dump reads a whole hash map in batches. Entries that change meanwhile may be seen or not.
func dump[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	const batch = 4096
	out := map[K]V{}
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			out[keys[i]] = values[i]
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return out, nil
		case errors.Is(err, unix.ENOSPC):
			// One bucket holds more than a batch: impossible for hashes of this size, unless an
			// attacker picked the keys. Read entry by entry.
			return walk[K, V](m)
		case err != nil:
			return nil, err
		}
	}
}

func walk[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	out := map[K]V{}
	var key K
	var value V
	it := m.Iterate()
	for it.Next(&key, &value) {
		out[key] = value
	}
	return out, it.Err()
}
