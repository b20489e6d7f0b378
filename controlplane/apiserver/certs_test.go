// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"crypto/tls"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestServingNames(t *testing.T) {
	ipnet := func(s string) net.Addr {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return &net.IPNet{IP: ip, Mask: n.Mask}
	}
	c := Config{
		BindAddress: net.IPv6zero, AdvertiseAddress: net.IPv4(192, 0, 2, 1), ClusterDomain: "example.test",
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd73:6b65:7043::/112")},
		ExtraSANs:    []string{"api.example.test", "203.0.113.7", "localhost"},
	}
	got := c.servingNames("host", []net.Addr{ipnet("127.0.0.1/8"), ipnet("192.0.2.1/24"), ipnet("fe80::1/64"), ipnet("2001:db8::5/64")})
	want := []string{
		"10.43.0.1", "127.0.0.1", "192.0.2.1", "2001:db8::5", "203.0.113.7", "::1", "api.example.test",
		"fd73:6b65:7043::1", "host", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.example.test", "localhost",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// testRotation issues another serving certificate under a running server, which must show it
// without a restart, and without dropping the connections it has.
func testRotation(t *testing.T, s *testServer) {
	dial := func(name string) error {
		c, err := tls.Dial("tcp", strings.TrimPrefix(s.address(), "https://"), &tls.Config{RootCAs: s.pki.CAPool(), ServerName: name})
		if err == nil {
			c.Close()
		}
		return err
	}
	for _, name := range []string{"localhost", "127.0.0.1", "10.43.0.1", "192.0.2.1", "kubernetes.default.svc"} {
		if err := dial(name); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if dial("late.example.test") == nil {
		t.Fatal("accepted as late.example.test before the certificate has it")
	}
	s.cfg.ExtraSANs = []string{"late.example.test"}
	if _, err := s.cfg.certificates(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return dial("late.example.test") })
}
