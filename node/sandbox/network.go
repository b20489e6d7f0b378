// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

const (
	linkPrefix = "skep"
	podLink    = "eth0"
	// noAddress is IN6_ADDR_GEN_MODE_NONE: the kernel gives the link no link-local address.
	noAddress = "1"
)

// The pods' gateway. No device has these addresses: a permanent neighbour entry in the pod says
// that the veth's other end answers for them, so nobody ever asks.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// hostLinkName is the name of a pod's link in the node's namespace.
func hostLinkName(uid types.UID) string {
	sum := sha256.Sum256([]byte(uid))
	return linkPrefix + hex.EncodeToString(sum[:4])
}

// newMAC makes a random unicast, locally administered address.
func newMAC() (net.HardwareAddr, error) {
	mac := make(net.HardwareAddr, 6)
	if _, err := rand.Read(mac); err != nil {
		return nil, err
	}
	mac[0] = mac[0]&^1 | 2
	return mac, nil
}

// plug makes the veth pair between the node and the network namespace at nsPath, with addresses and routes on
// both sides, and completes the record's endpoint.
func plug(r *record, mtu int) error {
	ns, err := os.Open(r.Sandbox.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	e := &r.Sandbox.Endpoint
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = r.HostLink, mtu, e.HostMAC
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: podLink, PeerHardwareAddr: e.PodMAC, PeerNamespace: netlink.NsFd(ns.Fd()),
		PeerMTU: uint32(mtu), PeerNumTxQueues: 1, PeerNumRxQueues: 1,
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("create link %s: %w", r.HostLink, err)
	}
	link, err := netlink.LinkByName(r.HostLink)
	if err != nil {
		return fmt.Errorf("link %s: %w", r.HostLink, err)
	}
	e.Ifindex = link.Attrs().Index
	if err := inNamespace(r.Sandbox.NetNS, unix.CLONE_NEWNET, func() error { return setUpPod(e.Addrs, e.HostMAC) }); err != nil {
		return fmt.Errorf("pod's end of %s: %w", r.HostLink, err)
	}
	return setUpHost(link, e.Addrs, e.PodMAC)
}

// setUpPod runs inside the pod's network namespace.
func setUpPod(addrs []netip.Addr, gatewayMAC net.HardwareAddr) error {
	link, err := netlink.LinkByName(podLink)
	if err != nil {
		return err
	}
	index := link.Attrs().Index
	for _, a := range addrs {
		// Nobody else can have the address: duplicate detection would only delay its use.
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: hostNet(a), Flags: addrFlags(a)}); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, a := range addrs {
		gw := gatewayOf(a)
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family(a), State: netlink.NUD_PERMANENT,
			IP: gw.AsSlice(), HardwareAddr: gatewayMAC}); err != nil {
			return fmt.Errorf("neighbour %s: %w", gw, err)
		}
		route := &netlink.Route{LinkIndex: index, Dst: defaultNet(a), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("default route by %s: %w", gw, err)
		}
	}
	return nil
}

// setUpHost makes the node reach the pod's addresses through link.
func setUpHost(link netlink.Link, addrs []netip.Addr, podMAC net.HardwareAddr) error {
	name, index := link.Attrs().Name, link.Attrs().Index
	if err := setSysctl("net/ipv6/conf/"+name+"/addr_gen_mode", noAddress); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := setSysctl("net/ipv6/conf/"+name+"/accept_ra", "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("link %s up: %w", name, err)
	}
	for _, a := range addrs {
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family(a), State: netlink.NUD_PERMANENT,
			IP: a.AsSlice(), HardwareAddr: podMAC}); err != nil {
			return fmt.Errorf("neighbour %s on %s: %w", a, name, err)
		}
		// Replace: a route to the address may be left from a pod whose link went away uncleanly.
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("route %s on %s: %w", a, name, err)
		}
	}
	return nil
}

// setUpLoopback and the settings that must be there before the first link is: run on the thread
// that made the network namespace.
func prepareNetNS() error {
	for _, s := range []struct{ key, value string }{
		{"net/ipv6/conf/default/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_ra", "0"},
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		{"net/ipv4/ping_group_range", "0 2147483647"},
	} {
		if err := setSysctl(s.key, s.value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// unplug removes the pod's link, and with it addresses, routes and neighbours of both ends.
func unplug(name string) error {
	link, err := netlink.LinkByName(name)
	if missingLink(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil && !missingLink(err) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

func missingLink(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func defaultNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())}
}

func gatewayOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return gateway4
	}
	return gateway6
}

func family(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func addrFlags(a netip.Addr) int {
	if a.Is6() {
		return unix.IFA_F_NODAD
	}
	return 0
}
