// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
)

// BenchmarkNodePort sends datagrams of 1,024 flows to a node's port whose backend is on another machine, and counts what
// arrives there: with skep's program at XDP, with that at tc, beside kube-proxy's rules in nftables and iptables, and beside
// a router that does nothing to them. Sender, node and receiver share one core: the sender is an XDP program that the kernel
// runs on frames of its own (BPF_F_TEST_XDP_LIVE_FRAMES), the receiver one that counts and drops, so nearly all
// of the core is the node's. Rounds alternate; -benchtime=5x or more.
func BenchmarkNodePort(b *testing.B) {
	if testing.Short() {
		b.Skip("half a minute")
	}
	const nodePort = 30001
	n := newNodeOf(b, func(c *Config) { c.XDP = loader.XDPNative })
	pod, other := n.elsewhere(1500)
	web := n.service("web", nil)
	n.endpointsAt("web", 8080, pod)
	if web.node != nodePort {
		b.Fatalf("node port %d", web.node)
	}
	ours := newFlood(b, n.outside, 0, other, netip.AddrPortFrom(nodeV4, nodePort))

	service := []proxied{{peerService, nodePort, "udp", routedServer}}
	peer := func(to netip.AddrPort, rules string, command ...string) *flood {
		r := newRouter(b)
		if rules != "" {
			r.feed(b, rules, command...)
		}
		return newFlood(b, r.client, r.ns, r.server, to)
	}
	lines := []struct {
		name string
		mode loader.XDPMode
		*flood
	}{
		{"xdp", loader.XDPNative, ours},
		{"tc", loader.XDPOff, ours},
		{"nftables", "", peer(netip.AddrPortFrom(nodeV4, nodePort), kubeProxyNFT(service), "nft", "-f", "-")},
		{"iptables", "", peer(netip.AddrPortFrom(nodeV4, nodePort), kubeProxyIPTables(service), "iptables-restore")},
		{"routed", "", peer(routedServer, "")},
	}
	rates := make([][]float64, len(lines))
	for round := range b.N {
		for i := range lines {
			l := &lines[(i+round)%len(lines)]
			if l.mode != "" && n.cfg.XDP != l.mode {
				n.stop()
				n.cfg.XDP = l.mode
				n.start()
			}
			l.warm(b)
			k := (i + round) % len(lines)
			rates[k] = append(rates[k], l.rate(b, 500*time.Millisecond))
		}
	}
	b.ReportMetric(0, "ns/op")
	for k, l := range lines {
		b.ReportMetric(median(rates[k]), l.name+"-packets/s")
	}
}

// flood is a sender and a receiver.
type flood struct {
	from    namespace
	device  int
	program *ebpf.Program
	arrived *ebpf.Map
	frame   []byte
}

// newFlood sends by eth0 of from what middle receives by its eth0, and counts at eth1 of server what is for the backend.
func newFlood(b *testing.B, from, middle, server namespace, to netip.AddrPort) *flood {
	b.Helper()
	f := &flood{from: from}
	index := func(name string) (i int, mac []byte) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			b.Error(err)
			return 0, nil
		}
		return l.Attrs().Index, l.Attrs().HardwareAddr
	}
	var macs []byte
	middle.do(b, func() error {
		_, mac := index("eth0")
		macs = append(macs, mac...)
		return ethtool("eth0", 0x2c, 1) // ETHTOOL_SGRO: without it, or a program, a veth takes nothing from XDP
	})
	from.do(b, func() error {
		var mac []byte
		f.device, mac = index("eth0")
		macs = append(macs, mac...)
		return nil
	})
	s := segment{from: netip.AddrPortFrom(outsideV4, 0), to: to, proto: maps.UDP, payload: make([]byte, 22)}
	f.frame = s.bytes()
	copy(f.frame, macs)
	f.program = xdpProgram(b, floodFrames(f.frame, f.device))
	var err error
	if f.arrived, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.arrived.Close() })
	attachXDP(b, server, "eth1", xdpProgram(b, countDatagrams(f.arrived.FD(), 8080)))
	return f
}

func xdpProgram(b *testing.B, code asm.Instructions) *ebpf.Program {
	b.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: code})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

func attachXDP(b *testing.B, ns namespace, device string, p *ebpf.Program) {
	b.Helper()
	ns.do(b, func() error {
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		x, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: l.Attrs().Index, Flags: link.XDPDriverMode})
		if err == nil {
			b.Cleanup(func() { x.Close() })
		}
		return err
	})
}

// floodFrames writes the frame anew, as the kernel uses its pages again with what became of them, with one of 1,024 source
// ports; the first two bytes of the payload are the port's complement, so the checksum holds for all.
func floodFrames(frame []byte, device int) asm.Instructions {
	out := asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 0, asm.Word),
		asm.LoadMem(asm.R2, asm.R1, 4, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Add.Imm(asm.R3, int32(len(frame))),
		asm.JGT.Reg(asm.R3, asm.R2, "short"),
		asm.FnGetPrandomU32.Call(),
		asm.And.Imm(asm.R0, 1023),
		asm.Add.Imm(asm.R0, 20000),
	}
	for at := 0; at < len(frame); at += 8 {
		out = append(out, asm.LoadImm(asm.R4, int64(binary.LittleEndian.Uint64(frame[at:])), asm.DWord), asm.StoreMem(asm.R7, int16(at), asm.R4, asm.DWord))
	}
	return append(out,
		asm.StoreMem(asm.R7, 34, asm.R0, asm.Half),
		asm.Xor.Imm(asm.R0, 0xffff),
		asm.StoreMem(asm.R7, 42, asm.R0, asm.Half),
		asm.Mov.Imm(asm.R1, int32(device)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("short"), // XDP_DROP
		asm.Return(),
	)
}

// countDatagrams counts and drops UDP over IPv4 to a port, and passes the rest.
func countDatagrams(counter int, port uint16) asm.Instructions {
	big := int32(port>>8 | port<<8)
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 42),
		asm.JGT.Reg(asm.R4, asm.R3, "pass"),
		asm.LoadMem(asm.R5, asm.R2, 12, asm.Half),
		asm.JNE.Imm(asm.R5, 0x0008, "pass"), // ETH_P_IP
		asm.LoadMem(asm.R5, asm.R2, 23, asm.Byte),
		asm.JNE.Imm(asm.R5, maps.UDP, "pass"),
		asm.LoadMem(asm.R5, asm.R2, 36, asm.Half),
		asm.JNE.Imm(asm.R5, big, "pass"),
		asm.StoreImm(asm.R10, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, counter),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("pass"),
		asm.Return(),
	}
}

// send sends so many frames from the thread that calls it.
func (f *flood) send(packets uint32) error {
	_, err := f.program.Run(&ebpf.RunOptions{
		Data: f.frame, Repeat: packets, Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES,
		Context: struct{ Data, End, Meta, Ifindex, Queue, Egress uint32 }{End: uint32(len(f.frame)), Ifindex: uint32(f.device)},
	})
	return err
}

func (f *flood) count() (n uint64, err error) { return n, f.arrived.Lookup(uint32(0), &n) }

// warm sends until the way is known: neighbours and all flows.
func (f *flood) warm(b *testing.B) {
	b.Helper()
	eventually(b, "the first datagram", func() error {
		before, err := f.count()
		if err == nil {
			err = f.from.try(func() error { return f.send(16384) })
		}
		if err != nil {
			b.Fatal(err)
		}
		if after, _ := f.count(); after-before < 8192 {
			return fmt.Errorf("%d of 16384 datagrams arrived", after-before)
		}
		return nil
	})
}

// rate sends for so long, on one core, and says how many a second arrived.
func (f *flood) rate(b *testing.B, long time.Duration) float64 {
	b.Helper()
	var rate float64
	f.from.do(b, func() error {
		var one, all unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			return err
		}
		for cpu := range runtime.NumCPU() * 64 { // the last that this process may use
			if all.IsSet(cpu) {
				one.Zero()
				one.Set(cpu)
			}
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil { // the thread ends with its goroutine
			return err
		}
		before, err := f.count()
		if err != nil {
			return err
		}
		begin := time.Now()
		for time.Since(begin) < long {
			if err := f.send(1 << 19); err != nil {
				return err
			}
		}
		took := time.Since(begin)
		after, err := f.count()
		rate = float64(after-before) / took.Seconds()
		return err
	})
	return rate
}
