// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/network"
)

// syncNode tells the programs what the node's addresses are, and attaches the host programs to the
// devices that hold them.
func (d *Dataplane) syncNode() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.syncNodeLocked()
}

func (d *Dataplane) syncNodeLocked() error {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of the node: %w", err)
	}
	have := make([]address, 0, len(all))
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			have = append(have, address{ip.Unmap(), a.LinkIndex})
		}
	}
	addrs, devices := nodeAddresses(d.cfg.NodeIPs, have)
	// Answers to connections that this node handed on to another come back through the tunnel.
	if tunnel, err := netlink.LinkByName(network.Tunnel); err == nil {
		devices = append(devices, tunnel.Attrs().Index)
	}
	if err := d.maps.SetNodeAddresses(addrs); err != nil {
		return err
	}
	d.names.setNode(addrs)
	own := node(d.cfg.NodeIPs, d.podCIDRs)
	// Without one there are no peers to hand anything on to.
	if mtu, err := network.PodMTU(d.cfg.Routing, d.cfg.NodeIPs); err == nil {
		own.MTU = uint32(mtu)
	}
	if err := d.maps.SetNode(own); err != nil {
		return err
	}
	if err := d.maps.SetClient(d.loader.NetnsCookie(), maps.ClientOf(d.cfg.NodeIPs)); err != nil {
		return err
	}
	if err := d.maps.SetRanges(ranges(d.cfg, d.podCIDRs)); err != nil {
		return err
	}
	ethernet := map[int]net.HardwareAddr{}
	for _, index := range devices {
		link, err := netlink.LinkByIndex(index)
		if err != nil || link.Attrs().EncapType == "loopback" {
			continue // gone meanwhile, or lo, whose connections the sockets translate
		}
		if err := d.loader.AttachHost(index); err != nil {
			return err
		}
		if link.Attrs().Name != network.Tunnel {
			if err := d.attachXDP(index, link.Attrs().Name); err != nil {
				return err
			}
		}
		if mac := link.Attrs().HardwareAddr; len(mac) == 6 && link.Attrs().Name != network.Tunnel {
			ethernet[index] = mac
		}
	}
	if err := d.announcer.setDevices(ethernet); err != nil {
		return err
	}
	old, err := d.loader.Hosts()
	if err != nil {
		return err
	}
	for _, index := range old {
		if !slices.Contains(devices, index) {
			if err := d.loader.DetachHost(index); err != nil {
				return err
			}
		}
	}
	return nil
}

// attachXDP is called with mu held.
func (d *Dataplane) attachXDP(index int, name string) error {
	mode, err := d.loader.AttachXDP(index)
	if err != nil && d.cfg.XDP != loader.XDPAuto {
		return err
	}
	if was, told := d.xdp[name]; !told || was != mode {
		if err != nil {
			d.cfg.Log.Warn("NodePorts with backends elsewhere are not served at the driver", "device", name, "err", err)
		} else if mode != loader.XDPOff {
			d.cfg.Log.Info("NodePorts with backends elsewhere are served at the driver", "device", name, "xdp", mode)
		}
		if d.xdp == nil {
			d.xdp = map[string]loader.XDPMode{}
		}
		d.xdp[name] = mode
	}
	return nil
}

type address struct {
	ip     netip.Addr
	device int
}

// nodeAddresses says which addresses and devices are the node's: those given, and what else is on the
// devices that hold them. It is pure.
func nodeAddresses(given []netip.Addr, have []address) (addrs []netip.Addr, devices []int) {
	addrs = slices.Clone(given)
	for _, a := range have {
		if slices.Contains(given, a.ip) && !slices.Contains(devices, a.device) {
			devices = append(devices, a.device)
		}
	}
	for _, a := range have {
		if slices.Contains(devices, a.device) && !slices.Contains(addrs, a.ip) && !a.ip.IsLinkLocalUnicast() && !a.ip.IsLoopback() {
			addrs = append(addrs, a.ip)
		}
	}
	return addrs, devices
}

// node picks what the programs lend. It is pure.
func node(ips []netip.Addr, podCIDRs []netip.Prefix) maps.Node {
	var n maps.Node
	for _, a := range slices.Backward(ips) {
		if a.Is4() {
			n.AddressV4 = maps.AddressOf(a)
		} else {
			n.AddressV6 = maps.AddressOf(a)
		}
	}
	// Until the node has pod ranges its own addresses serve for hairpins, too.
	n.GatewayV4, n.GatewayV6 = n.AddressV4, n.AddressV6
	for _, p := range slices.Backward(podCIDRs) {
		if p.Addr().Is4() {
			n.GatewayV4 = maps.AddressOf(network.Gateway(p))
		} else {
			n.GatewayV6 = maps.AddressOf(network.Gateway(p))
		}
	}
	return n
}

// ranges says where unknown addresses are refused, and the exceptions that skep0 answers. It is pure.
func ranges(cfg Config, podCIDRs []netip.Prefix) map[netip.Prefix]uint32 {
	out := map[netip.Prefix]uint32{}
	for _, p := range cfg.ServiceCIDRs {
		out[p.Masked()] = maps.RangeService
	}
	for _, p := range cfg.ClusterCIDRs {
		out[p.Masked()] = maps.RangeCluster
	}
	for _, p := range podCIDRs {
		out[p.Masked()] = maps.RangePods
		gateway := network.Gateway(p)
		out[netip.PrefixFrom(gateway, gateway.BitLen())] = maps.RangeOpen
	}
	for _, a := range cfg.ClusterDNS {
		out[netip.PrefixFrom(a, a.BitLen())] = maps.RangeOpen
	}
	return out
}

// repairInterval bounds how long a flushed netfilter chain stays so: netfilter tells nobody.
const repairInterval = time.Minute

// events of the node's network and of the other nodes. A channel that could not be had is nil: the repair interval remains.
type events struct {
	addrs  chan netlink.AddrUpdate
	routes chan netlink.RouteUpdate
	links  chan netlink.LinkUpdate
	neighs chan netlink.NeighUpdate
}

func (d *Dataplane) subscribe(ctx context.Context) events {
	e := events{make(chan netlink.AddrUpdate, 64), make(chan netlink.RouteUpdate, 64), make(chan netlink.LinkUpdate, 64), make(chan netlink.NeighUpdate, 64)}
	fail := func(err error) {
		if ctx.Err() == nil {
			d.cfg.Log.Warn("watching the node's network", "err", err)
		}
	}
	if err := netlink.AddrSubscribeWithOptions(e.addrs, ctx.Done(), netlink.AddrSubscribeOptions{ErrorCallback: fail}); err != nil {
		fail(err)
		e.addrs = nil
	}
	if err := netlink.RouteSubscribeWithOptions(e.routes, ctx.Done(), netlink.RouteSubscribeOptions{ErrorCallback: fail}); err != nil {
		fail(err)
		e.routes = nil
	}
	if err := netlink.LinkSubscribeWithOptions(e.links, ctx.Done(), netlink.LinkSubscribeOptions{ErrorCallback: fail}); err != nil {
		fail(err)
		e.links = nil
	}
	if err := netlink.NeighSubscribeWithOptions(e.neighs, ctx.Done(), netlink.NeighSubscribeOptions{ErrorCallback: fail}); err != nil {
		fail(err)
		e.neighs = nil
	}
	return e
}

// watchNode repairs the node's network when somebody changes addresses, links or routes.
func (d *Dataplane) watchNode(ctx context.Context, e events) {
	tick := time.NewTicker(repairInterval)
	defer tick.Stop()
	for {
		rules := false
		select {
		case <-ctx.Done():
			return
		case a, ok := <-e.addrs:
			if !ok {
				e.addrs = nil
			}
			if !ok || d.isPodDevice(a.LinkIndex) {
				continue
			}
		case r, ok := <-e.routes:
			if !ok {
				e.routes = nil
			}
			if !ok || r.Type != unix.RTM_DELROUTE || !network.OwnsRoute(r.Route) {
				continue
			}
		case l, ok := <-e.links:
			if !ok {
				e.links = nil
			}
			if !ok || !d.mattersAsLink(l) {
				continue
			}
		case n, ok := <-e.neighs:
			if !ok {
				e.neighs = nil
			}
			if !ok || n.Type != unix.RTM_DELNEIGH || !isTunnel(n.LinkIndex) {
				continue
			}
		case <-d.peers.changed:
		case <-tick.C:
			rules = true
		}
		d.repair(ctx, rules)
	}
}

// mattersAsLink: skep's own devices, whatever becomes of them, and devices with the node's addresses, whose
// routes the kernel drops without a word when they go down.
func (d *Dataplane) mattersAsLink(l netlink.LinkUpdate) bool {
	if name := l.Attrs().Name; name == network.Device || name == network.Tunnel {
		return l.Header.Type == unix.RTM_DELLINK || l.Attrs().Flags&net.FlagUp == 0
	}
	hosts, err := d.loader.Hosts()
	return err == nil && slices.Contains(hosts, l.Attrs().Index)
}

func isTunnel(index int) bool {
	l, err := netlink.LinkByName(network.Tunnel)
	return err == nil && l.Attrs().Index == index
}

func (d *Dataplane) isPodDevice(index int) bool {
	pods, err := d.loader.Pods()
	return err == nil && slices.Contains(pods, index)
}

func (d *Dataplane) repair(ctx context.Context, rules bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var err error
	if d.podCIDRs == nil {
		err = d.syncNodeLocked()
	} else {
		err = d.configure(ctx, rules)
	}
	if err != nil && ctx.Err() == nil {
		d.cfg.Log.Error("the node's network could not be repaired, will retry", "err", err)
	}
}
