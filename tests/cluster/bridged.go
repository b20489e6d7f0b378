// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Bridged is two hosts without skep that route between bridges of theirs, as simple pod networks do: a client and a server on
// the first host's bridge (Near), and a server on the other's (Far). No netfilter rule is anywhere.
type Bridged struct {
	Client, NearServer, FarServer *Machine
	Near, Far                     netip.Addr // of the servers

	hosts [2]*Machine
}

// bridgeNetworks are of RFC 2544's range for benchmarks, the cable between the hosts of RFC 5737's.
var (
	bridgeNetworks = [2]netip.Prefix{netip.MustParsePrefix("198.18.1.0/24"), netip.MustParsePrefix("198.18.2.0/24")}
	hostCable      = [2]netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}
)

// NewBridged makes the machines; name has to be unique on the host.
func NewBridged(ctx context.Context, name string) (*Bridged, error) {
	b := &Bridged{}
	for role, m := range map[string]**Machine{"client": &b.Client, "near": &b.NearServer, "far": &b.FarServer, "host0": &b.hosts[0], "host1": &b.hosts[1]} {
		var err error
		if *m, err = newMachine(name+"-"+role, setup{Hosts: "127.0.0.1 localhost\n"}, false); err != nil {
			b.Close()
			return nil, err
		}
	}
	if err := b.join(ctx); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Close ends the machines.
func (b *Bridged) Close() {
	for _, m := range []*Machine{b.Client, b.NearServer, b.FarServer, b.hosts[0], b.hosts[1]} {
		if m != nil {
			m.stop()
		}
	}
}

func (b *Bridged) join(ctx context.Context) error {
	if err := plug(b.hosts[0], b.hosts[1], "cable", hostCable[0], hostCable[1]); err != nil {
		return err
	}
	for i, members := range [][]*Machine{{b.Client, b.NearServer}, {b.FarServer}} {
		if err := b.bridge(i, members); err != nil {
			return err
		}
		if err := route(b.hosts[i], bridgeNetworks[1-i].String(), hostCable[1-i]); err != nil {
			return err
		}
		if out, err := b.hosts[i].Command(ctx, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward").CombinedOutput(); err != nil {
			return fmt.Errorf("switch forwarding on: %w: %s", err, out)
		}
	}
	b.Near, b.Far = bridgeNetworks[0].Addr().Next().Next().Next(), bridgeNetworks[1].Addr().Next().Next()
	return nil
}

// bridge gives a host one with the first address of its network, and its members the next ones.
func (b *Bridged) bridge(host int, members []*Machine) error {
	links, ns, err := b.hosts[host].links()
	if err != nil {
		return err
	}
	defer ns.Close()
	defer links.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := links.LinkAdd(br); err != nil {
		return fmt.Errorf("bridge of %s: %w", b.hosts[host].name, err)
	}
	gateway := bridgeNetworks[host].Addr().Next()
	if err := errors.Join(addAddresses(links, br, []netip.Addr{gateway}), up(links, "br0")); err != nil {
		return err
	}
	address := gateway
	for i, m := range members {
		address = address.Next()
		name := fmt.Sprint("port", i)
		if err := plug(b.hosts[host], m, name, netip.Addr{}, address); err != nil {
			return err
		}
		port, err := links.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := links.LinkSetMaster(port, br); err != nil {
			return fmt.Errorf("bridge %s: %w", name, err)
		}
		if err := route(m, bridgeNetworks[1-host].String(), gateway); err != nil {
			return err
		}
	}
	return nil
}
