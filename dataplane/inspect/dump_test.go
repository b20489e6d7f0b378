// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"skep.io/skep/dataplane/maps"
)

// nobody knows no names.
type nobody struct{}

func (nobody) Pod(netip.Addr) (string, string, bool)   { return "", "", false }
func (nobody) Device(uint32) (string, string, bool)    { return "", "", false }
func (nobody) Namespace(uint64) (string, string, bool) { return "", "", false }
func (nobody) IsNode(netip.Addr) bool                  { return false }
func (nobody) Service(uint32) (string, string, bool)   { return "", "", false }
func (nobody) Policies(uint32, uint32, string, string, string) (out []string, _ string) {
	return nil, ""
}

// TestPolicyRanges: prefixes of ports come back as the ranges that they were made of.
func TestPolicyRanges(t *testing.T) {
	const set = 1<<24 | 7
	slot := netip.MustParseAddr("10.42.0.2")
	policy := map[maps.PolicyKey]maps.PolicyVerdict{}
	add := func(peer uint32, proto uint8, bits uint32, port uint16) {
		policy[maps.PolicyKey{Bits: bits, Set: set, Peer: peer, Proto: proto, Port: maps.PortOf(port)}] = 1
	}
	add(0, maps.TCP, maps.PolicyBitsPort, 79)        // 79-83
	add(0, maps.TCP, maps.PolicyBitsPort-2, 80)      // 80-83
	add(0, maps.TCP, maps.PolicyBitsPort, 85)        // alone
	add(0, maps.UDP, maps.PolicyBitsProto, 0)        // every port
	add(5, maps.TCP, maps.PolicyBitsPeer, 0)         // everything, to a pod
	add(maps.PeerBlock, 6, maps.PolicyBitsPort, 443) // to a block
	identities := map[maps.IdentityKey]uint32{
		maps.IdentityKeyOf(maps.EpochOf(set), netip.MustParsePrefix("fd00::5/128")):  5,
		maps.IdentityKeyOf(set, netip.MustParsePrefix("192.0.2.0/24")):               maps.PeerBlock,
		maps.IdentityKeyOf(set, netip.MustParsePrefix("2001:db8::/32")):              maps.PeerBlock,
		maps.IdentityKeyOf(maps.EpochOf(set)+1<<24, netip.MustParsePrefix("::/128")): 5, // of another epoch
	}
	got := PolicySets(map[netip.Addr]maps.Endpoint{slot: {Slot: 3}}, map[uint32]maps.PolicySets{3: {Ingress: set, Egress: maps.PolicyClosed}},
		policy, identities, map[uint32]uint64{set: 9}, nobody{})
	if len(got) != 2 || got[0].State != Judged || got[0].Drops != 9 || got[1].State != Closed {
		t.Fatalf("%+v", got)
	}
	rules := map[string]bool{}
	for _, r := range got[0].Rules {
		peers := ""
		for _, p := range r.Peers {
			peers += p.Address.String()
		}
		rules[fmt.Sprintf("%t %s %v %s %d-%d", r.Anybody, peers, r.Blocks, r.Protocol, r.First, r.Last)] = true
	}
	want := []string{"true  [] TCP 79-83", "true  [] TCP 85-85", "true  [] UDP 0-65535", "false fd00::5 [] any 0-65535", "false  [192.0.2.0/24 2001:db8::/32] TCP 443-443"}
	for _, w := range want {
		if !rules[w] {
			t.Errorf("no rule %q", w)
		}
	}
	if len(rules) != len(want) {
		t.Errorf("rules %v", rules)
	}
}

// TestConnections: an entry is shown as it was opened, whatever order its tuple is stored in.
func TestConnections(t *testing.T) {
	client, server, backend := maps.AddressOf(netip.MustParseAddr("10.0.0.9")), maps.AddressOf(netip.MustParseAddr("10.0.0.1")), maps.AddressOf(netip.MustParseAddr("10.0.0.5"))
	tuple := maps.Tuple{Saddr: client, Daddr: server, Sport: maps.PortOf(40000), Dport: maps.PortOf(80), Proto: maps.TCP}
	key := tuple.Canonical()
	if key == tuple {
		t.Fatal("the tuple is in canonical order already")
	}
	for _, f := range []maps.Flow{
		{LastSeen: 5, Flags: maps.FlowOpenedBack | maps.FlowSeen | maps.FlowSeenBack},
		{LastSeen: 5, Flags: maps.FlowTranslated | maps.FlowSeen | maps.FlowSeenBack, Reversed: 1,
			To: maps.Tuple{Saddr: client, Daddr: backend, Sport: maps.PortOf(40000), Dport: maps.PortOf(8080), Proto: maps.TCP}},
	} {
		got := Connections(map[maps.Tuple]maps.Flow{key: f}, nobody{}, "n", int64(time.Second)+5)[0]
		if got.Source.Address.String() != "10.0.0.9" || got.Source.Port != 40000 || got.Destination.Port != 80 || got.State != "established" || got.Idle != time.Second {
			t.Errorf("%+v", got)
		}
		if f.Reversed == 1 && (got.To == nil || got.To.Address.String() != "10.0.0.5" || got.To.Port != 8080 || got.From != nil) {
			t.Errorf("translated: %+v", got)
		}
	}
}

// TestFrontendAlgorithm: how packets choose is shown.
func TestFrontendAlgorithm(t *testing.T) {
	all := map[maps.ServiceKey]maps.Service{}
	for port, flags := range map[uint16]uint32{80: maps.ServiceAffinity, 81: maps.ServiceMaglev} {
		all[maps.ServiceKey{Port: maps.PortOf(port), Proto: maps.TCP}] = maps.Service{Flags: flags}
	}
	got := Frontends(maps.Snapshot{Services: all}, nobody{})
	if len(got) != 2 || got[0].Algorithm != "random" || got[1].Algorithm != "maglev" {
		t.Errorf("%+v", got)
	}
}
