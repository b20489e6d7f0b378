// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tunnel is the VXLAN device.
const Tunnel = "skep-vxlan"

const (
	// tunnelID is the VXLAN network identifier, tunnelPort the UDP port: Linux's own, which firewalls of
	// other orchestrators' users open already (IANA's is 4789).
	tunnelID   = 0x5b
	tunnelPort = 8472
	// What VXLAN puts before a packet (RFC 7348): Ethernet, VXLAN, UDP and IP headers.
	overhead4 = 14 + 8 + 8 + 20
	overhead6 = 14 + 8 + 8 + 40
	// minMTU is IPv6's (RFC 8200): with less, pods would have no IPv6.
	minMTU = 1280
)

// PodMTU is the largest packet that pods may send: what the device of the node's primary address takes,
// less what the tunnel needs.
func PodMTU(routing Routing, nodeIPs []netip.Addr) (int, error) {
	link, err := linkOf(ofFamily(nodeIPs, underlay(nodeIPs)))
	if err != nil {
		return 0, err
	}
	return podMTU(routing, link.Attrs().MTU, underlay(nodeIPs)), nil
}

func podMTU(routing Routing, device int, v6 bool) int {
	switch {
	case routing != VXLAN:
		return device
	case v6:
		return max(device-overhead6, minMTU)
	default:
		return max(device-overhead4, minMTU)
	}
}

// linkOf finds the device that has an address.
func linkOf(a netip.Addr) (netlink.Link, error) {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("addresses of the node: %w", err)
	}
	for _, have := range all {
		if ip, ok := netip.AddrFromSlice(have.IP); ok && ip.Unmap() == a {
			return netlink.LinkByIndex(have.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no device of this machine has the node's address %s: name one that it has with --node-ip", a)
}

// Peers makes routes, neighbours and forwarding entries for the other nodes, and removes those of nodes
// that are no more. It returns what cannot be, by the peer's name.
func Peers(routing Routing, self Self, peers []Peer) (problems map[string]string, err error) {
	self.Devices = map[netip.Addr]int{}
	if routing == VXLAN {
		tunnel, err := ensureTunnel(self.Addrs)
		if err != nil {
			return nil, err
		}
		self.Tunnel = tunnel.Attrs().Index
	} else {
		if err := removeLink(Tunnel); err != nil {
			return nil, err
		}
		for _, a := range self.Addrs {
			link, err := linkOf(a)
			if err != nil {
				return nil, err
			}
			self.Devices[a] = link.Attrs().Index
		}
	}
	if !HasIPv6() {
		peers = withoutIPv6(peers)
	}
	want, problems := plan(routing, self, peers)
	have, err := read(self.Tunnel)
	if err != nil {
		return problems, err
	}
	return problems, apply(self.Tunnel, have, want)
}

func withoutIPv6(peers []Peer) []Peer {
	var out []Peer
	for _, p := range peers {
		p.PodCIDRs = only4(p.PodCIDRs)
		out = append(out, p)
	}
	return out
}

func only4(in []netip.Prefix) (out []netip.Prefix) {
	for _, p := range in {
		if p.Addr().Is4() {
			out = append(out, p)
		}
	}
	return out
}

// ensureTunnel makes the VXLAN device, or makes it anew if it is not as it must be.
func ensureTunnel(addrs []netip.Addr) (netlink.Link, error) {
	v6 := underlay(addrs)
	local := ofFamily(addrs, v6)
	below, err := linkOf(local)
	if err != nil {
		return nil, err
	}
	want := &netlink.Vxlan{
		LinkAttrs: netlink.NewLinkAttrs(), VxlanId: tunnelID, Port: tunnelPort, SrcAddr: local.AsSlice(),
		UDPCSum: true, // a checksum outside lets network cards and GRO vouch for the one inside
	}
	want.Name, want.MTU, want.HardwareAddr = Tunnel, podMTU(VXLAN, below.Attrs().MTU, v6), hardware(vtepMAC(addrs[0]))
	have, err := netlink.LinkByName(Tunnel)
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return nil, fmt.Errorf("device %s: %w", Tunnel, err)
	}
	if err == nil && !sameTunnel(have, want) {
		if err := netlink.LinkDel(have); err != nil {
			return nil, fmt.Errorf("device %s is not as it was made, and cannot be replaced: %w", Tunnel, err)
		}
		have = nil
	}
	if err != nil || have == nil {
		if err := netlink.LinkAdd(want); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("device %s (does the kernel know VXLAN? `modprobe vxlan`, or use --routing=direct): %w", Tunnel, err)
		}
		if have, err = netlink.LinkByName(Tunnel); err != nil {
			return nil, fmt.Errorf("device %s: %w", Tunnel, err)
		}
	}
	if have.Attrs().MTU != want.MTU {
		if err := netlink.LinkSetMTU(have, want.MTU); err != nil {
			return nil, fmt.Errorf("MTU %d of device %s: %w", want.MTU, Tunnel, err)
		}
	}
	errs := []error{writeSysctl("net/ipv4/conf/"+Tunnel+"/rp_filter", "0")}
	if HasIPv6() {
		// No link-local address: nobody on the tunnel asks for neighbours.
		errs = append(errs, writeSysctl("net/ipv6/conf/"+Tunnel+"/addr_gen_mode", "1"), writeSysctl("net/ipv6/conf/"+Tunnel+"/accept_ra", "0"))
	}
	if have.Attrs().Flags&net.FlagUp == 0 {
		errs = append(errs, netlink.LinkSetUp(have))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("device %s: %w", Tunnel, err)
	}
	return have, nil
}

// sameTunnel compares what cannot be changed without making the device anew.
func sameTunnel(have netlink.Link, want *netlink.Vxlan) bool {
	v, ok := have.(*netlink.Vxlan)
	return ok && v.VxlanId == want.VxlanId && v.Port == want.Port && v.SrcAddr.Equal(want.SrcAddr) && !v.Learning &&
		v.HardwareAddr.String() == want.HardwareAddr.String()
}

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return fmt.Errorf("device %s: %w", name, err)
	}
	return nil
}

// read lists what is in the kernel for peers' sake. What skep would never write stands for itself and is
// removed as unwanted.
func read(tunnel int) (peering, error) {
	have := newPeering()
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(f, &netlink.Route{Protocol: protocolSkep}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return have, fmt.Errorf("routes: %w", err)
		}
		for _, r := range routes {
			if r.Type == unix.RTN_UNREACHABLE || r.Dst == nil {
				continue
			}
			dst := prefixOf(r.Dst)
			have.routes[dst] = peerRoute{dst: dst, via: addrOf(r.Gw), src: addrOf(r.Src), device: r.LinkIndex, onlink: r.Flags&unix.RTNH_F_ONLINK != 0}
		}
		if tunnel == 0 {
			continue
		}
		entries, err := netlink.NeighList(tunnel, f)
		if err != nil {
			return have, fmt.Errorf("neighbours on %s: %w", Tunnel, err)
		}
		for _, n := range entries {
			if ip := addrOf(n.IP); n.State&netlink.NUD_PERMANENT != 0 {
				have.neighbours[ip] = neighbour{ip, macOf(n.HardwareAddr)}
			}
		}
	}
	if tunnel == 0 {
		return have, nil
	}
	entries, err := netlink.NeighList(tunnel, unix.AF_BRIDGE)
	if err != nil {
		return have, fmt.Errorf("forwarding entries of %s: %w", Tunnel, err)
	}
	for _, n := range entries {
		mac := macOf(n.HardwareAddr)
		have.forwardings[mac] = forwarding{mac, addrOf(n.IP)}
	}
	return have, nil
}

// apply turns have into want. What leads somewhere comes before what leads there, and goes after it.
func apply(tunnel int, have, want peering) error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for mac, f := range want.forwardings {
		if have.forwardings[mac] != f {
			if err := netlink.NeighSet(f.netlink(tunnel)); err != nil {
				fail("forwarding entry for %s: %w", f.remote, err)
			}
		}
	}
	for ip, n := range want.neighbours {
		if have.neighbours[ip] != n {
			if err := netlink.NeighSet(n.netlink(tunnel)); err != nil {
				fail("neighbour %s: %w", ip, err)
			}
		}
	}
	for dst, r := range want.routes {
		if have.routes[dst] == r {
			continue
		}
		if err := netlink.RouteReplace(r.netlink()); err != nil {
			if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
				err = fmt.Errorf("%w; nodes that are not on one link need --routing=vxlan", err)
			}
			fail("route to %s by %s: %w", dst, r.via, err)
		}
	}
	for dst, r := range have.routes {
		if _, wanted := want.routes[dst]; !wanted {
			if err := netlink.RouteDel(r.netlink()); err != nil && !errors.Is(err, unix.ESRCH) {
				fail("route to %s: %w", dst, err)
			}
		}
	}
	for ip, n := range have.neighbours {
		if _, wanted := want.neighbours[ip]; !wanted {
			if err := netlink.NeighDel(n.netlink(tunnel)); err != nil && !errors.Is(err, unix.ENOENT) {
				fail("neighbour %s: %w", ip, err)
			}
		}
	}
	for mac, f := range have.forwardings {
		if _, wanted := want.forwardings[mac]; !wanted {
			if err := netlink.NeighDel(f.netlink(tunnel)); err != nil && !errors.Is(err, unix.ENOENT) {
				fail("forwarding entry for %s: %w", f.remote, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (r peerRoute) netlink() *netlink.Route {
	out := &netlink.Route{Dst: ipNet(r.dst), Gw: r.via.AsSlice(), LinkIndex: r.device, Protocol: protocolSkep, Table: unix.RT_TABLE_MAIN}
	if r.src.IsValid() {
		out.Src = r.src.AsSlice()
	}
	if r.onlink {
		out.Flags = int(netlink.FLAG_ONLINK)
	}
	return out
}

func (n neighbour) netlink(device int) *netlink.Neigh {
	f := netlink.FAMILY_V4
	if n.ip.Is6() {
		f = netlink.FAMILY_V6
	}
	return &netlink.Neigh{LinkIndex: device, Family: f, State: netlink.NUD_PERMANENT, IP: n.ip.AsSlice(), HardwareAddr: hardware(n.mac)}
}

func (f forwarding) netlink(device int) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: device, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT,
		IP: f.remote.AsSlice(), HardwareAddr: hardware(f.mac)}
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func prefixOf(n *net.IPNet) netip.Prefix {
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addrOf(n.IP), bits)
}

func macOf(h net.HardwareAddr) (mac [6]byte) {
	copy(mac[:], h)
	return mac
}
