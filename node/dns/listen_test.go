// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func newQuestion(name string) *dns.Msg { return new(dns.Msg).SetQuestion(name, dns.TypeA) }

// The server listens before the addresses exist, as the data plane creates them later, and answers
// from the address that was asked once they do.
func TestAddressesAppearLater(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	name := fmt.Sprintf("skep-dns-test-%d", time.Now().UnixNano())
	inside, err := netns.NewNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = inside.Close()
		if err := netns.Set(host); err != nil {
			t.Fatal(err)
		}
		if err := netns.DeleteNamed(name); err != nil {
			t.Error(err)
		}
	}()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	addresses := []netip.Addr{netip.MustParseAddr("10.43.0.10"), netip.MustParseAddr("fd73:6b65:7043::a")}
	s, err := listen(t.Context(), addresses, 53, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if len(s.addresses) != 2 {
		t.Fatalf("listening on %v only", s.addresses)
	}
	if _, err := listen(t.Context(), addresses, 53, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "is taken: stop the other DNS server") {
		t.Errorf("a second server: %v", err)
	}
	h, _ := testHandler()
	h.ctx = t.Context()
	for _, server := range s.servers(h) {
		go func() { _ = server.ActivateAndServe() }()
	}
	for _, address := range addresses {
		prefix := netlink.NewIPNet(address.AsSlice())
		if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: prefix, Flags: 0x02 /* IFA_F_NODAD */}); err != nil {
			t.Fatal(err)
		}
		for _, network := range []string{"udp", "tcp"} {
			server := netip.AddrPortFrom(address, 53).String()
			// Dialled from this thread, which is in the namespace. The kernel takes a new IPv6 address
			// into use in the background and drops datagrams before: ask again, as resolvers do.
			var reply *dns.Msg
			for range 60 {
				reply, _, err = (&dns.Client{Net: network, Timeout: 500 * time.Millisecond}).Exchange(newQuestion("db-0.db.default.svc.cluster.local."), server)
				if err == nil {
					break
				}
			}
			if err != nil || len(reply.Answer) != 1 {
				t.Errorf("%s by %s: %v, %v", server, network, reply, err)
			}
		}
	}
}
