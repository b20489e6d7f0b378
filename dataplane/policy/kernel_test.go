// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"

	"skep.io/skep/dataplane/maps"
)

// kernel is a Store in memory that fails at random, sometimes after it did the work.
type kernel struct {
	policy     map[maps.PolicyKey]maps.PolicyVerdict
	identities map[maps.IdentityKey]uint32
	slots      map[uint32]maps.PolicySets
	drops      map[uint32]uint64
	state      maps.PolicyState

	fail func() bool
	look func() // after every step
	// What programs that still run may have read, by slot.
	readers map[uint32][]maps.PolicySets
	past    []content // what they may have looked up, in order
	writes  int
}

// content of the maps that a judgement reads.
type content struct {
	policy     map[maps.PolicyKey]maps.PolicyVerdict
	identities map[maps.IdentityKey]uint32
	slots      map[uint32]maps.PolicySets
}

var errInjected = errors.New("injected")

func newKernel() *kernel {
	return &kernel{
		policy: map[maps.PolicyKey]maps.PolicyVerdict{}, identities: map[maps.IdentityKey]uint32{}, slots: map[uint32]maps.PolicySets{},
		drops: map[uint32]uint64{}, readers: map[uint32][]maps.PolicySets{}, fail: func() bool { return false }, look: func() {},
	}
}

func (k *kernel) step(f func()) error {
	if k.fail() {
		return errInjected
	}
	k.writes++
	f()
	k.look()
	if k.fail() {
		return errInjected
	}
	return nil
}

func (k *kernel) PutPolicy(entries []maps.PolicyEntry) error {
	for _, e := range entries {
		if err := k.step(func() { k.policy[e.Key] = e.Verdict }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) DeletePolicy(keys []maps.PolicyKey) error {
	for _, key := range keys {
		if err := k.step(func() { delete(k.policy, key) }); err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) PutIdentity(key maps.IdentityKey, peer uint32) error {
	return k.step(func() { k.identities[key] = peer })
}

func (k *kernel) DeleteIdentity(key maps.IdentityKey) error {
	return k.step(func() { delete(k.identities, key) })
}

func (k *kernel) PutPolicySets(slot uint32, s maps.PolicySets) error {
	return k.step(func() {
		if old, ok := k.slots[slot]; ok {
			k.readers[slot] = append(k.readers[slot], old)
		}
		k.slots[slot] = s
	})
}

func (k *kernel) PutPolicyState(s maps.PolicyState) error { return k.step(func() { k.state = s }) }
func (k *kernel) CountPolicyDrops(set uint32) error       { return k.step(func() { k.drops[set] += 0 }) }
func (k *kernel) PolicyDrops(set uint32) (uint64, error)  { return k.drops[set], nil }
func (k *kernel) ForgetPolicyDrops(set uint32) error      { return k.step(func() { delete(k.drops, set) }) }
func (k *kernel) WaitReaders() error {
	return k.step(func() {
		clear(k.readers)
		k.past = nil
	})
}

// allows is set_allows of bpf/policy.h.
func (k *kernel) allows(set uint32, peer netip.Addr, proto uint8, port uint16) bool {
	allowed, _ := k.judge(set, peer, proto, port)
	return allowed
}

func (k *kernel) now() content { return content{k.policy, k.identities, k.slots} }

// remember keeps what a program that still runs may have read, if it came now.
func (k *kernel) remember() {
	k.past = append(k.past, content{stdmaps.Clone(k.policy), stdmaps.Clone(k.identities), stdmaps.Clone(k.slots)})
}

func (k *kernel) judge(set uint32, peer netip.Addr, proto uint8, port uint16) (allowed bool, rule uint32) {
	return judge([3]content{k.now(), k.now(), k.now()}, set, peer, proto, port)
}

// judge looks up everybody's entry, the pod's and the block's, each in one state of the maps.
func judge(at [3]content, set uint32, peer netip.Addr, proto uint8, port uint16) (allowed bool, rule uint32) {
	switch set {
	case 0:
		return true, 0
	case maps.PolicyClosed:
		return false, 0
	}
	look := -1
	allowed, rule, _ = maps.Judge(func(peer uint32) (maps.PolicyVerdict, bool, error) {
		switch {
		case peer == maps.PeerAny:
			look = 0
		case peer < maps.PeerBlock:
			look = 1
		default:
			look = 2
		}
		v, ok := at[look].entry(set, peer, proto, port)
		return v, ok, nil
	}, at[1].peer(maps.EpochOf(set), peer), at[2].peer(set, peer))
	return allowed, rule
}

func (c *content) entry(set, peer uint32, proto uint8, port uint16) (maps.PolicyVerdict, bool) {
	for bits := 16; bits >= 0; bits-- {
		mask := uint16(0xffff << (16 - bits))
		key := maps.PolicyKey{Bits: uint32(maps.PolicyBitsProto + bits), Set: set, Peer: peer, Proto: proto, Port: maps.PortOf(port & mask)}
		if v, ok := c.policy[key]; ok {
			return v, true
		}
	}
	v, ok := c.policy[maps.PolicyKey{Bits: maps.PolicyBitsPeer, Set: set, Peer: peer}]
	return v, ok
}

// peer finds the longest prefix.
func (c *content) peer(scope uint32, a netip.Addr) uint32 {
	a16 := netip.AddrFrom16(a.As16())
	for bits := 128; bits >= 0; bits-- {
		p, _ := a16.Prefix(bits)
		if peer, ok := c.identities[maps.IdentityKey{Bits: uint32(32 + bits), Scope: scope, Addr: p.Addr().As16()}]; ok {
			return peer
		}
	}
	return 0
}

func (k *kernel) String() string {
	return fmt.Sprintf("%d entries, %d identities, slots %v, %d counters, state %v", len(k.policy), len(k.identities), k.slots, len(k.drops), k.state)
}
