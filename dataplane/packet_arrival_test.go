// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"skep.io/skep/dataplane/maps"
)

// arrival is a program for packets that do not come from a pod, and what the model says of them.
type arrival struct {
	program  string
	from, to func(i int) []netip.AddrPort // sources have ports of their own
	// expect says whether a packet passes, if the model knows, and where it goes if it is translated.
	expect func(w *packetWorld, p dissected, own bool) (passes, known bool, to netip.AddrPort)
}

// TestRandomArrivals: in the random clusters of TestRandomPackets, what to_pod does with what comes through the node's stack, from
// elsewhere and from the node itself, and what from_outside does with what comes to the node, is what the model says.
func TestRandomArrivals(t *testing.T) {
	for _, a := range []arrival{{
		program: "to_pod",
		from: func(i int) []netip.AddrPort {
			return []netip.AddrPort{at(podA[i], 0), at(podB[i], 0), at(podC[i], 0), at(client[i], 0)}
		},
		to: func(i int) []netip.AddrPort {
			return []netip.AddrPort{at(podA[i], 8080), at(podB[i], 8080), at(podB[i], 8081)}
		},
		expect: func(w *packetWorld, p dissected, own bool) (passes, known bool, to netip.AddrPort) {
			if own {
				return true, true, to // no policy denies what the node sends, whatever it is
			}
			i := family6(p.from)
			if !p.plain() || !slices.Contains([]netip.Addr{podA[i], podB[i]}, p.to.Addr()) {
				return false, false, to
			}
			passes, known = w.judge(p.connection(), p.opens(), i)
			return passes, known, to
		},
	}, {
		program: "from_outside",
		from:    func(i int) []netip.AddrPort { return []netip.AddrPort{at(client[i], 0), at(client[i].Next(), 0)} },
		to: func(i int) []netip.AddrPort {
			outside := slices.Repeat([]netip.AddrPort{at(nodeIP[i], 30080)}, 8)
			return append(outside, at(nodeIP[i], 22), at(podB[i], 8080), at(vip[i], 80))
		},
		expect: func(w *packetWorld, p dissected, _ bool) (passes, known bool, to netip.AddrPort) {
			i := family6(p.from)
			if !p.plain() || !slices.Contains([]netip.Addr{client[i], client[i].Next()}, p.from) {
				return false, false, to
			}
			if p.to != at(nodeIP[i], 30080) || p.proto != maps.TCP && p.proto != maps.UDP {
				return true, true, to // the stack has it, and to_pod judges what is for a pod
			}
			if !p.opens() {
				return false, false, to
			}
			to = at(w.backend[i], 8080)
			conn := p.connection()
			conn.To, conn.Port = to.Addr(), 8080
			return w.backend == podC || w.Ingress(conn), true, to // the other node judges what is for its pods
		},
	}} {
		t.Run(a.program, func(t *testing.T) { a.check(t) })
	}
}

func family6(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

func (a arrival) check(t *testing.T) {
	r := newPolicyRig(t)
	compared := map[bool]int{}
	rapid.Check(t, func(rt *rapid.T) {
		w := randomWorld(t, r, rt)
		for range 40 {
			i := rapid.IntRange(0, 1).Draw(rt, "family")
			own := rapid.Bool().Draw(rt, "made by the node")
			packet, whole := w.draw(rt, i, rapid.SampledFrom(a.from(i)).Draw(rt, "from").Addr(), rapid.SampledFrom(a.to(i)).Draw(rt, "to"))
			ctx := skb{Ingress: 1, Ifindex: 1}
			if own {
				ctx.Ingress = 0
			}
			opts := &ebpf.RunOptions{Data: packet, DataOut: make([]byte, len(packet)+256), Context: ctx}
			verdict, err := r.Program(a.program).Run(opts)
			if err != nil {
				if whole {
					rt.Fatalf("%x: %v", packet, err)
				}
				continue // the kernel refuses some cut ones before the program runs
			}
			if verdict != next && verdict != drop && verdict != redirect || len(opts.DataOut) != len(packet) {
				rt.Fatalf("%x: verdict %d, %d bytes became %d", packet, int32(verdict), len(packet), len(opts.DataOut))
			}
			p := dissect(packet)
			passes, known, to := a.expect(w, p, own)
			if !known {
				continue
			}
			compared[passes]++
			if passes != (verdict != drop) {
				rt.Fatalf("%+v, by the node %t: the program's verdict is %d, the model says %t; policies %v %v", p, own, int32(verdict), passes, w.Policies, w.ClusterPolicies)
			}
			if got := dissect(opts.DataOut); passes && to.IsValid() && got.to != to {
				rt.Fatalf("%+v was sent to %s, want %s", p, got.to, to)
			}
		}
	})
	t.Logf("%d packets passed, %d were dropped", compared[true], compared[false])
	if compared[true] == 0 || compared[false] == 0 {
		t.Errorf("compared %v packets by whether they pass", compared)
	}
}
