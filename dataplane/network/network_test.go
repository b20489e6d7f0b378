// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestGateway(t *testing.T) {
	for in, want := range map[string]string{"10.42.3.0/24": "10.42.3.1", "10.42.3.77/24": "10.42.3.1", "fd73:6b65:7042:9::/64": "fd73:6b65:7042:9::1"} {
		if got := Gateway(netip.MustParsePrefix(in)).String(); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestChains(t *testing.T) {
	cfg := Config{
		ClusterCIDRs: prefixes("10.42.0.0/16", "fd73:6b65:7042::/48"),
		ServiceCIDRs: prefixes("10.43.0.0/16", "fd73:6b65:7043::/112"),
	}
	var got []string
	for _, c := range chains(cfg, prefixes("10.42.0.0/24", "fd73:6b65:7042::/64"), false) {
		for _, r := range c.rules {
			got = append(got, c.table+" "+c.from+" "+c.name+": "+strings.Join(r, " "))
		}
	}
	want := []string{
		"filter FORWARD SKEP-FORWARD: -s 10.42.0.0/16 -j ACCEPT",
		"filter FORWARD SKEP-FORWARD: -d 10.42.0.0/16 -j ACCEPT",
		"nat POSTROUTING SKEP-POSTROUTING: -d 10.42.0.0/16 -j RETURN",
		"nat POSTROUTING SKEP-POSTROUTING: -d 10.43.0.0/16 -j RETURN",
		"nat POSTROUTING SKEP-POSTROUTING: -s 10.42.0.0/24 -j MASQUERADE --random-fully",
		"raw PREROUTING SKEP-UNTRACKED: -s 10.42.0.0/16 -d 10.42.0.0/16 -j CT --notrack",
		"raw PREROUTING SKEP-UNTRACKED: -s 10.42.0.0/16 -d 10.43.0.0/16 -j CT --notrack",
		"raw OUTPUT SKEP-UNTRACKED-OUT: -s 10.42.0.0/16 -d 10.42.0.0/16 -j CT --notrack",
		"raw OUTPUT SKEP-UNTRACKED-OUT: -s 10.43.0.0/16 -d 10.42.0.0/16 -j CT --notrack",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, c := range chains(cfg, prefixes("10.42.0.0/24", "fd73:6b65:7042::/64"), true) {
		for _, r := range c.rules {
			if strings.Contains(strings.Join(r, " "), "10.4") {
				t.Errorf("IPv6 chain %s has %v", c.name, r)
			}
		}
	}
}

func TestSameRules(t *testing.T) {
	want := [][]string{{"-s", "10.42.0.0/16", "-j", "ACCEPT"}}
	for _, c := range []struct {
		have []string
		want bool
	}{
		{[]string{"-N SKEP-FORWARD", "-A SKEP-FORWARD -s 10.42.0.0/16 -j ACCEPT"}, true},
		{[]string{"-N SKEP-FORWARD"}, false},
		{[]string{"-N SKEP-FORWARD", "-A SKEP-FORWARD -s 10.42.0.0/16 -j DROP"}, false},
		{[]string{"-N SKEP-FORWARD", "-A SKEP-FORWARD -s 10.42.0.0/16 -j ACCEPT", "-A SKEP-FORWARD -j DROP"}, false},
		{[]string{"-N SKEP-FORWARD", "-A"}, false},
		{nil, false},
	} {
		if got := sameRules(c.have, want); got != c.want {
			t.Errorf("%q: %v", c.have, got)
		}
	}
}

// TestWithoutIP6Tables: a host that has only iptables gets IPv4's rules; one without either is told.
func TestWithoutIP6Tables(t *testing.T) {
	real, err := exec.LookPath("iptables")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := families(context.Background()); err == nil || !strings.Contains(err.Error(), "install") {
		t.Errorf("without iptables: %v", err)
	}
	if err := os.Symlink(real, filepath.Join(dir, "iptables")); err != nil {
		t.Fatal(err)
	}
	got, err := families(context.Background())
	if err != nil || len(got) != 1 || got[iptables.ProtocolIPv4] == nil {
		t.Errorf("with iptables only: %v, %v", got, err)
	}
}

func TestUnreachable(t *testing.T) {
	for in, family := range map[string]int{"10.43.0.0/16": unix.AF_INET, "fd73:6b65:7043::/112": unix.AF_INET6} {
		r := unreachable(netip.MustParsePrefix(in))
		if r.Dst.String() != in || r.Family != family || r.Type != unix.RTN_UNREACHABLE {
			t.Errorf("%s: %v", in, r)
		}
	}
}
