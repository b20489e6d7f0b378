// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"strings"
	"testing"
)

func TestSplitTarget(t *testing.T) {
	for in, want := range map[string][2]string{
		"web:80": {"web", "80"}, "svc/shop/web:http": {"svc/shop/web", "http"}, "10.0.0.1:1": {"10.0.0.1", "1"}, "[fd00::1]:80": {"fd00::1", "80"},
	} {
		target, port, err := splitTarget(in)
		if err != nil || target != want[0] || port != want[1] {
			t.Errorf("%s: %q %q %v", in, target, port, err)
		}
	}
	for in, want := range map[string]string{"web": "no port", ":80": "no port", "web:": "no port", "fd00::1:80": "[ADDRESS]:PORT"} {
		if _, _, err := splitTarget(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// TestPair: both ends of a connection have the same family, the wanted one if there is a choice.
func TestPair(t *testing.T) {
	v4, v6, to4, to6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")
	both := []netip.Addr{v4, v6}
	for _, c := range []struct {
		from, to []netip.Addr
		v6       bool
		src, dst netip.Addr
	}{
		{both, []netip.Addr{to4, to6}, false, v4, to4},
		{both, []netip.Addr{to4, to6}, true, v6, to6},
		{both, []netip.Addr{to4}, true, v4, to4},
		{both, []netip.Addr{to6}, false, v6, to6},
		{[]netip.Addr{v4}, []netip.Addr{to6, to4}, true, v4, to4},
		{nil, []netip.Addr{to4, to6}, true, netip.Addr{}, to6},
	} {
		src, dst, err := pair(c.from, c.to, c.v6)
		if err != nil || src != c.src || dst != c.dst {
			t.Errorf("%v to %v: %v %v %v", c.from, c.to, src, dst, err)
		}
	}
	if _, _, err := pair([]netip.Addr{v4}, []netip.Addr{to6}, false); err == nil {
		t.Error("IPv4 to IPv6")
	}
}
