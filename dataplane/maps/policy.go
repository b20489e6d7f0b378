// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

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
	Epoch   uint32 // of the agent that wrote last, 1 to 254
}

// PutPolicy writes what sets say of peers and ports.
func (m *Maps) PutPolicy(entries []PolicyEntry) error {
	for i := range entries {
		if err := m.policy.Put(&entries[i].Key, uint32(entries[i].Verdict)); err != nil {
			return full("policy", err)
		}
	}
	return nil
}

// DeletePolicy undoes PutPolicy. That one is not there is no error.
func (m *Maps) DeletePolicy(keys []PolicyKey) error {
	for i := range keys {
		if err := gone(m.policy.Delete(&keys[i])); err != nil {
			return fmt.Errorf("map policy: %w", err)
		}
	}
	return nil
}

// PutIdentity says which peer an address is.
func (m *Maps) PutIdentity(k IdentityKey, peer uint32) error {
	if err := m.identities.Put(&k, &peer); err != nil {
		return full("identities", err)
	}
	return nil
}

// DeleteIdentity undoes PutIdentity. That it is not there is no error.
func (m *Maps) DeleteIdentity(k IdentityKey) error {
	if err := gone(m.identities.Delete(&k)); err != nil {
		return fmt.Errorf("map identities: %w", err)
	}
	return nil
}

// PolicySlots is the number of pods that fit.
func (m *Maps) PolicySlots() uint32 { return m.policySlots.MaxEntries() }

// PutPolicySets gives a slot its sets, in place.
func (m *Maps) PutPolicySets(slot uint32, s PolicySets) error {
	if err := m.policySlots.Put(slot, &s); err != nil {
		return fmt.Errorf("policy slot %d: %w", slot, err)
	}
	return nil
}

// PolicySets reads a slot.
func (m *Maps) PolicySets(slot uint32) (s PolicySets, err error) {
	if err := m.policySlots.Lookup(slot, &s); err != nil {
		return s, fmt.Errorf("policy slot %d: %w", slot, err)
	}
	return s, nil
}

// PutPolicyState changes the version under which flows were judged, after what they are judged by.
func (m *Maps) PutPolicyState(s PolicyState) error {
	if err := m.policyState.Put(uint32(0), &s); err != nil {
		return fmt.Errorf("policy state: %w", err)
	}
	return nil
}

// PolicyState reads it.
func (m *Maps) PolicyState() (s PolicyState, err error) {
	if err := m.policyState.Lookup(uint32(0), &s); err != nil {
		return s, fmt.Errorf("policy state: %w", err)
	}
	return s, nil
}

// CountPolicyDrops has the packets counted that a set drops from now on.
func (m *Maps) CountPolicyDrops(set uint32) error {
	zero := uint64(0)
	err := m.policyDrops.Update(&set, &zero, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return full("policy_drops", err)
	}
	return nil
}

// PolicyDrops counts the packets that a set dropped.
func (m *Maps) PolicyDrops(set uint32) (n uint64, err error) {
	if err := gone(m.policyDrops.Lookup(&set, &n)); err != nil {
		return 0, fmt.Errorf("map policy_drops: %w", err)
	}
	return n, nil
}

// ForgetPolicyDrops ends CountPolicyDrops.
func (m *Maps) ForgetPolicyDrops(set uint32) error {
	if err := gone(m.policyDrops.Delete(&set)); err != nil {
		return fmt.Errorf("map policy_drops: %w", err)
	}
	return nil
}

// PrunePolicies deletes what is of another epoch. No slot may lead there.
func (m *Maps) PrunePolicies(epoch uint32) error {
	keep := epoch << 24
	policy, err := walk[PolicyKey, uint32](m.policy)
	if err != nil {
		return fmt.Errorf("map policy: %w", err)
	}
	for k := range policy {
		if EpochOf(k.Set) == keep {
			continue
		}
		if err := m.DeletePolicy([]PolicyKey{k}); err != nil {
			return err
		}
	}
	identities, err := walk[IdentityKey, uint32](m.identities)
	if err != nil {
		return fmt.Errorf("map identities: %w", err)
	}
	for k := range identities {
		if EpochOf(k.Scope) == keep {
			continue
		}
		if err := m.DeleteIdentity(k); err != nil {
			return err
		}
	}
	drops, err := walk[uint32, uint64](m.policyDrops)
	if err != nil {
		return fmt.Errorf("map policy_drops: %w", err)
	}
	for set := range drops {
		if EpochOf(set) == keep {
			continue
		}
		if err := m.ForgetPolicyDrops(set); err != nil {
			return err
		}
	}
	return nil
}
