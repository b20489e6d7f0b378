// SPDX-License-Identifier: Apache-2.0

package maps

import "net/netip"

// SCTP, as IP numbers it.
const SCTP = 132

// PolicySets are the rule sets that a pod's traffic must satisfy. A set's number is never used for other
// rules; its top byte is the epoch of the agent that wrote it. 0 lets everything pass.
type PolicySets struct{ Ingress, Egress uint32 }

// PolicyClosed is the number of the set that nothing satisfies.
const PolicyClosed = 0xffffffff

// EpochOf is the epoch of a set's number, in place: the scope under which its pods are found.
func EpochOf(set uint32) uint32 { return set & 0xff000000 }

// Peers of rules.
const (
	PeerAny   = 0       // everybody
	PeerBlock = 1 << 31 // and above: addresses that the same IP blocks of one set hold; below: pods
)

// Bits of PolicyKey up to and including a member.
const (
	PolicyBitsPeer  = 64
	PolicyBitsProto = 72
	PolicyBitsPort  = 88
)

// PolicyKey is what one set lets a peer do. Bits counts from Set on.
type PolicyKey struct {
	Bits  uint32
	Set   uint32
	Peer  uint32
	Proto uint8
	Port  Port
	Pad   uint8
}

// IdentityKey finds the peer that an address is: a pod's in the scope of an epoch, a block's in that of
// a set. Bits counts from Scope on.
type IdentityKey struct {
	Bits  uint32
	Scope uint32
	Addr  Address
}

// IdentityKeyOf converts from netip. A prefix of IPv6 never holds IPv4 addresses, except ::/95 and
// shorter ones, under which the caller has to put an entry for ::ffff:0:0/96.
func IdentityKeyOf(scope uint32, p netip.Prefix) IdentityKey {
	r := RangeOf(p)
	return IdentityKey{Bits: 32 + r.Bits, Scope: scope, Addr: r.Addr}
}

// PolicyState says whether any pod of the node is subject to a policy.
type PolicyState struct {
	Version uint32 // 0: none is; else another one after each change
	Last    uint32 // the highest ever used
}
