// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BenchmarkConnect measures new connections one after another through a ClusterIP and straight to the
// pod, beside two clean namespaces joined by a veth with nothing between them, and two pods whose
// devices only redirect. Runs are paired and
// alternate; the ratios are medians of the rounds'. Run it with -benchtime=30x or more.
func BenchmarkConnect(b *testing.B) {
	n := newNode(b)
	client, server := n.pod("client"), n.pod("server")
	acceptAll(b, server.ns)
	web := n.service("web", nil, server)
	eventually(b, "service", func() error { return client.ns.try(func() error { return connectTimes(web.v4, 1) }) })
	cleanClient, cleanServer := cleanPair(b)
	acceptAll(b, cleanServer)
	bareClient, bareServer := n.pod("bare-client"), n.pod("bare-server")
	bareAddr := netip.MustParseAddr("203.0.113.80") // of no pod: nobody refuses what nothing is known of
	bareServer.ns.do(b, func() error { return addr("eth0", netip.PrefixFrom(bareAddr, 32)) })
	n.onlyRedirect(b, bareClient, bareServer)
	acceptAll(b, bareServer.ns)

	const connections = 1000
	lines := []struct {
		name string
		from namespace
		to   netip.AddrPort
	}{
		{"clean", cleanClient, netip.MustParseAddrPort("198.51.100.2:8080")},
		{"redirect", bareClient.ns, at(bareAddr, 8080)},
		{"direct", client.ns, at(server.v4(), 8080)},
		{"clusterip", client.ns, web.v4},
	}
	took := make([][]float64, len(lines))
	b.ResetTimer()
	for round := range b.N {
		for i := range lines {
			k := (i + round) % len(lines) // no line always comes first
			l := lines[k]
			l.from.do(b, func() error {
				start := time.Now()
				err := connectTimes(l.to, connections)
				took[k] = append(took[k], time.Since(start).Seconds())
				return err
			})
		}
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	for k, l := range lines {
		rates, ratios := make([]float64, b.N), make([]float64, b.N)
		for r := range b.N {
			rates[r] = connections / took[k][r]
			ratios[r] = took[0][r] / took[k][r]
		}
		b.ReportMetric(median(rates), l.name+"/s")
		if k > 0 {
			b.ReportMetric(median(ratios), l.name+":clean")
		}
	}
}

// onlyRedirect takes skep's programs off two pods' devices, for ones that do nothing but hand every packet
// to the other pod: what is left of the way is the kernel's.
func (n *testNode) onlyRedirect(b *testing.B, p, q *testPod) {
	for _, ends := range [][2]*testPod{{p, q}, {q, p}} {
		if err := n.dp.DetachEndpoint(b.Context(), ends[0].Endpoint); err != nil {
			b.Fatal(err)
		}
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "only_redirect", Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{
				asm.Mov.Imm(asm.R1, int32(ends[1].Ifindex)), asm.Mov.Imm(asm.R2, 0), asm.FnRedirectPeer.Call(), asm.Return(),
			},
		})
		if err != nil {
			b.Fatal(err)
		}
		defer program.Close()
		l, err := link.AttachTCX(link.TCXOptions{Interface: ends[0].Ifindex, Program: program, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { l.Close() })
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// cleanPair makes two namespaces, 198.51.100.1 and .2, with a veth between them.
func cleanPair(b *testing.B) (client, server namespace) {
	client, server = newNamespace(b), newNamespace(b)
	client.do(b, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(server)}
		return errors.Join(netlink.LinkAdd(v), up("eth0"), addr("eth0", netip.MustParsePrefix("198.51.100.1/24")))
	})
	server.do(b, func() error {
		return errors.Join(up("eth0"), addr("eth0", netip.MustParsePrefix("198.51.100.2/24")))
	})
	return client, server
}

// acceptAll takes connections on port 8080 and waits for their end, on a thread of its own.
func acceptAll(b *testing.B, ns namespace) {
	var fd int
	ns.do(b, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: 8080}), unix.Listen(fd, 1024))
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			unix.Close(c)
		}
	}()
	b.Cleanup(func() {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR)
		<-done
		unix.Close(fd)
	})
}

// connectTimes makes connections one after another. They end with a reset, so that no port waits.
func connectTimes(to netip.AddrPort, times int) error {
	sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	for range times {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err = unix.Connect(fd, sa); err == nil {
			err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}
