// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func self() Self {
	return Self{Addrs: addrs("192.0.2.1", "2001:db8::1"), PodCIDRs: prefixes("10.42.0.0/24", "fd42:0:0:0::/64"), Tunnel: 9,
		Devices: map[netip.Addr]int{netip.MustParseAddr("192.0.2.1"): 2, netip.MustParseAddr("2001:db8::1"): 3}}
}

func peer(n int) Peer {
	return Peer{Name: fmt.Sprintf("n%d", n), Addrs: addrs(fmt.Sprintf("192.0.2.%d", n), fmt.Sprintf("2001:db8::%x", n)),
		PodCIDRs: prefixes(fmt.Sprintf("10.42.%d.0/24", n), fmt.Sprintf("fd42:0:0:%x::/64", n))}
}

func (p peering) String() string {
	var out []string
	for _, r := range p.routes {
		out = append(out, fmt.Sprintf("route %s via %s src %s dev %d onlink %v", r.dst, r.via, r.src, r.device, r.onlink))
	}
	for _, n := range p.neighbours {
		out = append(out, fmt.Sprintf("neighbour %s %x", n.ip, n.mac))
	}
	for _, f := range p.forwardings {
		out = append(out, fmt.Sprintf("forward %x to %s", f.mac, f.remote))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func TestPlan(t *testing.T) {
	only6 := peer(6)
	only6.Addrs = only6.Addrs[1:]
	only6.PodCIDRs = only6.PodCIDRs[1:]
	same := peer(3)
	same.Name, same.Addrs = "other", addrs("192.0.2.33")
	ours := peer(4)
	ours.PodCIDRs = prefixes("10.42.0.128/25")
	mac := vtepMAC(netip.MustParseAddr("192.0.2.2"))
	for _, c := range []struct {
		name     string
		routing  Routing
		peers    []Peer
		want     []string
		problems map[string]string
	}{
		{"nobody else", VXLAN, nil, nil, nil},
		{"vxlan", VXLAN, []Peer{peer(2)}, []string{
			fmt.Sprintf("forward %x to 192.0.2.2", mac),
			fmt.Sprintf("neighbour 10.42.2.1 %x", mac),
			fmt.Sprintf("neighbour fd42:0:0:2::1 %x", mac),
			"route 10.42.2.0/24 via 10.42.2.1 src 10.42.0.1 dev 9 onlink true",
			"route fd42:0:0:2::/64 via fd42:0:0:2::1 src fd42::1 dev 9 onlink true",
		}, nil},
		{"direct", Direct, []Peer{peer(2)}, []string{
			"route 10.42.2.0/24 via 192.0.2.2 src invalid IP dev 2 onlink false",
			"route fd42:0:0:2::/64 via 2001:db8::2 src invalid IP dev 3 onlink false",
		}, nil},
		{"a node that has said nothing yet", VXLAN, []Peer{{Name: "new"}, {Name: "newer", Addrs: addrs("192.0.2.5")}}, nil, nil},
		{"a node without the tunnel's family", VXLAN, []Peer{only6}, nil, map[string]string{"n6": "no IPv4 address"}},
		{"direct needs the range's family only", Direct, []Peer{only6}, []string{
			"route fd42:0:0:6::/64 via 2001:db8::6 src invalid IP dev 3 onlink false",
		}, nil},
		{"two of one range", Direct, []Peer{same, peer(3)}, []string{
			"route 10.42.3.0/24 via 192.0.2.3 src invalid IP dev 2 onlink false",
			"route fd42:0:0:3::/64 via 2001:db8::3 src invalid IP dev 3 onlink false",
		}, map[string]string{"other": "overlaps another node's"}},
		{"one of this node's range", VXLAN, []Peer{ours}, nil, map[string]string{"n4": "overlaps this node's 10.42.0.0/24"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, problems := plan(c.routing, self(), c.peers)
			if got.String() != strings.Join(c.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", got, strings.Join(c.want, "\n"))
			}
			if len(problems) != len(c.problems) {
				t.Errorf("problems %v", problems)
			}
			for name, part := range c.problems {
				if !strings.Contains(problems[name], part) {
					t.Errorf("problems %v, want %s: %s", problems, name, part)
				}
			}
		})
	}
}

// Whatever nodes there are: every tunnelled route has its next hop and that a destination; nothing overlaps;
// the order of the list means nothing.
func TestPlanProperties(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var peers []Peer
		for i := range rng.IntN(8) {
			p := peer(2 + rng.IntN(6))
			p.Name = fmt.Sprint(i)
			if rng.IntN(4) == 0 {
				p.Addrs = p.Addrs[rng.IntN(2):]
			}
			peers = append(peers, p)
		}
		routing := Routings[rng.IntN(2)]
		got, problems := plan(routing, self(), peers)
		rng.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
		again, problemsAgain := plan(routing, self(), peers)
		if !reflect.DeepEqual(got, again) || !maps.Equal(problems, problemsAgain) {
			t.Fatalf("seed %d: another order of nodes, another plan", seed)
		}
		for dst, r := range got.routes {
			if overlapping(nil, self().PodCIDRs, dst) != "" {
				t.Fatalf("seed %d: %s is this node's", seed, dst)
			}
			for other := range got.routes {
				if other != dst && other.Overlaps(dst) {
					t.Fatalf("seed %d: %s and %s", seed, dst, other)
				}
			}
			if routing == Direct {
				continue
			}
			n, ok := got.neighbours[r.via]
			if _, leads := got.forwardings[n.mac]; !ok || !leads {
				t.Fatalf("seed %d: %s leads nowhere", seed, dst)
			}
		}
	}
}

func TestPodMTU(t *testing.T) {
	for _, c := range []struct {
		routing      Routing
		device, want int
		v6           bool
	}{
		{VXLAN, 1500, 1450, false}, {VXLAN, 1500, 1430, true}, {VXLAN, 9000, 8950, false}, {Direct, 1500, 1500, true}, {VXLAN, 1300, 1280, false},
	} {
		if got := podMTU(c.routing, c.device, c.v6); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

func TestParseRouting(t *testing.T) {
	for text, want := range map[string]Routing{"": VXLAN, "vxlan": VXLAN, "direct": Direct} {
		if got, err := ParseRouting(text); got != want || err != nil {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
	if _, err := ParseRouting("Direct"); err == nil || !strings.Contains(err.Error(), "vxlan direct") {
		t.Error(err)
	}
}

// node runs f on a thread in a network namespace of its own that has eth0 with this node's addresses.
func node(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the namespace ends with the thread
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}); err != nil {
				return err
			}
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			for _, p := range prefixes("192.0.2.1/24", "2001:db8::1/64") {
				if err := netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}); err != nil {
					return err
				}
			}
			for _, name := range []string{"lo", "eth0", "eth1"} {
				l, err := netlink.LinkByName(name)
				if err != nil {
					return err
				}
				if err := netlink.LinkSetUp(l); err != nil {
					return err
				}
			}
			if err := ConfigureLinks(Config{}, self().PodCIDRs); err != nil {
				return err
			}
			return f()
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// kernel reads what is there, with the index of the tunnel.
func kernel(t *testing.T) peering {
	t.Helper()
	index := 0
	if l, err := netlink.LinkByName(Tunnel); err == nil {
		index = l.Attrs().Index
	}
	have, err := read(index)
	if err != nil {
		t.Error(err)
	}
	return have
}

// TestPeersInKernel: what is planned is what the kernel has, a node that goes leaves nothing, and what
// somebody else takes away or changes comes back.
func TestPeersInKernel(t *testing.T) {
	for _, routing := range Routings {
		t.Run(string(routing), func(t *testing.T) {
			node(t, func() error {
				sync := func(peers ...Peer) {
					t.Helper()
					problems, err := Peers(routing, Self{Addrs: self().Addrs, PodCIDRs: self().PodCIDRs}, peers)
					if err != nil || len(problems) > 0 {
						t.Error(problems, err)
					}
				}
				planned := func(peers ...Peer) string {
					s := self()
					if l, err := netlink.LinkByName(Tunnel); err == nil {
						s.Tunnel = l.Attrs().Index
					}
					eth0, err := netlink.LinkByName("eth0")
					if err != nil {
						t.Error(err)
					}
					for a := range s.Devices {
						s.Devices[a] = eth0.Attrs().Index
					}
					want, _ := plan(routing, s, peers)
					return want.String()
				}
				check := func(what string, peers ...Peer) {
					t.Helper()
					if got, want := kernel(t).String(), planned(peers...); got != want {
						t.Errorf("%s: the kernel has\n%s\nwant\n%s", what, got, want)
					}
				}
				sync(peer(2), peer(3))
				check("two peers", peer(2), peer(3))
				moved := peer(3)
				moved.Addrs = addrs("192.0.2.33", "2001:db8::33")
				sync(peer(2), moved)
				check("one has another address", peer(2), moved)
				sync(peer(2))
				check("one has gone", peer(2))

				have := kernel(t)
				for _, r := range have.routes {
					if err := netlink.RouteDel(r.netlink()); err != nil {
						return err
					}
				}
				sync(peer(2))
				check("somebody removed the routes", peer(2))
				if routing == VXLAN {
					l, err := netlink.LinkByName(Tunnel)
					if err != nil {
						return err
					}
					if got := l.Attrs().MTU; got != 1450 {
						t.Errorf("the tunnel's MTU is %d", got)
					}
					for _, n := range have.neighbours {
						if err := netlink.NeighDel(n.netlink(l.Attrs().Index)); err != nil {
							return err
						}
					}
					for _, f := range have.forwardings {
						if err := netlink.NeighDel(f.netlink(l.Attrs().Index)); err != nil {
							return err
						}
					}
					sync(peer(2))
					check("somebody removed neighbours and forwarding entries", peer(2))
					if err := netlink.LinkSetDown(l); err != nil {
						return err
					}
					sync(peer(2))
					check("somebody set the device down", peer(2))
					if err := netlink.LinkDel(l); err != nil {
						return err
					}
					sync(peer(2))
					check("somebody removed the device", peer(2))
					before, err := netlink.LinkByName(Tunnel)
					if err != nil {
						return err
					}
					sync(peer(2))
					if after, err := netlink.LinkByName(Tunnel); err != nil || after.Attrs().Index != before.Attrs().Index {
						t.Errorf("the device was made anew for nothing: %v", err)
					}
				}
				sync()
				check("nobody is left")
				if err := Cleanup(t.Context()); err != nil {
					return err
				}
				if got := kernel(t).String(); got != "" {
					t.Errorf("left after cleanup: %s", got)
				}
				if _, err := netlink.LinkByName(Tunnel); err == nil {
					t.Error("the tunnel is left after cleanup")
				}
				return nil
			})
		})
	}
}
