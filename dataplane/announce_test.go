// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/maps"
)

// On the LAN of node and outside, and nobody's.
var lanV4, lanV6 = netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8::77")

var (
	ourMAC   = [6]byte{2, 0, 0, 0, 0, 1}
	theirMAC = []byte{2, 0, 0, 0, 0, 2}
)

// arp is a request, or with another operation something else.
func arp(operation byte, from, to netip.Addr) []byte {
	b := bytes.Repeat([]byte{0xff}, 6)
	b = append(append(b, theirMAC...), 8, 6, 0, 1, 8, 0, 6, 4, 0, operation)
	b = append(append(b, theirMAC...), from.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), to.AsSlice()...)
}

// solicit is a neighbour solicitation, with the option that names the asker's MAC address unless from is unspecified.
func solicit(from, target netip.Addr) []byte {
	t := target.As16()
	group := netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	icmp := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	if !from.IsUnspecified() {
		icmp = append(append(icmp, 1, 1), theirMAC...)
	}
	return icmp6(append([]byte{0x33, 0x33, 0xff, t[13], t[14], t[15]}, theirMAC...), from, group, icmp)
}

func icmp6(macs []byte, from, to netip.Addr, icmp []byte) []byte {
	binary.BigEndian.PutUint16(icmp[2:], 0)
	binary.BigEndian.PutUint16(icmp[2:], transportSum(from, to, 58, icmp))
	b := append(bytes.Clone(macs), 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(icmp)), 58, 255)
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	return append(b, icmp...)
}

// TestPacketAnnounce: who answers whom, with what, byte by byte.
func TestPacketAnnounce(t *testing.T) {
	r := newRig(t)
	for _, a := range []netip.Addr{lanV4, lanV6} {
		if err := r.Maps().SetAnnounced(maps.AnnouncedKey{Addr: maps.AddressOf(a), Ifindex: 1}, maps.Announced{MAC: ourMAC}); err != nil {
			t.Fatal(err)
		}
	}
	ours := func(verdict uint32, out []byte) []byte {
		t.Helper()
		if verdict != redirect {
			t.Fatalf("verdict %d", verdict)
		}
		return out
	}
	reply := append(append(bytes.Clone(theirMAC), ourMAC[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
	reply = append(append(append(reply, ourMAC[:]...), lanV4.AsSlice()...), theirMAC...)
	reply = append(reply, outsideV4.AsSlice()...)
	if out := ours(r.run(t, "from_outside", arp(1, outsideV4, lanV4))); !bytes.Equal(out, reply) {
		t.Errorf("ARP reply\n% x, want\n% x", out, reply)
	}
	advertise := func(flags byte, to netip.Addr, mac []byte) []byte {
		icmp := append([]byte{136, 0, 0, 0, flags, 0, 0, 0}, lanV6.AsSlice()...)
		icmp = append(append(icmp, 2, 1), ourMAC[:]...)
		return icmp6(append(bytes.Clone(mac), ourMAC[:]...), lanV6, to, icmp)
	}
	if out, want := ours(r.run(t, "from_outside", solicit(outsideV6, lanV6))), advertise(0x60, outsideV6, theirMAC); !bytes.Equal(out, want) {
		t.Errorf("advertisement\n% x, want\n% x", out, want)
	}
	// Somebody asks whether he may have it.
	all := netip.MustParseAddr("ff02::1")
	if out, want := ours(r.run(t, "from_outside", solicit(netip.IPv6Unspecified(), lanV6))), advertise(0x20, all, []byte{0x33, 0x33, 0, 0, 0, 1}); !bytes.Equal(out, want) {
		t.Errorf("advertisement to all\n% x, want\n% x", out, want)
	}
	// What is told without being asked is right, too.
	if got, want := unsolicited(lanV6, ourMAC), advertise(0x20, all, []byte{0x33, 0x33, 0, 0, 0, 1}); !bytes.Equal(got, want) {
		t.Errorf("unsolicited\n% x, want\n% x", got, want)
	}

	routed := solicit(outsideV6, lanV6)
	routed[14+7] = 254
	for name, p := range map[string][]byte{
		"ARP for another":           arp(1, outsideV4, nodeV4),
		"ARP reply":                 arp(2, outsideV4, lanV4),
		"gratuitous ARP":            arp(1, lanV4, lanV4),
		"ARP, cut":                  arp(1, outsideV4, lanV4)[:40],
		"solicitation for another":  solicit(outsideV6, nodeV6),
		"solicitation from far":     routed,
		"solicitation, cut":         solicit(outsideV6, lanV6)[:70],
		"echo to announced address": icmp6(append(ourMAC[:], theirMAC...), outsideV6, lanV6, append([]byte{128, 0, 0, 0}, make([]byte, 20)...)),
	} {
		if v, out := r.run(t, "from_outside", p); v != next || !bytes.Equal(out, p) {
			t.Errorf("%s: verdict %d\n% x", name, v, out)
		}
	}
	// Where no service answers, the node's stack refuses, at its port 0; what opens nothing goes nowhere.
	for i, to := range []netip.Addr{lanV4, lanV6} {
		for _, proto := range []uint8{maps.TCP, maps.UDP} {
			s := segment{proto: proto, flags: syn, from: at(client[i], 1), to: at(to, 81)}
			v, out := r.run(t, "from_outside", s.bytes())
			s.to = at(nodeIP[i], 0)
			if want := s.bytes(); v != next || !bytes.Equal(out, want) {
				t.Errorf("%s without a service: verdict %d\n% x, want\n% x", to, v, out, want)
			}
			back := segment{proto: proto, flags: ack, from: at(nodeIP[i], 0), to: at(client[i], 1)}
			v, out = r.run(t, "to_outside", back.bytes())
			back.from = at(to, 81)
			if want := back.bytes(); v != next || !bytes.Equal(out, want) {
				t.Errorf("the refusal of %s: verdict %d\n% x, want\n% x", to, v, out, want)
			}
		}
		// So is a service without backends at an address that the node does not have, announced or not.
		external := to.Next()
		if err := r.Maps().PutService(maps.Service{Key: maps.ServiceKey{Addr: maps.AddressOf(external), Port: maps.PortOf(80), Proto: maps.TCP, Scope: maps.ScopeExternal}}); err != nil {
			t.Fatal(err)
		}
		idle := segment{proto: maps.TCP, flags: syn, from: at(client[i], 1), to: at(external, 80)}
		v, out := r.run(t, "from_outside", idle.bytes())
		idle.to = at(nodeIP[i], 0)
		if want := idle.bytes(); v != next || !bytes.Equal(out, want) {
			t.Errorf("%s without backends: verdict %d\n% x, want\n% x", external, v, out, want)
		}
		s := segment{proto: maps.TCP, flags: ack, from: at(client[i], 2), to: at(to, 81)}
		if v, _ := r.run(t, "from_outside", s.bytes()); v != drop {
			t.Errorf("%s, of no connection: verdict %d", to, v)
		}
	}
}

// TestAnnounced: an address that no device has is reached on the LAN while this node announces it, also by
// neighbours who knew another's MAC address.
func TestAnnounced(t *testing.T) {
	n := newNode(t)
	b := n.pod("b")
	serve(t, b.ns, "b", 8080)
	other := net.HardwareAddr{2, 9, 9, 9, 9, 9}
	n.outside.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		var errs []error
		for _, a := range []netip.Addr{lanV4, lanV6} {
			errs = append(errs, netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: a.AsSlice(), HardwareAddr: other, State: netlink.NUD_STALE}))
		}
		return errors.Join(errs...)
	})
	n.service("web", func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lanV4.String()}, {IP: lanV6.String()}}
		s.Status.Conditions = []metav1.Condition{{Type: api.AnnouncedCondition, Status: metav1.ConditionTrue, Message: "node-1"}}
	}, b)
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	macOf := func(a netip.Addr) (mac string) {
		n.outside.do(t, func() error {
			all, err := netlink.NeighList(0, netlink.FAMILY_ALL)
			for _, e := range all {
				if e.IP.Equal(a.AsSlice()) {
					mac = e.HardwareAddr.String()
				}
			}
			return err
		})
		return mac
	}
	for _, a := range []netip.Addr{lanV4, lanV6} {
		eventually(t, "take-over", func() error {
			if mac := macOf(a); mac != eth0.Attrs().HardwareAddr.String() {
				return fmt.Errorf("the outside knows %s at %s", a, mac)
			}
			return nil
		})
	}
	// And those who know nothing ask.
	n.outside.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range []netip.Addr{lanV4, lanV6} {
			_ = netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: a.AsSlice()})
		}
		return nil
	})
	for _, a := range []netip.Addr{lanV4, lanV6} {
		for _, network := range []string{"tcp", "udp"} {
			name, _, err := n.askAs(n.outside, network, at(a, 80))
			if name != "b" {
				t.Errorf("%s %s: %q, %v", network, a, name, err)
			}
		}
	}
	// A port that no service has is refused at once, and so is a service without endpoints.
	n.service("idle", func(s *corev1.Service) {
		s.Spec.Type, s.Spec.Ports[0].Port, s.Spec.Ports[1].Port = corev1.ServiceTypeLoadBalancer, 82, 82
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lanV4.String()}, {IP: lanV6.String()}}
	})
	for _, a := range []netip.Addr{lanV4, lanV6} {
		for _, network := range []string{"tcp", "udp"} {
			for _, port := range []uint16{81, 82} {
				if _, _, err := n.askAs(n.outside, network, at(a, port)); err == nil || !strings.Contains(err.Error(), "connection refused") {
					t.Errorf("%s %s, port %d: %v", network, a, port, err)
				}
			}
		}
	}
	// It ends with the Service's address, and an agent that starts ends what is nobody's.
	n.stop()
	if err := n.client.CoreV1().Services("default").Delete(context.Background(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	n.start()
	if left, err := n.dp.maps.Announced(); err != nil || len(left) != 0 {
		t.Errorf("%v is still announced, %v", left, err)
	}
}
