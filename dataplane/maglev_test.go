// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/services"
)

// destination reads where a frame goes.
func destination(b []byte) netip.AddrPort {
	from, to, l4 := 26, 30, 14+int(b[14]&15)*4
	if b[12] != 8 {
		from, to, l4 = 22, 38, 54
	}
	a, _ := netip.AddrFromSlice(b[to : to+to-from])
	return at(a, binary.BigEndian.Uint16(b[l4+2:]))
}

// nobody knows no names.
type nobody struct{}

func (nobody) Pod(netip.Addr) (namespace, name string, ok bool)   { return "", "", false }
func (nobody) Device(uint32) (namespace, name string, ok bool)    { return "", "", false }
func (nobody) Namespace(uint64) (namespace, name string, ok bool) { return "", "", false }
func (nobody) IsNode(netip.Addr) bool                             { return false }
func (nobody) Service(uint32) (namespace, name string, ok bool)   { return "", "", false }
func (nobody) Policies(uint32, uint32, string, string, string) (policies []string, why string) {
	return nil, ""
}

// TestPacketMaglev: what comes from outside goes where the consistent table says, so that another node would send
// it to the same backend; when one goes, only its clients move; session affinity wins.
func TestPacketMaglev(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		to := at(nodeIP[i], 30090)
		any := netip.IPv4Unspecified()
		if i == 1 {
			any = netip.IPv6Unspecified()
		}
		backends := make([]netip.AddrPort, 20)
		for b, a := 0, podC[i]; b < len(backends); b, a = b+1, a.Next() {
			backends[b] = at(a, 8080)
		}
		apply := func(flags uint32, backends []netip.AddrPort) {
			t.Helper()
			set := services.Set{
				Name: "consistent", Proto: s.proto, Flags: flags, AffinitySeconds: 3600, Backends: backends,
				Frontends: []services.Frontend{{Addr: any, Port: 30090, Proto: s.proto, Scope: maps.ScopeExternal, Maglev: true}},
			}
			if err := errors.Join(r.reconciler.Apply("consistent", []services.Set{set}), r.reconciler.Collect()); err != nil {
				t.Fatal(err)
			}
		}
		next := uint16(1000)
		// choose opens a connection; the same client port can be asked again once the flow is forgotten.
		choose := func(client netip.Addr, port uint16) netip.AddrPort {
			t.Helper()
			all, err := r.Flows()
			if err != nil {
				t.Fatal(err)
			}
			for tuple, f := range all {
				if err := r.Forget(tuple, f.LastSeen); err != nil {
					t.Fatal(err)
				}
			}
			s.from, s.to = at(client, port), to
			// What a trace says beforehand is what the program does.
			trace, err := inspect.Explain(inspect.Question{From: client, FromPort: port, To: to, Protocol: s.proto, Now: flows.Now().Monotonic},
				"node-1", r.Maps(), nobody{}, func(netip.Addr) (string, error) { return "away", nil })
			if err != nil {
				t.Fatal(err)
			}
			_, out := r.run(t, "from_outside", s.bytes())
			got := destination(out)
			if len(trace.Paths) != 1 || at(trace.Paths[0].To.Address, trace.Paths[0].To.Port) != got || trace.Choice == "" {
				t.Fatalf("%s port %d goes to %s, a trace says %+v", client, port, got, trace)
			}
			return got
		}
		expected := func(backends []netip.AddrPort, hash uint32) netip.AddrPort {
			size := maps.TableSize(len(backends))
			return backends[services.Consistent(backends, size)[uint64(hash)*uint64(size)>>32]]
		}
		fewer := slices.Delete(slices.Clone(backends), 7, 8)
		moved, chosen := 0, map[netip.AddrPort]int{}
		apply(0, backends)
		before := map[uint16]netip.AddrPort{}
		for range 200 {
			next++
			got := choose(client[i], next)
			chosen[got]++
			before[next] = got
			if want := expected(backends, maps.ClientHash(client[i], next, 30090)); got != want {
				t.Fatalf("port %d went to %s, the table says %s", next, got, want)
			}
		}
		if len(chosen) < 18 {
			t.Errorf("200 connections reached only %d of 20 backends", len(chosen))
		}
		apply(0, fewer)
		for port, old := range before {
			if got := choose(client[i], port); got == backends[7] {
				t.Fatalf("port %d went to a backend that is gone", port)
			} else if old != backends[7] && got != old {
				moved++
			}
		}
		if moved > 20 {
			t.Errorf("%d of 200 connections moved from backends that stayed", moved)
		}

		apply(maps.ServiceAffinity, backends)
		first := choose(client[i], 1)
		if want := expected(backends, maps.ClientHash(client[i], 0, 0)); first != want {
			t.Errorf("with affinity: %s, the table says %s", first, want)
		}
		other := client[i].Next()
		for expected(backends, maps.ClientHash(other, 0, 0)) == first {
			other = other.Next()
		}
		// A client keeps its backend although the table would now say another.
		without := slices.DeleteFunc(slices.Clone(backends), func(b netip.AddrPort) bool { return b == first })
		apply(maps.ServiceAffinity, without)
		kept := choose(client[i], 2)
		apply(maps.ServiceAffinity, backends)
		for port := range uint16(20) {
			if got := choose(client[i], 3+port); got != kept {
				t.Fatalf("a client with session affinity moved from %s to %s", kept, got)
			}
		}
	})
}
