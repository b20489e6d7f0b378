// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Lookups as the programs do them, for those who explain what the programs decide.

func lookup(m *ebpf.Map, name string, key, value any) (found bool, err error) {
	switch err := m.Lookup(key, value); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("map %s: %w", name, err)
	}
	return true, nil
}

// Service finds a frontend.
func (m *Maps) Service(k ServiceKey) (s Service, found bool, err error) {
	found, err = lookup(m.services, "services", &k, &s)
	return s, found, err
}

// Admits says whether a client may use a frontend.
func (m *Maps) Admits(s Service, client netip.Addr) (bool, error) {
	if s.Flags&ServiceRanges == 0 {
		return true, nil
	}
	if !client.IsValid() {
		return false, nil
	}
	var one uint32
	k := SourceRangeOf(s.ID, s.Generation, netip.PrefixFrom(client, client.BitLen()))
	return lookup(m.sourceRanges, "source_ranges", &k, &one)
}

// BackendsOf lists what a frontend leads to. A change meanwhile may leave some out.
func (m *Maps) BackendsOf(s Service) (out []Backend, err error) {
	for slot := range s.Count {
		var id uint32
		var b Backend
		found, err := lookup(m.slots, "slots", &SlotKey{s.ID, s.Generation, slot}, &id)
		if err == nil && found {
			found, err = lookup(m.backends, "backends", &id, &b)
		}
		if err != nil {
			return nil, err
		}
		if found {
			out = append(out, b)
		}
	}
	return out, nil
}

// Consistent finds which backend a frontend's table gives a hash; found is false if it has no table.
func (m *Maps) Consistent(s Service, hash uint32) (b Backend, found bool, err error) {
	at := uint32(uint64(hash) * uint64(TableSize(int(s.Count))) >> 32)
	var block TableBlock
	if found, err = lookup(m.tables, "tables", &SlotKey{s.ID, s.Generation, at / uint32(len(block))}, &block); err != nil || !found {
		return b, false, err
	}
	found, err = lookup(m.backends, "backends", &block[at%uint32(len(block))], &b)
	return b, found, err
}

const backendActive = 0 // of enum backend_state

// Kept finds the backend that a client with session affinity has at a moment of the monotonic clock; found is false if it
// would get another.
func (m *Maps) Kept(s Service, client netip.Addr, now int64) (b Backend, found bool, err error) {
	var a Affinity
	if found, err = lookup(m.affinity, "affinity", &AffinityKey{Client: AddressOf(client), Service: s.ID}, &a); err != nil || !found {
		return b, false, err
	}
	if now-int64(a.LastUsed) >= int64(s.AffinitySeconds)*1e9 {
		return b, false, nil
	}
	found, err = lookup(m.backends, "backends", &a.Backend, &b)
	return b, found && b.Service == s.ID && b.State == backendActive, err
}

// Range says in which kind of range an address is.
func (m *Maps) Range(a netip.Addr) (kind uint32, found bool, err error) {
	k := RangeOf(netip.PrefixFrom(a, a.BitLen()))
	found, err = lookup(m.ranges, "ranges", &k, &kind)
	return kind, found, err
}

// IsNodeAddress says whether it is one of the node's own.
func (m *Maps) IsNodeAddress(a netip.Addr) (bool, error) {
	var one uint32
	k := AddressOf(a)
	return lookup(m.nodeAddresses, "node_addresses", &k, &one)
}

// Peer finds which peer an address is in a scope; 0 is none.
func (m *Maps) Peer(scope uint32, a netip.Addr) (peer uint32, err error) {
	k := IdentityKeyOf(scope, netip.PrefixFrom(a, a.BitLen()))
	_, err = lookup(m.identities, "identities", &k, &peer)
	return peer, err
}

// Policy is what a set says of the peer and port.
func (m *Maps) Policy(set, peer uint32, proto uint8, port uint16) (v PolicyVerdict, found bool, err error) {
	found, err = lookup(m.policy, "policy", &PolicyKey{Bits: PolicyBitsPort, Set: set, Peer: peer, Proto: proto, Port: PortOf(port)}, (*uint32)(&v))
	return v, found, err
}

// ReadPolicy reads what every set lets every peer do, and which addresses are which peers.
func (m *Maps) ReadPolicy() (policy map[PolicyKey]PolicyVerdict, identities map[IdentityKey]uint32, err error) {
	if policy, err = walk[PolicyKey, PolicyVerdict](m.policy); err != nil {
		return nil, nil, fmt.Errorf("map policy: %w", err)
	}
	if identities, err = walk[IdentityKey, uint32](m.identities); err != nil {
		return nil, nil, fmt.Errorf("map identities: %w", err)
	}
	return policy, identities, nil
}

// Prefix converts to netip.
func (k IdentityKey) Prefix() netip.Prefix {
	bits := int(k.Bits) - 32
	a := k.Addr.Addr()
	if a.Is4() && bits >= 96 {
		return netip.PrefixFrom(a, bits-96)
	}
	return netip.PrefixFrom(netip.AddrFrom16(k.Addr), bits)
}
