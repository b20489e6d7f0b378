// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
)

// Verdicts of XDP programs.
const (
	xdpPass = 2
	xdpTx   = 3
)

// newXDPRig is a rig whose packets come by a device eth0 with a known neighbour, who leads to pods elsewhere.
func newXDPRig(t *testing.T) (*rig, int) {
	t.Helper()
	outside := newNamespace(t)
	index := 0
	namespace(0).do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		if err := errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(outside)}), up("lo"), up("eth0"),
			addr("eth0", netip.PrefixFrom(nodeV4, 24)), addr("eth0", netip.PrefixFrom(nodeV6, 64)),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0)); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		index = eth0.Attrs().Index
		for i, a := range []netip.Addr{outsideV4, outsideV6} {
			neigh := &netlink.Neigh{LinkIndex: index, IP: a.AsSlice(), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}, State: netlink.NUD_PERMANENT}
			err = errors.Join(err, netlink.NeighAdd(neigh), routeVia("eth0", podC[i], a, netip.Addr{}))
		}
		return err
	})
	outside.do(t, func() error { return up("eth0") })
	t.Cleanup(func() {
		if l, err := netlink.LinkByIndex(index); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	r := newRigWith(t, loader.Config{XDP: loader.XDPAuto})
	if mode, err := r.AttachXDP(index); err != nil || mode != loader.XDPGeneric {
		t.Fatalf("a veth gets XDP %s, %v", mode, err)
	}
	return r, index
}

// atDriver runs the program for the driver on a packet that comes by a device.
func (r *rig) atDriver(t *testing.T, device int, packet []byte) (uint32, []byte) {
	t.Helper()
	out := make([]byte, len(packet)+256)
	opts := &ebpf.RunOptions{Data: packet, DataOut: out, Context: struct{ Data, End, Meta, Ifindex, Queue, Egress uint32 }{End: uint32(len(packet)), Ifindex: uint32(device)}}
	verdict, err := r.Program("at_driver").Run(opts)
	if err != nil {
		t.Fatal(err)
	}
	return verdict, opts.DataOut
}

// TestPacketXDP: what is for backends elsewhere leaves from the driver, as the traffic control hook would have sent it,
// and both continue each other's flows; all else is passed on untouched.
func TestPacketXDP(t *testing.T) {
	each(t, func(t *testing.T, _ *rig, i int, s segment) {
		r, eth0 := newXDPRig(t)
		r.backends(t, podC)
		sent := func(what string, got []byte, want segment) {
			t.Helper()
			w := want.bytes()
			copy(w[:6], []byte{2, 0, 0, 0, 0, 9})
			copy(w[6:12], got[6:12]) // the device's own
			if !bytes.Equal(got, w) {
				t.Errorf("%s: sent as\n% x, want\n% x", what, got, w)
			}
		}
		passed := func(what string, frame []byte) {
			t.Helper()
			if v, out := r.atDriver(t, eth0, frame); v != xdpPass || !bytes.Equal(out, frame) {
				t.Errorf("%s: verdict %d, changed: %t", what, v, !bytes.Equal(out, frame))
			}
		}
		s.from, s.to = at(client[i], 4000), at(nodeIP[i], 30080)
		v, out := r.atDriver(t, eth0, s.bytes())
		lent := source(t, out)
		if v != xdpTx || lent.Addr() != nodeIP[i] {
			t.Fatalf("verdict %d, source %s", v, lent)
		}
		want := s
		want.from, want.to = lent, at(podC[i], 8080)
		sent("first", out, want)
		_, again := r.atDriver(t, eth0, s.bytes())
		if !bytes.Equal(out, again) {
			t.Error("the second packet went another way")
		}
		_, out = r.run(t, "from_outside", s.bytes())
		same(t, out, want)
		answer, answered := s, s
		answer.flags = syn | ack
		answered.flags = answer.flags
		answer.from, answer.to = want.to, want.from
		answered.from, answered.to = s.to, s.from
		v, out = r.atDriver(t, eth0, answer.bytes())
		if v != xdpTx {
			t.Errorf("verdict of the answer %d", v)
		}
		sent("answer", out, answered)
		if s.proto == maps.UDP && i == 0 {
			s.noSum, want.noSum = true, true
			_, out = r.atDriver(t, eth0, s.bytes())
			sent("without checksum", out, want)
			s.noSum = false
		}
		if n := counted(t, r, func(c flows.Counter) bool { return c.Labels["path"] == "driver" }); n < 3 {
			t.Errorf("%d packets counted", n)
		}

		unfinished := s.bytes()
		l4 := []int{34, 54}[i]
		at16 := l4 + map[uint8]int{maps.TCP: 16, maps.UDP: 6}[s.proto]
		pseudo := sum(sum(uint32(s.proto)+uint32(len(unfinished)-l4), s.from.Addr().AsSlice()), s.to.Addr().AsSlice())
		binary.BigEndian.PutUint16(unfinished[at16:], fold(pseudo))
		passed("a checksum that a device is to finish", unfinished)
		large := s
		large.payload = make([]byte, 1480)
		passed("too large for the link", large.bytes())
		passed("a fragment", fragment(s, 1, true))
		for n := []int{34, 54}[i]; n < len(s.bytes()); n++ {
			passed(fmt.Sprintf("cut after %d bytes", n), s.bytes()[:n])
		}
		other := s
		other.to = at(nodeIP[i], 22)
		passed("no service", other.bytes())
		r.backends(t, podB)
		other.from, other.to = at(client[i], 4001), s.to
		passed("a backend of this node", other.bytes())
		r.backends(t, [2]netip.Addr{})
		passed("no backend", other.bytes())
		r.backends(t, [2]netip.Addr{podC[0].Next(), podC[1].Next()}) // no route leads there
		other.from = at(client[i], 4002)
		passed("a backend without a known neighbour", other.bytes())
		if err := r.DetachXDP(eth0); err != nil {
			t.Fatal(err)
		}
		passed("a device that XDP cannot send by", s.bytes())
	})
}

// passAll puts a program that does nothing on the other end of a veth: only then does one end send from XDP.
func passAll(t *testing.T, ns namespace, device string) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	ns.do(t, func() error {
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		x, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: l.Attrs().Index, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { x.Close() })
		}
		return errors.Join(err, finishChecksums(device))
	})
}

// finishChecksums makes a device's sender compute whole checksums, as those are that come from a wire.
func finishChecksums(device string) error {
	if err := ethtool(device, 0x17, 0); err != nil { // ETHTOOL_STXCSUM
		return fmt.Errorf("checksums of %s: %w", device, err)
	}
	return nil
}

// ethtool gives a command of <linux/ethtool.h> that takes one value.
func ethtool(device string, command, to uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ cmd, value uint32 }{command, to}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:], device)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return errno
	}
	return nil
}

// TestXDP: on veths in native mode, with real sockets; and an agent that starts puts its program in the place of the old.
func TestXDP(t *testing.T) {
	n := newNodeOf(t, func(c *Config) { c.XDP = loader.XDPNative })
	pod, other := n.elsewhere(1500)
	passAll(t, n.outside, "eth0")
	passAll(t, other, "eth1")
	serve(t, other, "far", 8080)
	web := n.service("web", nil)
	n.endpointsAt("web", 8080, pod)
	for _, network := range []string{"tcp", "udp"} {
		for i := range 2 {
			to := web.at(nodeIP[i])
			eventually(t, "service", func() error { _, _, err := n.askAs(n.outside, network, to); return err })
			before := counted(t, tables{n.dp.maps}, func(c flows.Counter) bool { return c.Labels["path"] == "driver" })
			name, seen, err := n.askAs(n.outside, network, to)
			if name != "far" || seen.Addr() != gateway[i] {
				t.Errorf("%s %s: %q saw %s, %v", network, to, name, seen, err)
			}
			if after := counted(t, tables{n.dp.maps}, func(c flows.Counter) bool { return c.Labels["path"] == "driver" }); after < before+2 {
				t.Errorf("%s %s: %d packets at the driver", network, to, after-before)
			}
		}
	}
	ids := func() (out []link.ID) {
		for _, entry := range n.pins("xdp-native_") {
			l, err := link.LoadPinnedLink(entry, nil)
			if err != nil {
				t.Fatal(err)
			}
			info, err := l.Info()
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, info.ID)
			l.Close()
		}
		return out
	}
	before := ids()
	if len(before) != 2 {
		t.Fatalf("links %v", before)
	}
	n.stop()
	if name, _, err := n.askAs(n.outside, "tcp", web.at(nodeV4)); name != "far" {
		t.Errorf("without an agent: %q, %v", name, err)
	}
	n.start()
	if after := ids(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("links were %v, are %v", before, after)
	}
	if name, _, err := n.askAs(n.outside, "udp", web.at(nodeV6)); name != "far" {
		t.Errorf("with another agent: %q, %v", name, err)
	}
	n.stop()
	n.cfg.XDP = loader.XDPOff
	n.start()
	if after := ids(); len(after) != 0 {
		t.Errorf("links %v are left", after)
	}
	if name, _, err := n.askAs(n.outside, "tcp", web.at(nodeV4)); name != "far" {
		t.Errorf("off: %q, %v", name, err)
	}
}

// TestXDPGeneric: before the stack, whether a packet's checksum is whole or a device is to finish it.
func TestXDPGeneric(t *testing.T) {
	n := newNodeOf(t, func(c *Config) { c.XDP = loader.XDPGeneric })
	pod, other := n.elsewhere(1500)
	serve(t, other, "far", 8080)
	web := n.service("web", nil)
	n.endpointsAt("web", 8080, pod)
	atDriver := func() uint64 {
		return counted(t, tables{n.dp.maps}, func(c flows.Counter) bool { return c.Labels["path"] == "driver" })
	}
	ask := func() {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			for i := range 2 {
				to := web.at(nodeIP[i])
				eventually(t, "service", func() error { _, _, err := n.askAs(n.outside, network, to); return err })
				if name, seen, err := n.askAs(n.outside, network, to); name != "far" || seen.Addr() != gateway[i] {
					t.Errorf("%s %s: %q saw %s, %v", network, to, name, seen, err)
				}
			}
		}
	}
	ask()
	before := atDriver()
	for ns, device := range map[namespace]string{n.outside: "eth0", other: "eth1"} {
		ns.do(t, func() error { return finishChecksums(device) })
	}
	ask()
	if after := atDriver(); after < before+20 {
		t.Errorf("%d packets before the stack", after-before)
	}
}

// tables are the maps of a running data plane.
type tables struct{ m *maps.Maps }

func (t tables) Maps() *maps.Maps { return t.m }

// pins lists pinned links by the beginning of their names.
func (n *testNode) pins(prefix string) (out []string) {
	n.t.Helper()
	dir := n.cfg.BPFDir + "/links"
	entries, err := os.ReadDir(dir)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			out = append(out, dir+"/"+e.Name())
		}
	}
	return out
}
