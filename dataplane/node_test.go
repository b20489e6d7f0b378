// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"testing"
)

// TestNode walks through what a node's network must do, with real sockets.
func TestNode(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, a.ns, "a", 8080)
	serve(t, b.ns, "b", 8080)
	web := n.service("web", nil, b)
	loopV4, loopV6 := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")

	cases := []struct {
		name   string
		from   namespace
		v4, v6 netip.AddrPort
		sees   func(client netip.Addr) bool
	}{
		{"pod to pod", a.ns, netip.AddrPortFrom(b.v4(), 8080), netip.AddrPortFrom(b.v6(), 8080), isPod(a)},
		{"node to pod", 0, netip.AddrPortFrom(b.v4(), 8080), netip.AddrPortFrom(b.v6(), 8080), nil},
		{"pod to ClusterIP", a.ns, web.v4, web.v6, isPod(a)},
		{"node to ClusterIP", 0, web.v4, web.v6, nil},
		{"hairpin", b.ns, web.v4, web.v6, isPod(b)},
		{"pod to NodePort", a.ns, web.at(nodeV4), web.at(nodeV6), isPod(a)},
		{"node to NodePort", 0, web.at(nodeV4), web.at(nodeV6), nil},
		{"node to NodePort on loopback", 0, web.at(loopV4), web.at(loopV6), nil},
		{"outside to NodePort", n.outside, web.at(nodeV4), web.at(nodeV6), isOneOf(nodeV4, nodeV6)},
	}
	for _, c := range cases {
		for _, network := range []string{"tcp", "udp"} {
			for _, to := range []netip.AddrPort{c.v4, c.v6} {
				t.Run(fmt.Sprintf("%s %s %s", c.name, network, to), func(t *testing.T) {
					eventually(t, c.name, func() error {
						question := func() (string, netip.AddrPort, error) { return ask(c.from, network, to) }
						if c.from == n.outside {
							question = func() (string, netip.AddrPort, error) { return n.askAs(n.outside, network, to) }
						}
						name, client, err := question()
						if err != nil {
							return err
						}
						if name != "b" {
							return fmt.Errorf("%s answered", name)
						}
						if c.sees != nil && !c.sees(client.Addr()) {
							return fmt.Errorf("the pod sees client %s", client)
						}
						return nil
					})
				})
			}
		}
	}
}

func isPod(p *testPod) func(netip.Addr) bool { return isOneOf(p.Addrs...) }

func isOneOf(addrs ...netip.Addr) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		for _, b := range addrs {
			if a == b {
				return true
			}
		}
		return false
	}
}
