// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Clean is machines that no skep and no netfilter rule has touched, for comparisons: a client, and a
// server that it reaches over one veth pair (Direct), or over two with a machine between them that
// does nothing but route (Routed), which is the way from pod to pod.
type Clean struct {
	Client, Server *Machine
	Direct, Routed netip.Addr // of the server

	router *Machine
}

// cleanLinks are the three cables. The addresses are RFC 5737's second and third range, and one of
// RFC 2544's for benchmarks.
var cleanLinks = []struct{ network, from, to string }{
	{"198.51.100.0/24", "client", "server"},
	{"203.0.113.0/24", "client", "router"},
	{"198.18.0.0/24", "router", "server"},
}

// NewClean makes the machines; name has to be unique on the host.
func NewClean(ctx context.Context, name string) (*Clean, error) {
	machines := map[string]*Machine{}
	c := &Clean{}
	for role, m := range map[string]**Machine{"client": &c.Client, "router": &c.router, "server": &c.Server} {
		var err error
		if *m, err = newMachine(name+"-"+role, setup{Hosts: "127.0.0.1 localhost\n"}, false); err != nil {
			c.Close()
			return nil, err
		}
		machines[role] = *m
	}
	if err := c.join(ctx, machines); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close ends the machines.
func (c *Clean) Close() {
	for _, m := range []*Machine{c.Client, c.router, c.Server} {
		if m != nil {
			m.stop()
		}
	}
}

func (c *Clean) join(ctx context.Context, machines map[string]*Machine) error {
	first := map[string]netip.Addr{}
	for i, cable := range cleanLinks {
		prefix := netip.MustParsePrefix(cable.network)
		here, there := prefix.Addr().Next(), prefix.Addr().Next().Next()
		if err := plug(machines[cable.from], machines[cable.to], fmt.Sprintf("wire%d", i), here, there); err != nil {
			return err
		}
		first[cable.from+cable.to] = there
	}
	c.Direct, c.Routed = first["clientserver"], first["routerserver"]
	if err := route(c.Client, cleanLinks[2].network, first["clientrouter"]); err != nil {
		return err
	}
	if err := route(c.Server, cleanLinks[1].network, c.Routed.Prev()); err != nil {
		return err
	}
	if out, err := c.router.Command(ctx, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward").CombinedOutput(); err != nil {
		return fmt.Errorf("switch forwarding on: %w: %s", err, out)
	}
	return nil
}

// plug lays a veth pair between two machines. An end gets its address if that is valid.
func plug(from, to *Machine, name string, here, there netip.Addr) error {
	fromLinks, fromNS, err := from.links()
	if err != nil {
		return err
	}
	defer fromNS.Close()
	defer fromLinks.Close()
	toLinks, toNS, err := to.links()
	if err != nil {
		return err
	}
	defer toNS.Close()
	defer toLinks.Close()
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name, PeerNamespace: netlink.NsFd(int(toNS)),
	}
	if err := fromLinks.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	peer, err := toLinks.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s of %s: %w", name, to.name, err)
	}
	valid := func(a netip.Addr) []netip.Addr {
		if !a.IsValid() {
			return nil
		}
		return []netip.Addr{a}
	}
	return errors.Join(
		addAddresses(fromLinks, veth, valid(here)), addAddresses(toLinks, peer, valid(there)),
		up(fromLinks, "lo", name), up(toLinks, "lo", name),
	)
}

func route(m *Machine, network string, via netip.Addr) error {
	links, ns, err := m.links()
	if err != nil {
		return err
	}
	defer ns.Close()
	defer links.Close()
	_, dst, err := net.ParseCIDR(network)
	if err != nil {
		return err
	}
	if err := links.RouteAdd(&netlink.Route{Dst: dst, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route %s on %s: %w", network, m.name, err)
	}
	return nil
}
