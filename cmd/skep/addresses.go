// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// nodeAddrs finds the addresses under which this machine is known: for each family, the first
// global address of the interface that the default route uses, or else of the first interface
// that is up and not loopback.
func nodeAddrs(hasIPv6 bool) ([]netip.Addr, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	families := []int{netlink.FAMILY_V4}
	if hasIPv6 {
		families = append(families, netlink.FAMILY_V6)
	}
	var addrs []netip.Addr
	for _, family := range families {
		preferred := defaultRouteLink(family)
		var found netip.Addr
		for _, link := range links {
			attrs := link.Attrs()
			if attrs.Flags&net.FlagUp == 0 || attrs.Flags&net.FlagLoopback != 0 || ownDevice(attrs.Name) {
				continue
			}
			if found.IsValid() && attrs.Index != preferred {
				continue
			}
			if a, ok := firstGlobal(link, family); ok {
				found = a
			}
		}
		if found.IsValid() {
			addrs = append(addrs, found)
		}
	}
	return addrs, nil
}

// ownDevice reports whether skep made the device: its addresses are not the node's.
func ownDevice(name string) bool { return len(name) >= 4 && name[:4] == "skep" }

// defaultRouteLink is the index of the default route's device, 0 without one.
func defaultRouteLink(family int) int {
	routes, err := netlink.RouteList(nil, family)
	if err != nil {
		return 0
	}
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			return r.LinkIndex
		}
	}
	return 0
}

func firstGlobal(link netlink.Link, family int) (netip.Addr, bool) {
	list, err := netlink.AddrList(link, family)
	if err != nil {
		return netip.Addr{}, false
	}
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if ok && addr.Unmap().IsGlobalUnicast() {
			return addr.Unmap(), true
		}
	}
	return netip.Addr{}, false
}
