// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/record"

	"skep.io/skep/dataplane/conntrack"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/services"
)

// TestEvictions: of more flows than fit, those that others drove out are counted, for the protocol whose they are; what is over
// and what another agent carried over is no eviction.
func TestEvictions(t *testing.T) {
	r := newRigWith(t, loader.Config{ConntrackMax: 1024})
	gc := &conntrack.Collector{Table: r.Loader, Lifetimes: conntrack.Defaults}
	collect := func() conntrack.Pass {
		t.Helper()
		p, err := gc.Collect()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	send := func(proto uint8, from, flows int) {
		t.Helper()
		for i := range flows {
			s := segment{from: at(podA[0], uint16(from+i)), to: at(podC[0], 9), proto: proto, flags: syn}
			if v, _ := r.run(t, "from_pod", s.bytes()); v != next {
				t.Fatalf("flow %d: verdict %d", i, v)
			}
		}
	}
	send(maps.TCP, 1000, 100)
	if p := collect(); p.TCP != 100 || p.Evicted != (conntrack.ByProtocol{}) {
		t.Errorf("100 flows: %+v", p)
	}
	// RST.
	reset := segment{from: at(podA[0], 1000), to: at(podC[0], 9), proto: maps.TCP, flags: 4}
	r.run(t, "from_pod", reset.bytes())
	if p := collect(); p.TCP != 99 || p.Evicted != (conntrack.ByProtocol{}) {
		t.Errorf("one is over: %+v", p)
	}
	const many = 5000
	send(maps.UDP, 2000, many)
	p := collect()
	if want := uint64(many - p.UDP); p.UDP > 1024 || p.Evicted != (conntrack.ByProtocol{UDP: want}) || p.Failed != (conntrack.ByProtocol{}) {
		t.Errorf("%d flows, of which %d are there: %+v", many, p.UDP, p)
	}
	send(maps.TCP, 1001, 99) // known ones
	if again := collect(); again.Evicted != p.Evicted {
		t.Errorf("flows that are known count: %+v", again)
	}
}

// TestFullSlots: a service with more endpoints than the kernel has room for leaves nothing of them behind, so that those
// that fit can still change, and new ones come.
func TestFullSlots(t *testing.T) {
	r := newRigWith(t, loader.Config{ConntrackMax: 1024})
	m := r.Loader.Maps()
	rec, err := services.NewReconciler(m)
	if err != nil {
		t.Fatal(err)
	}
	const free = 1000 // the kernel counts entries to some dozens a CPU
	fits := int(m.Capacity()["slots"])
	keys := make([]maps.SlotKey, fits-free)
	for i := range keys {
		keys[i] = maps.SlotKey{Service: 1 << 30, Slot: uint32(i)}
	}
	if err := m.PutSlots(keys, make([]uint32, len(keys))); err != nil {
		t.Fatal(err)
	}
	set := func(name string, n, port, count int) []services.Set {
		s := services.Set{Name: name, Proto: maps.TCP, Frontends: []services.Frontend{
			{Addr: netip.AddrFrom4([4]byte{10, 143, 0, byte(n)}), Port: 80, Proto: maps.TCP}}}
		for i := range count {
			s.Backends = append(s.Backends, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 142, byte(i >> 8), byte(i)}), uint16(port)))
		}
		return []services.Set{s}
	}
	for i := range 3 {
		if err := rec.Apply("web", set("web", 1, 1+i, 2)); err != nil {
			t.Fatalf("round %d: a service that fits: %v", i, err)
		}
		if err := rec.Apply("big", set("big", 2, 1, 3*free)); err == nil || !strings.Contains(err.Error(), "map slots is full") {
			t.Fatalf("round %d: %d endpoints in room for %d: %v", i, 3*free, free, err)
		}
		if err := rec.Collect(); err != nil {
			t.Fatal(err)
		}
	}
	if err := rec.Apply("new", set("new", 3, 1, free/2)); err != nil {
		t.Errorf("the room that is left is not: %v", err)
	}
}

// TestFullMap: a service that does not fit is refused with an event, in metrics and in the node's health; those that fit go on,
// and it comes when there is room.
func TestFullMap(t *testing.T) {
	events := record.NewFakeRecorder(100)
	n := newNodeOf(t, func(c *Config) { c.Events = events })
	client, server := n.pod("client"), n.pod("server")
	serve(t, server.ns, "server", 8080)
	web := n.service("web", nil, server)
	n.answers(client.ns, "tcp", web.v4, "server")

	var fillers []maps.ServiceKey
	address := netip.MustParseAddr("2001:db8:f111::")
	for {
		address = address.Next()
		key := maps.ServiceKey{Addr: maps.AddressOf(address), Port: maps.PortOf(80), Proto: maps.TCP}
		if err := n.dp.maps.PutService(maps.Service{Key: key}); err != nil {
			if !strings.Contains(err.Error(), "services is full") {
				t.Fatal(err)
			}
			break
		}
		fillers = append(fillers, key)
	}
	late := n.service("late", nil, server)
	for said := false; !said; {
		e := <-events.Events // `go test` ends a test that waits for ever
		said = strings.Contains(e, "Warning NotProgrammed Node node-1: ") && strings.Contains(e, "map services is full")
	}
	eventually(t, "the health", func() error {
		h, err := n.dp.Health()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(h.Troubles(), func(s string) bool { return strings.HasPrefix(s, "service default/late is not what it should be: ") }) {
			return fmt.Errorf("%q", h.Troubles())
		}
		return nil
	})
	if n.metric("skep_dataplane_service_failures_total") == 0 {
		t.Error("no failure is counted")
	}
	n.answers(client.ns, "tcp", web.v4, "server")
	if _, _, err := ask(client.ns, "tcp", late.v4); err == nil {
		t.Error("the service that does not fit answers")
	}
	for _, key := range fillers {
		if err := n.dp.maps.DeleteService(key); err != nil {
			t.Fatal(err)
		}
	}
	n.answers(client.ns, "tcp", late.v4, "server")
	eventually(t, "no trouble", func() error {
		h, err := n.dp.Health()
		if err == nil && len(h.Problems) > 0 {
			err = errors.New(strings.Join(h.Problems, ", "))
		}
		return err
	})
}

// TestFullPolicies: a policy for which the kernel has no room is said in an event, in metrics and in the node's health; those
// that were there stay in force, and it comes when there is room.
func TestFullPolicies(t *testing.T) {
	events := record.NewFakeRecorder(100)
	n := newNodeOf(t, func(c *Config) { c.Events = events })
	pods := n.servingPods("a", "b", "c")
	a, b, c := pods[0], pods[1], pods[2]
	denied := func(from, to *testPod) {
		t.Helper()
		eventually(t, "a peer is denied", func() error {
			if reaches(from.ns, at(to.v4(), 8080)) {
				return fmt.Errorf("%s reaches %s", from.Name, to.Name)
			}
			return nil
		})
	}
	n.policy(in("b", podPeer("a")))
	denied(c, b)

	state, err := n.dp.maps.PolicyState()
	if err != nil {
		t.Fatal(err)
	}
	var fillers []uint32 // numbers that sets get last
	for set := state.Epoch<<24 | 0xfffff0; ; set-- {
		if err := n.dp.maps.CountPolicyDrops(set); err != nil {
			if !strings.Contains(err.Error(), "map policy_drops is full") {
				t.Fatal(err)
			}
			break
		}
		fillers = append(fillers, set)
	}
	n.policy(in("c"))
	for said := false; !said; {
		e := <-events.Events // `go test` ends a test that waits for ever
		said = strings.Contains(e, "Warning NotInForce it is not in force: map policy_drops is full")
	}
	for _, want := range []string{"policy default/in-c: it is not in force: ", "changes of policies and of the pods they name wait: map policy_drops is full"} {
		eventually(t, "the health", func() error {
			h, err := n.dp.Health()
			if err == nil && !slices.ContainsFunc(h.Troubles(), func(s string) bool { return strings.HasPrefix(s, want) }) {
				err = fmt.Errorf("%q", h.Troubles())
			}
			return err
		})
	}
	if n.metric("skep_dataplane_policy_failures_total") == 0 {
		t.Error("no failure is counted")
	}
	n.answers(a.ns, "tcp", at(b.v4(), 8080), "b")
	denied(c, b)
	for _, set := range fillers {
		if err := n.dp.maps.ForgetPolicyDrops(set); err != nil {
			t.Fatal(err)
		}
	}
	denied(a, c)
	eventually(t, "no trouble", func() error {
		h, err := n.dp.Health()
		if err == nil && len(h.Problems) > 0 {
			err = errors.New(strings.Join(h.Problems, ", "))
		}
		return err
	})
}
