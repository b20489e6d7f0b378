// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/services"
)

// tagged is the frame with the option of bpf/dsr.h that names a frontend.
func tagged(s segment, frontend netip.AddrPort) []byte {
	frame := s.bytes()
	port := binary.BigEndian.AppendUint16(nil, frontend.Port())
	if s.from.Addr().Is4() {
		option := append(append([]byte{158, 8}, port...), frontend.Addr().AsSlice()...)
		header := append(bytes.Clone(frame[14:34]), option...)
		header[0] += 2
		binary.BigEndian.PutUint16(header[2:], binary.BigEndian.Uint16(header[2:])+8)
		header[10], header[11] = 0, 0
		binary.BigEndian.PutUint16(header[10:], ^fold(sum(0, header)))
		return append(append(bytes.Clone(frame[:14]), header...), frame[34:]...)
	}
	option := append(append([]byte{frame[20], 2, 0x1e, 20}, port...), 0, 0)
	option = append(option, frontend.Addr().AsSlice()...)
	header := bytes.Clone(frame[14:54])
	header[6] = 60
	binary.BigEndian.PutUint16(header[4:], binary.BigEndian.Uint16(header[4:])+24)
	return append(append(append(bytes.Clone(frame[:14]), header...), option...), frame[54:]...)
}

// newDSRRigs are the node that is asked and the backend's, which has podC.
func newDSRRigs(t *testing.T, mode loader.NodePortMode) (asked, backends *rig) {
	t.Helper()
	asked, backends = newRigOf(t, mode), newRigOf(t, mode)
	for _, r := range []*rig{asked, backends} {
		r.backends(t, podC)
		err := r.Maps().SetNode(maps.Node{
			AddressV4: maps.AddressOf(nodeV4), AddressV6: maps.AddressOf(nodeV6),
			GatewayV4: maps.AddressOf(gateway[0]), GatewayV6: maps.AddressOf(gateway[1]), MTU: 1450,
		})
		cidrs := podCIDRs
		if r == asked { // its pods are others: podC is elsewhere
			cidrs = []netip.Prefix{netip.MustParsePrefix("10.142.9.0/24"), netip.MustParsePrefix("fd73:6b65:a042:9::/64")}
		}
		err = errors.Join(err, r.Maps().SetRanges(ranges(Config{ClusterCIDRs: clusterCIDRs, ServiceCIDRs: serviceCIDRs}, cidrs)))
		if r == backends {
			err = errors.Join(err, r.Maps().SetNodeAddresses([]netip.Addr{nodeV4.Next().Next(), nodeV6.Next().Next()}))
			for i := range 2 {
				err = errors.Join(err, r.Maps().SetEndpoint(podC[i], maps.Endpoint{Ifindex: 1}))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return asked, backends
}

// TestPacketDSR: the client's address stays in what a node hands on, the backend's node learns which frontend was
// asked, and answers in its name.
func TestPacketDSR(t *testing.T) {
	each(t, func(t *testing.T, _ *rig, i int, s segment) {
		for _, mode := range []loader.NodePortMode{loader.DSR, loader.Hybrid} {
			a, b := newDSRRigs(t, mode)
			front := at(nodeIP[i], 30080)
			s.flags, s.payload = syn, []byte("odd")
			s.from, s.to = at(client[i], 4000), front
			handed := s
			handed.to = at(podC[i], 8080)
			if mode == loader.Hybrid && s.proto == maps.UDP {
				_, out := a.run(t, "from_outside", s.bytes())
				if from := source(t, out); from.Addr() != gateway[i] {
					t.Errorf("hybrid: UDP from %s", from)
				}
				continue
			}
			pass := func(what string, send, want []byte) []byte {
				t.Helper()
				_, out := a.run(t, "from_outside", send)
				if !bytes.Equal(out, want) {
					t.Errorf("%s: handed on as\n% x, want\n% x", what, out, want)
				}
				return out
			}
			arrive := func(what string, send []byte, want segment) {
				t.Helper()
				v, out := b.run(t, "from_outside", send)
				if v != redirect {
					t.Errorf("%s: verdict at the backend's node %d", what, v)
				}
				same(t, out, want)
			}
			for range 2 { // a SYN may have to be sent again
				arrive("first", pass("first", s.bytes(), tagged(handed, front)), handed)
			}
			answer := s
			answer.from, answer.to, answer.flags = handed.to, handed.from, syn|ack
			answered := answer
			answered.from = front
			_, out := b.run(t, "from_pod", answer.bytes())
			same(t, out, answered)
			s.flags, handed.flags = ack, ack
			if s.proto == maps.TCP {
				arrive("later", pass("later", s.bytes(), handed.bytes()), handed)
			}
			// What has no room for the option goes without it, and what opens a flow without room by the node.
			s.payload, handed.payload = make([]byte, 1400), make([]byte, 1400)
			arrive("large", pass("large", s.bytes(), handed.bytes()), handed)
			fresh := s
			fresh.from, fresh.flags = at(client[i], 4001), syn
			_, out = a.run(t, "from_outside", fresh.bytes())
			if from := source(t, out); from.Addr() != gateway[i] {
				t.Errorf("a large first packet comes from %s", from)
			}
			// An error from the client's side goes to the backend, one from the backend's to the client.
			quoted := icmpError(client[i].Next(), nodeIP[i], tooBigFor, answered.bytes()[14:])
			_, out = a.run(t, "from_outside", quoted)
			if want := icmpError(client[i].Next(), podC[i], tooBigFor, answer.bytes()[14:]); !bytes.Equal(out, want) {
				t.Errorf("the error for the backend is\n% x, want\n% x", out, want)
			}
			_, out = b.run(t, "from_pod", icmpError(podC[i], client[i], unreachable, handed.bytes()[14:]))
			if want := icmpError(nodeIP[i], client[i], unreachable, s.bytes()[14:]); !bytes.Equal(out, want) {
				t.Errorf("the error for the client is\n% x, want\n% x", out, want)
			}
			// Nobody makes a node answer for what is no frontend, or a pod of another node.
			s.payload, handed.payload = nil, nil
			handed.from, handed.flags = at(client[i], 4002), syn
			v, _ := b.run(t, "from_outside", tagged(handed, at(nodeIP[i], 30999)))
			answer.to = handed.from
			_, out = b.run(t, "from_pod", answer.bytes())
			if v != next || !bytes.Equal(out, answer.bytes()) {
				t.Errorf("no frontend: verdict %d, and the answer is translated: %t", v, !bytes.Equal(out, answer.bytes()))
			}
			handed.to = at(podC[i].Next(), 8080)
			if v, out := b.run(t, "from_outside", tagged(handed, front)); v != next || !bytes.Equal(out, tagged(handed, front)) {
				t.Errorf("another node's pod: verdict %d", v)
			}
			// A pod's node expects no answer from somewhere else.
			s.from, s.flags = at(podC[i].Next(), 4000), syn
			_, out = a.run(t, "from_outside", s.bytes())
			if from := source(t, out); from.Addr() != gateway[i] {
				t.Errorf("a pod of another node comes as %s", from)
			}
		}
	})
}

// TestDSR: client, two nodes and a pod in four namespaces, with real sockets: answers do not come by the node that
// was asked, which has no way for them.
func TestDSR(t *testing.T) {
	n := newNodeOf(t, func(c *Config) { c.NodePortMode = loader.DSR })
	pod, other := n.elsewhere(1500)
	inside := newNamespace(t)
	clientSide := [2]netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:51::1/64")}
	nodeSide := [2]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:51::2/64")}
	var l *loader.Loader
	var host net.HardwareAddr
	dir := filepath.Join("/sys/fs/bpf", fmt.Sprintf("other-%d", time.Now().UnixNano()))
	other.do(t, func() error {
		var err error
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		err = errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth1", PeerNamespace: netlink.NsFd(n.outside)}),
			netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod", TxQLen: -1}, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside)}),
			up("eth0"), up("pod"), addr("eth0", nodeSide[0]), addr("eth0", nodeSide[1]))
		lo, e := netlink.LinkByName("lo")
		err = errors.Join(err, e)
		device, e := netlink.LinkByName("pod")
		host = device.Attrs().HardwareAddr
		if err = errors.Join(err, e); err != nil {
			return err
		}
		for i := range 2 {
			// elsewhere put the pod's address on the node: here a namespace has it.
			a, e := netlink.ParseAddr(fmt.Sprint(netip.PrefixFrom(pod[i], pod[i].BitLen())))
			err = errors.Join(err, e, netlink.AddrDel(lo, a), routeVia("eth0", client[i], clientSide[i].Addr(), netip.Addr{}))
		}
		if err != nil {
			return err
		}
		if l, err = loader.Load(loader.Config{Dir: dir, NodePortMode: loader.DSR, Log: slog.New(slog.DiscardHandler)}); err != nil {
			return err
		}
		eth1, e := netlink.LinkByName("eth1")
		err = errors.Join(e, l.AttachPod(device.Attrs().Index))
		if err == nil {
			err = l.AttachHost(eth1.Attrs().Index)
		}
		m := l.Maps()
		for i := range 2 {
			err = errors.Join(err, m.SetEndpoint(pod[i], maps.Endpoint{Ifindex: uint32(device.Attrs().Index)}))
		}
		return errors.Join(err, m.SetNode(maps.Node{MTU: 1500}), os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	t.Cleanup(func() {
		l.Close()
		if err := loader.Cleanup(dir); err != nil {
			t.Error(err)
		}
	})
	n.outside.do(t, func() error {
		return errors.Join(up("eth1"), addr("eth1", clientSide[0]), addr("eth1", clientSide[1]),
			os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0), os.WriteFile("/proc/sys/net/ipv4/conf/eth1/rp_filter", []byte("0"), 0))
	})
	inside.do(t, func() error {
		device, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(up("eth0"), addr("eth0", netip.PrefixFrom(pod[0], 32)), addr("eth0", netip.PrefixFrom(pod[1], 128)), podRoutes(device, host))
	})
	serve(t, inside, "far", 8080)
	web := n.service("web", nil)
	n.endpointsAt("web", 8080, pod)
	r, err := services.NewReconciler(l.Maps())
	if err != nil {
		t.Fatal(err)
	}
	var sets []services.Set
	for i, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		for _, proto := range []uint8{maps.TCP, maps.UDP} {
			sets = append(sets, services.Set{Name: fmt.Sprint(i, proto), Proto: proto, Backends: []netip.AddrPort{at(pod[i], 8080)},
				Frontends: []services.Frontend{{Addr: any, Port: web.node, Proto: proto, Scope: maps.ScopeExternal}}})
		}
	}
	if err := r.Apply("web", sets); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		// The node that was asked drops whatever comes back to it.
		for _, network := range []string{"tcp", "udp"} {
			eventually(t, network, func() error {
				name, seen, err := n.askAs(n.outside, network, web.at(nodeIP[i]))
				if err == nil && (name != "far" || seen.Addr() != client[i]) {
					err = fmt.Errorf("%s answered, and saw %s", name, seen)
				}
				return err
			})
		}
	}
}
