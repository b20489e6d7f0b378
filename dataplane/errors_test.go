// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// icmpError is the frame of an ICMP error of each family about a quoted IP packet, with right checksums.
func icmpError(from, to netip.Addr, kind [2]byte, quoted []byte) []byte {
	proto, k := uint8(unix.IPPROTO_ICMP), kind[0]
	if from.Is6() {
		proto, k = unix.IPPROTO_ICMPV6, kind[1]
	}
	message := append([]byte{k, 1, 0, 0, 0, 0, 5, 0}, quoted...)
	check := ^fold(sum(0, message))
	if from.Is6() {
		check = transportSum(from, to, proto, message)
	}
	binary.BigEndian.PutUint16(message[2:], check)
	return ip(from, to, proto, message)
}

// Types of errors, by family.
var (
	unreachable  = [2]byte{3, 1}
	tooBigFor    = [2]byte{3, 2}
	timeExceeded = [2]byte{11, 3}
	parameter    = [2]byte{12, 4}
	errorKinds   = [][2]byte{unreachable, tooBigFor, timeExceeded, parameter}
)

// TestPacketErrors: an ICMP error about a translated packet reaches its sender under the addresses that it
// knows, whichever way the flow was opened, and with all checksums right.
func TestPacketErrors(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		headers := []int{34, 54}[i]
		quotes := map[string]int{"whole": 0, "8 bytes of the transport": headers + 8, "to the checksum": headers + 18}
		check := func(name, program string, verdict uint32, got func(quoted []byte) []byte, sent segment, want func(quoted []byte) []byte, asSent segment) {
			t.Helper()
			for size, n := range quotes {
				was, becomes := sent.bytes(), asSent.bytes()
				if n != 0 && n < len(was) {
					was, becomes = was[:n], becomes[:n]
				}
				v, out := r.run(t, program, got(was[14:]))
				if v != verdict {
					t.Errorf("%s, %s: verdict %d", name, size, v)
				}
				w := want(becomes[14:])
				// As RFC 792 has it, a checksum that is not quoted cannot be mended; what is quoted is.
				if !bytes.Equal(out, w) {
					t.Errorf("%s, %s: the packet is\n% x, want\n% x", name, size, out, w)
				}
			}
		}
		router := client[i].Next()
		asked := s
		asked.from, asked.to = at(client[i], 4000), at(nodeIP[i], 30080)
		_, out := r.run(t, "from_outside", asked.bytes())
		lent := source(t, out)
		forwarded := s
		forwarded.from, forwarded.to = lent, at(podB[i], 8080)
		answer, answered := s, s
		answer.from, answer.to = at(podB[i], 8080), lent
		answered.from, answered.to = at(nodeIP[i], 30080), at(client[i], 4000)
		for _, kind := range errorKinds {
			check("NodePort, from the backend", "from_pod", next,
				func(q []byte) []byte { return icmpError(podB[i], nodeIP[i], kind, q) }, forwarded,
				func(q []byte) []byte { return icmpError(nodeIP[i], client[i], kind, q) }, asked)
			check("NodePort, from a router before the client", "from_outside", redirect,
				func(q []byte) []byte { return icmpError(router, nodeIP[i], kind, q) }, answered,
				func(q []byte) []byte { return icmpError(nodeIP[i], podB[i], kind, q) }, answer)
		}
		local := s
		local.from, local.to = at(client[i], 4001), at(nodeIP[i], 30081)
		r.run(t, "from_outside", local.bytes())
		answer.to = local.from
		answered.from, answered.to = local.to, local.from
		check("policy Local keeps the router's name", "from_outside", redirect,
			func(q []byte) []byte { return icmpError(router, nodeIP[i], tooBigFor, q) }, answered,
			func(q []byte) []byte { return icmpError(router, podB[i], tooBigFor, q) }, answer)

		asked.from, asked.to = at(podA[i], 4000), at(vip[i], 80)
		r.run(t, "from_pod", asked.bytes())
		forwarded.from, forwarded.to = asked.from, at(podB[i], 8080)
		fromPod := func(q []byte) []byte { return icmpError(podB[i], podA[i], unreachable, q) }
		fromVIP := func(q []byte) []byte { return icmpError(vip[i], podA[i], unreachable, q) }
		check("ClusterIP", "from_pod", redirect, fromPod, forwarded, fromVIP, asked)
		check("ClusterIP, from another node", "from_outside", redirect, fromPod, forwarded, fromVIP, asked)
		check("ClusterIP, through the stack", "to_pod", next, fromPod, forwarded, fromVIP, asked)
		if s.proto == maps.UDP && i == 0 {
			asked.noSum, forwarded.noSum = true, true
			check("UDP without checksum", "from_pod", redirect, fromPod, forwarded, fromVIP, asked)
			asked.noSum, forwarded.noSum = false, false
		}

		// What is not about such a flow is left alone, and so is what is cut.
		untouched := func(name, program string, frame []byte) {
			t.Helper()
			for _, p := range []string{program, "to_outside"} {
				if v, out := r.run(t, p, frame); v == drop || !bytes.Equal(out, frame) {
					t.Errorf("%s: %s changed the packet, verdict %d", name, p, v)
				}
			}
		}
		stranger := forwarded
		stranger.from = at(podA[i], 4999)
		untouched("another flow", "from_pod", fromPod(stranger.bytes()[14:]))
		untouched("to another than the quoted sender", "from_outside", icmpError(router, podB[i], unreachable, forwarded.bytes()[14:]))
		untouched("no error", "from_pod", icmpError(podB[i], podA[i], [2]byte{8, 128}, forwarded.bytes()[14:]))
		whole := fromPod(forwarded.bytes()[14:])
		for n := headers; n < headers+8+headers-14+8; n++ {
			frame := ip(podB[i], podA[i], whole[[]int{23, 20}[i]], whole[headers:n])
			untouched(fmt.Sprintf("cut after %d bytes", n), "from_pod", frame)
		}
		if n := counted(t, r, func(c flows.Counter) bool { return c.Metric == "skep_dataplane_translated_errors_total" }); n < 30 {
			t.Errorf("%d errors counted", n)
		}
	})
}

// TestPacketFragments: later fragments go where the first of their datagram went, both ways, and nowhere else.
func TestPacketFragments(t *testing.T) {
	for i, name := range []string{"IPv4", "IPv6"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			through := func(what, program string, verdict uint32, from, to, becomesFrom, becomesTo netip.AddrPort, id uint16) {
				t.Helper()
				for _, first := range []bool{true, false, false} {
					got := fragment(segment{from: from, to: to}, id, first)
					want := fragment(segment{from: becomesFrom, to: becomesTo}, id, first)
					v, out := r.run(t, program, got)
					if v != verdict {
						t.Errorf("%s, first %t: verdict %d", what, first, v)
					}
					if !bytes.Equal(out, want) {
						t.Errorf("%s, first %t: the packet is\n% x, want\n% x", what, first, out, want)
					}
				}
			}
			pod, backend, service := at(podA[i], 4000), at(podB[i], 8080), at(vip[i], 80)
			through("ClusterIP", "from_pod", redirect, pod, service, pod, backend, 1)
			through("its answer", "from_pod", redirect, backend, pod, service, pod, 2)
			through("its answer, through the stack", "to_pod", next, backend, pod, service, pod, 3)

			asked, node := at(client[i], 4000), at(nodeIP[i], 30080)
			_, out := r.run(t, "from_outside", fragment(segment{from: asked, to: node}, 4, true))
			l4 := []int{34, 62}[i]
			lent := at(nodeIP[i], binary.BigEndian.Uint16(out[l4:]))
			if lent.Port() < 1024 || lent.Port() >= 30000 {
				t.Fatalf("lent port %s", lent)
			}
			through("NodePort", "from_outside", redirect, asked, node, lent, backend, 4)
			through("its answer", "from_pod", next, backend, lent, node, asked, 5)

			// Nobody can put together what is for a service without its first piece.
			if v, _ := r.run(t, "from_pod", fragment(segment{from: pod, to: service}, 9, false)); v != next {
				t.Errorf("without a first piece, no service range: verdict %d", v)
			}
			if err := r.Maps().SetRanges(ranges(Config{ClusterCIDRs: clusterCIDRs, ServiceCIDRs: serviceCIDRs}, podCIDRs)); err != nil {
				t.Fatal(err)
			}
			if v, _ := r.run(t, "from_pod", fragment(segment{from: pod, to: service}, 9, false)); v != drop {
				t.Errorf("without a first piece: verdict %d", v)
			}
			if err := r.Maps().SetAnnounced(maps.AnnouncedKey{Addr: maps.AddressOf(vip[i]), Ifindex: 1}, maps.Announced{}); err != nil {
				t.Fatal(err)
			}
			if v, _ := r.run(t, "from_outside", fragment(segment{from: asked, to: service}, 9, false)); v != drop {
				t.Errorf("without a first piece, announced: verdict %d", v)
			}
			if v, out := r.run(t, "from_outside", fragment(segment{from: asked, to: node}, 9, false)); v != next || !bytes.Equal(out, fragment(segment{from: asked, to: node}, 9, false)) {
				t.Errorf("without a first piece, to the node, which may have one: verdict %d", v)
			}
			if n := drops(t, r, "fragment-before-first"); n != 2 {
				t.Errorf("%d fragments dropped", n)
			}
		})
	}
}

// strangers are what a process that the socket programs do not see can be asked for.
var strangers = map[string]func(to netip.AddrPort) (string, error){
	"refused": refused, "mtu": learnMTU, "large": largeDatagram, "large-answer": largeAnswer,
	"kept": keptOpen,
}

func dialUDP(to netip.AddrPort, discover int) (*net.UDPConn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) {
			if to.Addr().Is4() {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discover)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, discover)
			}
		}), err)
	}}
	c, err := d.Dial("udp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), c.SetDeadline(time.Now().Add(5 * time.Second))
}

// refused asks until the answer is that nobody listens.
func refused(to netip.AddrPort) (string, error) {
	c, err := dialUDP(to, unix.IP_PMTUDISC_WANT)
	if err != nil {
		return "", err
	}
	defer c.Close()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		_, err := c.Write([]byte("hello"))
		if err == nil {
			_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, err = c.Read(make([]byte, 100))
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return "refused", nil
		}
	}
	return "", errors.New("nobody said that the port is closed")
}

// learnMTU sends what is too large until the socket knows the path's MTU, and then what fits.
func learnMTU(to netip.AddrPort) (string, error) {
	c, err := dialUDP(to, unix.IP_PMTUDISC_DO)
	if err != nil {
		return "", err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	buf := make([]byte, 2000)
	for range 100 {
		mtu := 0
		if err := raw.Control(func(fd uintptr) {
			if to.Addr().Is4() {
				mtu, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
			} else {
				mtu, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
			}
		}); err != nil {
			return "", err
		}
		size := mtu - 28
		if to.Addr().Is6() {
			size = mtu - 48
		}
		if _, err := c.Write(buf[:size]); err != nil {
			continue // it has just learned better
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Read(buf); err == nil {
			return strconv.Itoa(mtu), nil
		}
	}
	return "", errors.New("no answer: the path's MTU was not learned")
}

// largeDatagram sends one that has to be fragmented and expects it back.
func largeDatagram(to netip.AddrPort) (string, error) {
	c, err := dialUDP(to, unix.IP_PMTUDISC_DONT)
	if err != nil {
		return "", err
	}
	defer c.Close()
	sent, got := bytes.Repeat([]byte("0123456789"), 500), make([]byte, 9000)
	for range 50 {
		if _, err := c.Write(sent); err != nil {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := c.Read(got); err == nil {
			if !bytes.Equal(got[:n], sent) {
				return "", fmt.Errorf("%d bytes came back, not those sent", n)
			}
			return "same", nil
		}
	}
	return "", errors.New("no answer")
}

// largeAnswer asks until an answer comes that the server made smaller because it was told to.
func largeAnswer(to netip.AddrPort) (string, error) {
	c, err := dialUDP(to, unix.IP_PMTUDISC_DO)
	if err != nil {
		return "", err
	}
	defer c.Close()
	buf := make([]byte, 9000)
	for range 100 {
		if _, err := c.Write([]byte("hello")); err != nil {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := c.Read(buf); err == nil {
			return strconv.Itoa(n), nil
		}
	}
	return "", errors.New("no answer: the backend never learned the path's MTU")
}

// serveUDP answers each datagram in a namespace with what answer makes of it; the answer may not be fragmented
// if whole is set.
func serveUDP(t testing.TB, ns namespace, port uint16, whole bool, answer func(c *net.UDPConn, b []byte, from netip.AddrPort)) {
	t.Helper()
	ns.do(t, func() error {
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		if whole {
			raw, err := c.SyscallConn()
			if err != nil {
				return err
			}
			var inner error
			err = raw.Control(func(fd uintptr) {
				inner = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO),
					unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO))
			})
			if err = errors.Join(err, inner); err != nil {
				return err
			}
		}
		go func() {
			buf := make([]byte, 9000)
			for {
				n, from, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				answer(c, buf[:n], from)
			}
		}()
		return nil
	})
}

func echo(c *net.UDPConn, b []byte, from netip.AddrPort) { _, _ = c.WriteToUDPAddrPort(b, from) }

// largest answers with as much as may be sent whole, of two sizes.
func largest(c *net.UDPConn, _ []byte, from netip.AddrPort) {
	if _, err := c.WriteToUDPAddrPort(make([]byte, 1340), from); errors.Is(err, syscall.EMSGSIZE) {
		_, _ = c.WriteToUDPAddrPort(make([]byte, 1200), from)
	}
}

func (n *testNode) wantStranger(from namespace, question string, to netip.AddrPort, want string) {
	n.t.Helper()
	out, err := n.stranger(from, question+" "+to.String())
	if got := strings.TrimSpace(out); err != nil || got != want {
		n.t.Errorf("%s %s: %q, %v, want %s", question, to, got, err, want)
	}
}

// TestErrors: with real sockets: closed ports and large datagrams through NodePorts and ClusterIPs.
func TestErrors(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serveUDP(t, b.ns, 9090, false, echo)
	web := n.service("web", nil, b) // nobody listens on 8080
	open := n.service("open", nil)
	n.endpointsAt("open", 9090, [2]netip.Addr{b.v4(), b.v6()})
	for i, vip := range []netip.AddrPort{web.v4, web.v6} {
		n.wantStranger(n.outside, "refused", web.at(nodeIP[i]), "refused")
		n.wantStranger(a.ns, "refused", vip, "refused")
		n.wantStranger(a.ns, "refused", web.at(nodeIP[i]), "refused")
		n.wantStranger(n.outside, "large", open.at(nodeIP[i]), "same")
		n.wantStranger(a.ns, "large", []netip.AddrPort{open.v4, open.v6}[i], "same")
		n.wantStranger(b.ns, "large", []netip.AddrPort{open.v4, open.v6}[i], "same") // a hairpin
	}
}

// elsewhere makes a second link of the node, over which a pod of another node answers. Its MTU is given.
func (n *testNode) elsewhere(mtu int) (pod [2]netip.Addr, ns namespace) {
	n.t.Helper()
	ns = newNamespace(n.t)
	near := [2]netip.Prefix{netip.MustParsePrefix("198.18.0.1/24"), netip.MustParsePrefix("2001:db8:18::1/64")}
	far := [2]netip.Prefix{netip.MustParsePrefix("198.18.0.2/24"), netip.MustParsePrefix("2001:db8:18::2/64")}
	pod = [2]netip.Addr{netip.MustParseAddr("10.142.7.9"), netip.MustParseAddr("fd73:6b65:a042:7::9")}
	n.stop()
	namespace(0).do(n.t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "eth1", mtu
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth1", PeerNamespace: netlink.NsFd(ns), PeerMTU: uint32(mtu)}
		err := errors.Join(netlink.LinkAdd(v), up("eth1"), addr("eth1", near[0]), addr("eth1", near[1]))
		for i := range 2 {
			err = errors.Join(err, routeVia("eth1", pod[i], far[i].Addr(), netip.Addr{}))
		}
		return err
	})
	n.t.Cleanup(func() {
		if l, err := netlink.LinkByName("eth1"); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	ns.do(n.t, func() error {
		err := errors.Join(up("eth1"), addr("eth1", far[0]), addr("eth1", far[1]))
		for i := range 2 {
			err = errors.Join(err, addr("lo", netip.PrefixFrom(pod[i], pod[i].BitLen())),
				routeVia("eth1", gateway[i], near[i].Addr(), pod[i]), routeVia("eth1", nodeIP[i], near[i].Addr(), pod[i]))
		}
		return err
	})
	n.cfg.NodeIPs = append(slices.Clone(n.cfg.NodeIPs), near[0].Addr(), near[1].Addr())
	n.start()
	return pod, ns
}

// endpointsAt makes an address of each family the only endpoint of a service.
func (n *testNode) endpointsAt(name string, port int32, pod [2]netip.Addr) {
	n.t.Helper()
	for i, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		s := slice(name, i, family, port)
		s.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{pod[i].String()}, NodeName: ptr("elsewhere")}}
		n.putSlice(s)
	}
}

// TestPathMTU: who sends what is too large for the way beyond a NodePort learns of it, client and backend.
func TestPathMTU(t *testing.T) {
	n := newNode(t)
	pod, ns := n.elsewhere(1400)
	serveUDP(t, ns, 8080, true, echo)
	serveUDP(t, ns, 8081, true, largest)
	serveUDP(t, ns, 8082, false, echo)
	in, out, both := n.service("in", nil), n.service("out", nil), n.service("both", nil)
	n.endpointsAt("in", 8080, pod)
	n.endpointsAt("out", 8081, pod)
	n.endpointsAt("both", 8082, pod)
	for i := range 2 {
		n.wantStranger(n.outside, "large-answer", out.at(nodeIP[i]), "1340")
		n.wantStranger(n.outside, "large", both.at(nodeIP[i]), "same")
		n.wantStranger(n.outside, "mtu", in.at(nodeIP[i]), "1400")
	}
	// The way to the client is narrower than the backend's.
	for _, where := range []namespace{0, n.outside} {
		where.do(t, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(l, 1300)
		})
	}
	for i := range 2 {
		n.wantStranger(n.outside, "large-answer", out.at(nodeIP[i]), "1200")
		n.wantStranger(n.outside, "large", both.at(nodeIP[i]), "same")
	}
}
