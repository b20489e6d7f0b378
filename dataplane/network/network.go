// SPDX-License-Identifier: Apache-2.0

// Package network gives the node its part of the pod network: device skep0 with the addresses that
// the node answers to its pods, routes that keep unknown addresses from leaving, forwarding, and the
// few netfilter rules that an administrator expects to see. All of it is idempotent: Configure makes
// what is missing and repairs what was changed.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is the node's own end of the pod network.
const Device = "skep0"

// unreachableMetric is above every route that anything else would install.
const unreachableMetric = 1 << 24

// Config of a node's network.
type Config struct {
	ClusterCIDRs, ServiceCIDRs []netip.Prefix
	ServiceAddresses           []netip.Addr // on skep0: services that the node answers itself (DNS)
	Log                        *slog.Logger
}

// Gateway is the first address of a pod range; it lives on skep0.
func Gateway(podCIDR netip.Prefix) netip.Addr {
	return podCIDR.Masked().Addr().Next()
}

// Configure makes the node's network so for its own pod ranges.
func Configure(ctx context.Context, cfg Config, podCIDRs []netip.Prefix) error {
	return errors.Join(ConfigureLinks(cfg, podCIDRs), ensureRules(ctx, cfg, podCIDRs))
}

// ConfigureLinks is Configure without netfilter's rules: it starts no process, and takes next to
// nothing when all is as it should be.
func ConfigureLinks(cfg Config, podCIDRs []netip.Prefix) error {
	device, err := ensureDevice()
	if err != nil {
		return err
	}
	addrs := append([]netip.Addr(nil), cfg.ServiceAddresses...)
	for _, p := range podCIDRs {
		addrs = append(addrs, Gateway(p))
	}
	v6 := HasIPv6()
	return errors.Join(
		ensureAddresses(device, addrs, v6),
		ensureUnreachable(append(append([]netip.Prefix(nil), cfg.ClusterCIDRs...), cfg.ServiceCIDRs...), v6),
		sysctls(v6),
	)
}

// HasIPv6 says whether the kernel does IPv6.
func HasIPv6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// ensureDevice makes skep0: a bridge without ports, as not every kernel has dummy devices.
func ensureDevice() (netlink.Link, error) {
	device, err := netlink.LinkByName(Device)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = Device
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("device %s: %w", Device, err)
		}
		device, err = netlink.LinkByName(Device)
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", Device, err)
	}
	if device.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(device); err != nil {
			return nil, fmt.Errorf("device %s up: %w", Device, err)
		}
	}
	return device, nil
}

func ensureAddresses(device netlink.Link, want []netip.Addr, v6 bool) error {
	have, err := netlink.AddrList(device, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", Device, err)
	}
	var errs []error
	missing := map[netip.Addr]bool{}
	for _, a := range want {
		if a.Is4() || v6 {
			missing[a] = true
		}
	}
	for i := range have {
		a, _ := netip.AddrFromSlice(have[i].IP)
		a = a.Unmap()
		switch {
		case missing[a]:
			delete(missing, a)
		case !a.IsLinkLocalUnicast():
			if err := netlink.AddrDel(device, &have[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("address %s of %s: %w", a, Device, err))
			}
		}
	}
	for a := range missing {
		n := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			// Nobody else can have it, and a bridge without ports would never finish asking.
			n.Flags = unix.IFA_F_NODAD
			// Deprecated: never the source of what the node itself sends to its pods.
			n.PreferedLft, n.ValidLft = 0, math.MaxUint32
		} else {
			n.Scope = unix.RT_SCOPE_HOST // to the same end
		}
		if err := netlink.AddrReplace(device, n); err != nil {
			errs = append(errs, fmt.Errorf("address %s on %s: %w", a, Device, err))
		}
	}
	return errors.Join(errs...)
}

// ensureUnreachable refuses what no better route knows, at once and without a packet leaving.
func ensureUnreachable(prefixes []netip.Prefix, v6 bool) error {
	var errs []error
	for _, p := range prefixes {
		if p.Addr().Is6() && !v6 {
			continue
		}
		if err := netlink.RouteReplace(unreachable(p)); err != nil {
			errs = append(errs, fmt.Errorf("unreachable route %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func unreachable(p netip.Prefix) *netlink.Route {
	r := &netlink.Route{
		Dst: ipNet(p.Masked()), Type: unix.RTN_UNREACHABLE, Priority: unreachableMetric, Table: unix.RT_TABLE_MAIN,
		Family: netlink.FAMILY_V4, Protocol: protocolSkep,
	}
	if p.Addr().Is6() {
		r.Family = netlink.FAMILY_V6
		r.LinkIndex = 1 // the kernel keeps such IPv6 routes on lo
	}
	return r
}

// protocolSkep marks routes as skep's, so that Cleanup finds them whatever the ranges were.
const protocolSkep netlink.RouteProtocol = 0x5b

// OwnsRoute tells skep's own routes.
func OwnsRoute(r netlink.Route) bool { return r.Protocol == protocolSkep }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func sysctls(v6 bool) error {
	errs := []error{
		writeSysctl("net/ipv4/ip_forward", "1"),
		// Answers to pods may come another way than the routing table would send them.
		writeSysctl("net/ipv4/conf/"+Device+"/rp_filter", "0"),
	}
	if v6 {
		errs = append(errs, keepRouterAdvertisements(), writeSysctl("net/ipv6/conf/all/forwarding", "1"))
	}
	return errors.Join(errs...)
}

// keepRouterAdvertisements: a host that forwards ignores router advertisements unless told 2; one that
// got its address by them would lose it.
func keepRouterAdvertisements() error {
	files, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == "1" {
			errs = append(errs, os.WriteFile(f, []byte("2"), 0))
		}
	}
	return errors.Join(errs...)
}

func writeSysctl(name, value string) error {
	path := "/proc/sys/" + name
	if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

// Cleanup removes all that Configure made, but forwarding, which others may rely on by now.
func Cleanup(ctx context.Context) error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: protocolSkep}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			errs = append(errs, fmt.Errorf("routes: %w", err))
		}
		for i := range routes {
			if err := netlink.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("route %s: %w", routes[i].Dst, err))
			}
		}
	}
	return errors.Join(append(errs, removeLink(Device), removeLink(Tunnel), removeRules(ctx))...)
}
