// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"skep.io/skep/dataplane/conntrack"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/services"
)

// Verdicts of tc programs.
const (
	next     = 0xffffffff
	drop     = 2
	redirect = 7
)

// rig holds loaded programs that are attached to nothing, and maps with a few entries. Test packets
// arrive on device 1, so that is where its pods are.
type rig struct {
	*loader.Loader
	reconciler *services.Reconciler
}

var (
	podA    = [2]netip.Addr{netip.MustParseAddr("10.142.0.2"), netip.MustParseAddr("fd73:6b65:a042::2")}
	podB    = [2]netip.Addr{netip.MustParseAddr("10.142.0.3"), netip.MustParseAddr("fd73:6b65:a042::3")}
	podC    = [2]netip.Addr{netip.MustParseAddr("10.142.0.4"), netip.MustParseAddr("fd73:6b65:a042::4")} // elsewhere
	vip     = [2]netip.Addr{netip.MustParseAddr("10.143.0.80"), netip.MustParseAddr("fd73:6b65:a043::80")}
	nodeIP  = [2]netip.Addr{nodeV4, nodeV6}
	client  = [2]netip.Addr{outsideV4, outsideV6}
	gateway = [2]netip.Addr{netip.MustParseAddr("10.142.0.1"), netip.MustParseAddr("fd73:6b65:a042::1")}
)

func newRig(t testing.TB) *rig { return newRigOf(t, loader.SNAT) }

func newRigOf(t testing.TB, mode loader.NodePortMode) *rig {
	t.Helper()
	return newRigWith(t, loader.Config{NodePortMode: mode})
}

func newRigWith(t testing.TB, cfg loader.Config) *rig {
	t.Helper()
	dir := filepath.Join("/sys/fs/bpf", fmt.Sprintf("rig-%d", time.Now().UnixNano()))
	cfg.Dir, cfg.Log = dir, slog.New(slog.DiscardHandler)
	l, err := loader.Load(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		if err := loader.Cleanup(dir); err != nil {
			t.Error(err)
		}
	})
	m := l.Maps()
	for i := range 2 {
		for _, a := range []netip.Addr{podA[i], podB[i]} {
			if err := m.SetEndpoint(a, maps.Endpoint{Ifindex: 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := m.SetNodeAddresses(nodeIP[:]); err != nil {
		t.Fatal(err)
	}
	err = m.SetNode(maps.Node{
		AddressV4: maps.AddressOf(nodeV4), AddressV6: maps.AddressOf(nodeV6),
		GatewayV4: maps.AddressOf(gateway[0]), GatewayV6: maps.AddressOf(gateway[1]),
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := services.NewReconciler(m)
	if err != nil {
		t.Fatal(err)
	}
	x := &rig{l, r}
	x.backends(t, podB)
	return x
}

// backends makes the services' only backend.
func (r *rig) backends(t testing.TB, pod [2]netip.Addr) {
	t.Helper()
	var sets []services.Set
	for i, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		for _, proto := range []uint8{maps.TCP, maps.UDP} {
			set := services.Set{Name: fmt.Sprint(proto, any), Proto: proto, Frontends: []services.Frontend{
				{Addr: vip[i], Port: 80, Proto: proto}, {Addr: any, Port: 30080, Proto: proto},
				{Addr: any, Port: 30080, Proto: proto, Scope: maps.ScopeExternal},
			}}
			if pod[i].IsValid() {
				set.Backends = []netip.AddrPort{netip.AddrPortFrom(pod[i], 8080)}
			}
			local := services.Set{Name: set.Name + "local", Proto: proto, Flags: maps.ServiceLocal, Backends: set.Backends, Frontends: []services.Frontend{
				{Addr: any, Port: 30081, Proto: proto, Scope: maps.ScopeExternal},
			}}
			sets = append(sets, set, local)
		}
	}
	if err := r.reconciler.Apply("test", sets); err != nil {
		t.Fatal(err)
	}
	if err := r.reconciler.Collect(); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) run(t testing.TB, program string, packet []byte) (uint32, []byte) {
	t.Helper()
	verdict, out, err := r.Program(program).Test(packet)
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	return verdict, out
}

type segment struct {
	from, to     netip.AddrPort
	proto        uint8
	flags        uint8 // of TCP
	noSum        bool  // UDP over IPv4 without checksum
	extension    bool  // IPv6 destination options before the transport header
	fragment     bool
	payload      []byte
	ipv4Options  bool
	wrongPayload int // added to the length that the header claims
}

// bytes builds the Ethernet frame with right checksums.
func (s segment) bytes() []byte {
	var l4 []byte
	sumAt := 16
	if s.proto == maps.TCP {
		l4 = make([]byte, 20)
		binary.BigEndian.PutUint32(l4[4:], 1000)
		l4[12], l4[13] = 5<<4, s.flags
	} else {
		sumAt = 6
		l4 = make([]byte, 8)
		binary.BigEndian.PutUint16(l4[4:], uint16(8+len(s.payload)))
	}
	binary.BigEndian.PutUint16(l4[0:], s.from.Port())
	binary.BigEndian.PutUint16(l4[2:], s.to.Port())
	l4 = append(l4, s.payload...)
	if !s.noSum {
		binary.BigEndian.PutUint16(l4[sumAt:], transportSum(s.from.Addr(), s.to.Addr(), s.proto, l4))
	}
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	if s.from.Addr().Is4() {
		ip := make([]byte, 20)
		if s.ipv4Options {
			ip = append(ip, 1, 1, 1, 0)
		}
		ip[0] = 4<<4 | byte(len(ip)/4)
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)+s.wrongPayload))
		if s.fragment {
			ip[6] = 0x20
		}
		ip[8], ip[9] = 64, s.proto
		copy(ip[12:], s.from.Addr().AsSlice())
		copy(ip[16:], s.to.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], ^fold(sum(0, ip)))
		return append(append(append(frame, 8, 0), ip...), l4...)
	}
	next := s.proto
	if s.extension {
		l4, next = append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, l4...), 60
	}
	if s.fragment {
		l4, next = append([]byte{next, 0, 0, 1, 0, 0, 0, 7}, l4...), 44
	}
	ip := make([]byte, 40)
	ip[0] = 6 << 4
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)+s.wrongPayload))
	ip[6], ip[7] = next, 64
	copy(ip[8:], s.from.Addr().AsSlice())
	copy(ip[24:], s.to.Addr().AsSlice())
	return append(append(append(frame, 0x86, 0xdd), ip...), l4...)
}

func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func transportSum(from, to netip.Addr, proto uint8, l4 []byte) uint16 {
	s := sum(sum(uint32(proto)+uint32(len(l4)), from.AsSlice()), to.AsSlice())
	return ^fold(sum(s, l4))
}

// same compares a packet with the one expected, bytes and checksums.
func same(t *testing.T, got []byte, want segment) {
	t.Helper()
	if w := want.bytes(); !bytes.Equal(got, w) {
		t.Errorf("the packet is\n% x, want\n% x", got, w)
	}
}

const (
	syn = 2
	ack = 16
)

// each runs f for every family and protocol.
func each(t *testing.T, f func(t *testing.T, r *rig, family int, s segment)) {
	for family, name := range []string{"IPv4", "IPv6"} {
		for proto, p := range map[uint8]string{maps.TCP: "TCP", maps.UDP: "UDP"} {
			t.Run(name+" "+p, func(t *testing.T) {
				f(t, newRig(t), family, segment{proto: proto, flags: syn, payload: []byte("odd")})
			})
		}
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func TestPacketPodToPod(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		s.from, s.to = at(podA[i], 4000), at(podB[i], 8080)
		v, out := r.run(t, "from_pod", s.bytes())
		if v != redirect {
			t.Errorf("verdict %d", v)
		}
		same(t, out, s)
		s.to = at(client[i], 80)
		if v, out = r.run(t, "from_pod", s.bytes()); v != next {
			t.Errorf("to the outside: verdict %d", v)
		}
		same(t, out, s)
		s.from = at(podC[i], 4000)
		if v, _ = r.run(t, "from_pod", s.bytes()); v != drop {
			t.Errorf("spoofed: verdict %d", v)
		}
	})
}

func TestPacketClusterIP(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		asked := s
		asked.from, asked.to = at(podA[i], 4000), at(vip[i], 80)
		for range 2 { // the first packet opens the flow, the second finds it
			v, out := r.run(t, "from_pod", asked.bytes())
			if v != redirect {
				t.Errorf("verdict %d", v)
			}
			want := asked
			want.to = at(podB[i], 8080)
			same(t, out, want)
		}
		answer := s
		answer.flags = syn | ack
		answer.from, answer.to = at(podB[i], 8080), at(podA[i], 4000)
		v, out := r.run(t, "from_pod", answer.bytes())
		if v != redirect {
			t.Errorf("verdict of the answer %d", v)
		}
		answer.from = at(vip[i], 80)
		same(t, out, answer)
	})
}

func TestPacketHairpin(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		s.from, s.to = at(podB[i], 4000), at(vip[i], 80)
		v, out := r.run(t, "from_pod", s.bytes())
		from := source(t, out)
		if v != redirect || from.Addr() != gateway[i] {
			t.Fatalf("verdict %d, source %s", v, from)
		}
		want := s
		want.from, want.to = from, at(podB[i], 8080)
		same(t, out, want)
		answer := s
		answer.from, answer.to = at(podB[i], 8080), from
		v, out = r.run(t, "from_pod", answer.bytes())
		if v != redirect {
			t.Errorf("verdict of the answer %d", v)
		}
		answer.from, answer.to = at(vip[i], 80), at(podB[i], 4000)
		same(t, out, answer)
	})
}

// source reads where a frame comes from.
func source(t *testing.T, b []byte) netip.AddrPort {
	t.Helper()
	if b[12] == 8 {
		a, _ := netip.AddrFromSlice(b[26:30])
		l4 := 14 + int(b[14]&15)*4
		return at(a, binary.BigEndian.Uint16(b[l4:]))
	}
	a, _ := netip.AddrFromSlice(b[22:38])
	return at(a, binary.BigEndian.Uint16(b[54:]))
}

func TestPacketNodePort(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		// Two clients with the same source port get different ports of the node's.
		var lent []netip.AddrPort
		for _, c := range []netip.Addr{client[i], client[i].Next()} {
			s.from, s.to = at(c, 4000), at(nodeIP[i], 30080)
			v, out := r.run(t, "from_outside", s.bytes())
			from := source(t, out)
			if v != redirect || from.Addr() != nodeIP[i] || from.Port() < 1024 || from.Port() >= 30000 {
				t.Fatalf("verdict %d, source %s", v, from)
			}
			want := s
			want.from, want.to = from, at(podB[i], 8080)
			same(t, out, want)
			_, again := r.run(t, "from_outside", s.bytes())
			if !bytes.Equal(out, again) {
				t.Error("the second packet went another way")
			}
			lent = append(lent, from)
		}
		if lent[0] == lent[1] {
			t.Errorf("both clients became %s", lent[0])
		}
		answer := s
		answer.from, answer.to = at(podB[i], 8080), lent[0]
		_, out := r.run(t, "from_pod", answer.bytes())
		answer.from, answer.to = at(nodeIP[i], 30080), at(client[i], 4000)
		same(t, out, answer)

		// The backend goes and another comes: a new connection from the same port follows.
		r.backends(t, podA)
		s.from = at(client[i], 4000)
		_, out = r.run(t, "from_outside", s.bytes())
		want := s
		want.from, want.to = source(t, out), at(podA[i], 8080)
		same(t, out, want)
	})
}

// A backend on another node gets the pods' gateway as the client, so that its answer takes the pods' way; one
// outside the cluster gets the node's address.
func TestPacketNodePortElsewhere(t *testing.T) {
	elsewhere := [2]netip.Addr{netip.MustParseAddr("10.142.7.9"), netip.MustParseAddr("fd73:6b65:a042:7::9")}
	outside := [2]netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:1::9")}
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		cfg := Config{ClusterCIDRs: clusterCIDRs, ServiceCIDRs: serviceCIDRs}
		if err := r.Maps().SetRanges(ranges(cfg, podCIDRs)); err != nil {
			t.Fatal(err)
		}
		for port, c := range []struct{ backend, client [2]netip.Addr }{{elsewhere, gateway}, {outside, nodeIP}, {podA, nodeIP}} {
			r.backends(t, c.backend)
			s.from, s.to = at(client[i], uint16(4000+port)), at(nodeIP[i], 30080)
			_, out := r.run(t, "from_outside", s.bytes())
			from := source(t, out)
			if from.Addr() != c.client[i] {
				t.Errorf("backend %s: the client is %s", c.backend[i], from)
			}
			want := s
			want.from, want.to = from, at(c.backend[i], 8080)
			same(t, out, want)
			answer := s
			answer.from, answer.to = at(c.backend[i], 8080), from
			_, out = r.run(t, "from_outside", answer.bytes())
			answer.from, answer.to = at(nodeIP[i], 30080), s.from
			same(t, out, answer)
		}
	})
}

func TestPacketLocalPolicy(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		s.from, s.to = at(client[i], 4000), at(nodeIP[i], 30081)
		v, out := r.run(t, "from_outside", s.bytes())
		if v != redirect {
			t.Errorf("verdict %d", v)
		}
		want := s
		want.to = at(podB[i], 8080)
		same(t, out, want)
		r.backends(t, [2]netip.Addr{})
		s.from = at(client[i], 4001)
		if v, _ = r.run(t, "from_outside", s.bytes()); v != drop {
			t.Errorf("without a local backend: verdict %d", v)
		}
		s.to = at(nodeIP[i], 30080)
		if v, out = r.run(t, "from_outside", s.bytes()); v != next {
			t.Errorf("without a backend: verdict %d", v)
		}
		same(t, out, s)
	})
}

// TestPacketShapes: what is unusual but right, and what is not right.
func TestPacketShapes(t *testing.T) {
	r := newRig(t)
	for i := range 2 {
		udp := segment{proto: maps.UDP, from: at(podA[i], 4000), to: at(vip[i], 80), payload: []byte("hello")}
		translated := func(name string, s segment) {
			t.Run(name, func(t *testing.T) {
				v, out := r.run(t, "from_pod", s.bytes())
				if v != redirect {
					t.Errorf("verdict %d", v)
				}
				s.to = at(podB[i], 8080)
				same(t, out, s)
			})
		}
		if i == 0 {
			s := udp
			s.noSum = true
			translated("UDP without checksum", s)
			s = udp
			s.ipv4Options = true
			translated("IPv4 options", s)
		} else {
			s := udp
			s.extension = true
			translated("IPv6 extension header", s)
		}
		s := udp
		s.wrongPayload = 1
		if v, _ := r.run(t, "from_pod", s.bytes()); v != drop {
			t.Errorf("length beyond the packet: verdict %d", v)
		}
		if v, out := r.run(t, "from_outside", s.bytes()); v != next || !bytes.Equal(out, s.bytes()) {
			t.Errorf("length beyond the packet, from outside: verdict %d", v)
		}
		// Cut anywhere, nothing is redirected: the header claims more than there is.
		for _, proto := range []uint8{maps.TCP, maps.UDP} {
			s = udp
			s.proto = proto
			whole := s.bytes()
			for n := []int{34, 54}[i]; n < len(whole); n++ { // the kernel takes no shorter test packet
				for _, program := range []string{"from_pod", "to_pod", "from_outside", "to_outside"} {
					v, out := r.run(t, program, whole[:n])
					if v == redirect || !bytes.Equal(out, whole[:n]) {
						t.Errorf("%s, %d of %d bytes: verdict %d", program, n, len(whole), v)
					}
				}
			}
		}
	}
	arp := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 6}, make([]byte, 28)...)
	if v, _ := r.run(t, "from_pod", arp); v != next {
		t.Errorf("ARP: verdict %d", v)
	}
	arp[13] = 7
	if v, _ := r.run(t, "from_pod", arp); v != drop {
		t.Errorf("unknown protocol from a pod: verdict %d", v)
	}
	if v, _ := r.run(t, "from_outside", arp); v != next {
		t.Errorf("unknown protocol from outside: verdict %d", v)
	}
}

// TestForget: a flow is deleted only if it is as it was read.
func TestForget(t *testing.T) {
	r := newRig(t)
	s := segment{proto: maps.TCP, flags: syn, from: at(podA[0], 4000), to: at(vip[0], 80)}
	r.run(t, "from_pod", s.bytes())
	flows, err := r.Flows()
	if err != nil || len(flows) != 2 {
		t.Fatalf("%d flows, %v", len(flows), err)
	}
	for tuple, f := range flows {
		if err := r.Forget(tuple, f.LastSeen+1); err != nil {
			t.Fatal(err)
		}
	}
	if flows, _ := r.Flows(); len(flows) != 2 {
		t.Fatal("a flow was deleted although a packet came")
	}
	gc := conntrack.Collector{Table: r.Loader, Lifetimes: conntrack.Lifetimes{}, Log: slog.New(slog.DiscardHandler)}
	eventually(t, "collection", func() error {
		if _, err := gc.Collect(); err != nil {
			return err
		}
		if flows, _ := r.Flows(); len(flows) != 0 {
			return fmt.Errorf("%d flows are left", len(flows))
		}
		return nil
	})
}

// FuzzPrograms: any bytes get a verdict, and only a redirected packet is changed.
func FuzzPrograms(f *testing.F) {
	r := newRigWith(f, loader.Config{NodePortMode: loader.DSR, XDP: loader.XDPGeneric})
	for i := range 2 {
		for _, proto := range []uint8{maps.TCP, maps.UDP} {
			for _, to := range []netip.AddrPort{at(vip[i], 80), at(nodeIP[i], 30080), at(podB[i], 8080)} {
				f.Add(segment{proto: proto, from: at(podA[i], 1), to: to, payload: []byte("x")}.bytes())
				f.Add(segment{proto: proto, from: at(client[i], 1), to: to, extension: true, fragment: true}.bytes())
				f.Add(tagged(segment{proto: proto, from: at(client[i], 1), to: to}, at(nodeIP[i], 30080)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) < 15 || len(packet) > 3000 {
			return
		}
		if verdict, out, err := r.Program("at_driver").Test(packet); err == nil && (verdict != xdpPass || !bytes.Equal(out, packet)) {
			t.Errorf("without a device to send by: XDP verdict %d", verdict)
		}
		for _, program := range []string{"from_pod", "to_pod", "from_outside", "to_outside"} {
			verdict, out, err := r.Program(program).Test(packet)
			if err != nil {
				continue // the kernel refuses some Ethernet headers before the program runs
			}
			switch verdict {
			case next, drop, redirect:
			default:
				t.Errorf("%s: verdict %d", program, verdict)
			}
			// What another node handed on loses the option that names its frontend, and nothing else.
			shorter := len(packet) - len(out)
			if untagged := program == "from_outside" && (shorter == 8 || shorter == 24); shorter != 0 && !untagged {
				t.Errorf("%s: %d bytes became %d", program, len(packet), len(out))
			}
		}
	})
}
