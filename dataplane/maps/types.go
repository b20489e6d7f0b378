// SPDX-License-Identifier: Apache-2.0

// Package maps gives Go types to what the kernel programs read, and is the only place that touches
// a BPF map. The layouts are those of the headers in bpf/; a test compares them with the objects.
package maps

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// LayoutVersion is raised when the meaning of a map's bytes changes while its sizes do not. Sizes
// are taken into account by themselves.
const LayoutVersion = 1

// Address is 16 bytes, IPv4 as v4-mapped IPv6.
type Address [16]byte

// AddressOf converts from netip.
func AddressOf(a netip.Addr) Address { return a.As16() }

// Addr converts to netip; a v4-mapped address becomes IPv4.
func (a Address) Addr() netip.Addr { return netip.AddrFrom16(a).Unmap() }

// Port is in network byte order.
type Port [2]byte

// PortOf converts from host byte order.
func PortOf(p uint16) (out Port) {
	binary.BigEndian.PutUint16(out[:], p)
	return out
}

// Number converts to host byte order.
func (p Port) Number() uint16 { return binary.BigEndian.Uint16(p[:]) }

// Transport protocols, as IP numbers them.
const (
	TCP = 6
	UDP = 17
)

// Scopes of a frontend.
const (
	ScopeInternal = 0 // asked from this node or its pods
	ScopeExternal = 1 // arrived from outside the node
)

// ServiceKey is a frontend. The address of a NodePort is the unspecified one of its family.
type ServiceKey struct {
	Addr  Address
	Port  Port
	Proto uint8
	Scope uint8
}

// Flags of a Service.
const (
	ServiceAffinity = 1 << 0
	ServiceLocal    = 1 << 1
	ServiceRanges   = 1 << 2
	ServiceMaglev   = 1 << 3
)

// Service is what a frontend leads to: a generation of a backend set. Key repeats the frontend's
// key, by which a reader recognises an element that the kernel recycled while it was read.
type Service struct {
	Key             ServiceKey
	ID              uint32
	Generation      uint32 // with Count one word, swapped as one (little endian only)
	Count           uint32
	AffinitySeconds uint32
	Flags           uint32
}

// SlotKey finds one of a generation's backends; its value is the backend's id.
type SlotKey struct {
	Service    uint32
	Generation uint32
	Slot       uint32
}

// TableBlock is a part of a generation's consistent table: ids of backends. Its key is a SlotKey whose Slot is the
// number of the block.
type TableBlock [64]uint32

// TableSize is how many entries the consistent table of so many backends has; 0 if there is none. It is table_size
// of bpf/services.h.
func TableSize(backends int) int {
	switch {
	case backends < 2 || backends > 32768:
		return 0
	case backends <= 16:
		return 2039
	case backends <= 128:
		return 16381
	}
	return 65537
}

// SourceRangeKey is a prefix of clients that a generation is for; Bits counts from Service on.
type SourceRangeKey struct {
	Bits       uint32
	Service    uint32
	Generation uint32
	Addr       Address
}

// SourceRangeOf converts from netip.
func SourceRangeOf(service, generation uint32, p netip.Prefix) SourceRangeKey {
	r := RangeOf(p)
	return SourceRangeKey{Bits: 64 + r.Bits, Service: service, Generation: generation, Addr: r.Addr}
}

// Prefix converts to netip.
func (k SourceRangeKey) Prefix() netip.Prefix {
	bits := int(k.Bits) - 64
	a := netip.AddrFrom16(k.Addr)
	if a.Is4In6() && bits >= 96 {
		return netip.PrefixFrom(a.Unmap(), bits-96)
	}
	return netip.PrefixFrom(a, bits)
}

// Client is who is in a network namespace.
type Client struct{ V4, V6 Address }

// ClientOf takes the first address of each family.
func ClientOf(addrs []netip.Addr) (c Client) {
	for _, a := range slices.Backward(addrs) {
		if a = a.Unmap(); a.Is4() {
			c.V4 = AddressOf(a)
		} else {
			c.V6 = AddressOf(a)
		}
	}
	return c
}

// AnnouncedKey is an address that the node answers for on a device.
type AnnouncedKey struct {
	Addr    Address
	Ifindex uint32
}

// Announced is the device's MAC address.
type Announced struct {
	MAC [6]byte
	Pad [2]uint8
}

// Backend belongs to one backend set.
type Backend struct {
	Addr    Address
	Port    Port
	Proto   uint8
	State   uint8
	Service uint32
}

// Endpoint is a pod of this node.
type Endpoint struct {
	Ifindex uint32
	PodMAC  [6]byte
	HostMAC [6]byte
	Slot    uint32 // where its policy sets are
}

// Kinds of address ranges.
const (
	RangeOpen    = 0 // the node answers it
	RangeService = 1 // only frontends are alive
	RangePods    = 2 // only this node's endpoints are alive
	RangeCluster = 3 // pods of all nodes
)

// RangeKey is a prefix; Bits counts from the start of the 16 bytes.
type RangeKey struct {
	Bits uint32
	Addr Address
}

// RangeOf converts from netip.
func RangeOf(p netip.Prefix) RangeKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return RangeKey{Bits: uint32(bits), Addr: AddressOf(p.Masked().Addr())}
}

// Node holds the source addresses that the node lends to translated packets.
type Node struct {
	AddressV4, AddressV6 Address
	GatewayV4, GatewayV6 Address
	MTU                  uint32 // of the way to pods of other nodes
	_                    uint32
}

// Tuple is a packet's addresses and ports as it arrives.
type Tuple struct {
	Saddr, Daddr Address
	Sport, Dport Port
	Proto        uint8
	Pad          [3]uint8
}

// Reverse is the tuple of the answer.
func (t Tuple) Reverse() Tuple {
	t.Saddr, t.Daddr = t.Daddr, t.Saddr
	t.Sport, t.Dport = t.Dport, t.Sport
	return t
}

// Canonical puts the tuple in the order that flows are stored under, as tuple_canonical does.
func (t Tuple) Canonical() Tuple {
	for i := 12; i >= 0; i -= 4 {
		s, d := binary.NativeEndian.Uint32(t.Saddr[i:]), binary.NativeEndian.Uint32(t.Daddr[i:])
		if s > d {
			return t.Reverse()
		}
		if s < d {
			return t
		}
	}
	if binary.NativeEndian.Uint16(t.Sport[:]) > binary.NativeEndian.Uint16(t.Dport[:]) {
		return t.Reverse()
	}
	return t
}

// Counters that are read by their place, as enum counter of bpf/counters.h numbers them; TCP's, and then UDP's.
const (
	CountFlowsAdded   = 29
	CountFlowsRemoved = 31
	CountFlowsFailed  = 33
)

// Flags of a Flow.
const (
	FlowTranslated   = 1 << 0
	FlowReply        = 1 << 1
	FlowSeen         = 1 << 2
	FlowSeenBack     = 1 << 3
	FlowFin          = 1 << 4
	FlowFinBack      = 1 << 5
	FlowRst          = 1 << 6
	FlowSourceIsNode = 1 << 7
	FlowOpenedBack   = 1 << 8
	FlowFromNode     = 1 << 9
)

// Flow is a connection, or one side of a translated one. It is stored under its tuple in canonical order.
type Flow struct {
	LastSeen uint64 // ns of the kernel's coarse monotonic clock
	To       Tuple  // what a translated packet becomes
	Service  uint32
	Flags    uint32
	Backend  uint32
	Reversed uint32    // 1 if .To is for packets with the key's ends exchanged
	Ifindex  [2]uint32 // of the pods' devices that the directions come from
	Checked  uint32    // version of the policies that let it pass
	Pad      uint32
}

// ClientHash is client_hash of bpf/services.h: which part of a consistent table a client's connection is in. Without ports
// only the client counts.
func ClientHash(client netip.Addr, sport, dport uint16) uint32 {
	mix := func(x uint64) uint64 {
		const k = 0xd6e8feb86659fd93
		x = (x ^ x>>32) * k
		x = (x ^ x>>32) * k
		return x ^ x>>32
	}
	a := AddressOf(client)
	var ports [4]byte
	binary.BigEndian.PutUint16(ports[:], sport)
	binary.BigEndian.PutUint16(ports[2:], dport)
	h := mix(binary.NativeEndian.Uint64(a[:]))
	h = mix(h ^ binary.NativeEndian.Uint64(a[8:]))
	return uint32(mix(h^uint64(binary.NativeEndian.Uint32(ports[:]))) >> 32)
}

// AffinityKey is a client of a backend set: its address, or a cookie of a namespace nobody knows.
type AffinityKey struct {
	Client  Address
	Service uint32
	ByNetns uint32
}

// Affinity is the backend a client was given.
type Affinity struct {
	LastUsed uint64
	Backend  uint32
	Pad      uint32
}
