// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// router is a machine between two others, without skep: client's eth0 - eth0, eth1 - server's eth1. Its addresses are those
// of a testNode with a link to elsewhere, so the same packets cross both.
type router struct{ client, ns, server namespace }

// What kube-proxy's rules lead to. The addresses are none of skep's, whose socket programs all of the benchmark's processes run.
var (
	routedServer = netip.MustParseAddrPort("198.18.0.2:8080")
	peerServices = netip.MustParsePrefix("10.99.0.0/16")
	peerService  = netip.MustParseAddrPort("10.99.0.80:80")
)

func newRouter(b *testing.B) router {
	b.Helper()
	r := router{newNamespace(b), newNamespace(b), newNamespace(b)}
	r.ns.do(b, func() error {
		for name, peer := range map[string]namespace{"eth0": r.client, "eth1": r.server} {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(peer)}); err != nil {
				return err
			}
		}
		return errors.Join(up("eth0"), up("eth1"), addr("eth0", netip.PrefixFrom(nodeV4, 24)), addr("eth1", netip.MustParsePrefix("198.18.0.1/24")),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
	})
	r.server.do(b, func() error {
		return errors.Join(up("eth1"), addr("eth1", netip.PrefixFrom(routedServer.Addr(), 24)),
			routeVia("eth1", outsideV4, routedServer.Addr().Prev(), netip.Addr{}))
	})
	r.client.do(b, func() error {
		return errors.Join(up("eth0"), addr("eth0", netip.PrefixFrom(outsideV4, 24)),
			routeVia("eth0", peerService.Addr(), nodeV4, netip.Addr{}), routeVia("eth0", routedServer.Addr(), nodeV4, netip.Addr{}))
	})
	return r
}

// feed runs a command in the router with this input.
func (r router) feed(b *testing.B, input string, command ...string) {
	b.Helper()
	r.ns.do(b, func() error {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stdin = strings.NewReader(input)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %.500s", command, err, out)
		}
		return nil
	})
}

// proxied is a service with one backend, for the rules that kube-proxy writes.
type proxied struct {
	clusterIP netip.AddrPort
	nodePort  int
	proto     string
	backend   netip.AddrPort
}

// proxiedServices are n of which only the last is ever asked for: kube-proxy's order is random, and this is the end that
// its users have.
func proxiedServices(n int, last proxied) []proxied {
	out := make([]proxied, 0, n)
	a := netip.MustParseAddr("10.99.64.0")
	for len(out) < n-1 {
		a = a.Next()
		out = append(out, proxied{netip.AddrPortFrom(a, 80), 0, "tcp", last.backend})
	}
	return append(out, last)
}

// kubeProxyNFT are kube-proxy's chains in nftables mode (Kubernetes 1.36, pkg/proxy/nftables), for IPv4.
func kubeProxyNFT(services []proxied) string {
	var ips, nodePorts, chains strings.Builder
	for i, s := range services {
		fmt.Fprintf(&ips, "%s . %s . %d : goto service-%d,", s.clusterIP.Addr(), s.proto, s.clusterIP.Port(), i)
		if s.nodePort != 0 {
			fmt.Fprintf(&nodePorts, "%s . %d : goto external-%d,", s.proto, s.nodePort, i)
		}
		fmt.Fprintf(&chains, `
	chain endpoint-%[1]d {
		ip saddr %[2]s jump mark-for-masquerade
		meta l4proto %[3]s dnat to %[4]s
	}
	chain service-%[1]d {
		ip daddr %[5]s %[3]s dport %[6]d ip saddr != %[7]s jump mark-for-masquerade
		numgen random mod 1 vmap { 0 : goto endpoint-%[1]d }
	}
	chain external-%[1]d {
		jump mark-for-masquerade
		goto service-%[1]d
	}`, i, s.backend.Addr(), s.proto, s.backend, s.clusterIP.Addr(), s.clusterIP.Port(), clusterCIDRs[0])
	}
	elements := func(list string) string {
		if list == "" {
			return ""
		}
		return "elements = { " + strings.TrimSuffix(list, ",") + " }"
	}
	return fmt.Sprintf(`table ip kube-proxy {
	set nodeport-ips { type ipv4_addr; elements = { %s } }
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	%s
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; %s; }
	map service-nodeports { type inet_proto . inet_service : verdict; %s; }
	map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
	map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
	map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
	chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain cluster-ips-check { ip daddr %s reject; }
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}
	chain masquerading {
		meta mark & 0x4000 == 0 return
		meta mark set meta mark ^ 0x4000
		masquerade fully-random
	}
	chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump firewall-check; }
	chain filter-input { type filter hook input priority -110; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }
	chain filter-forward { type filter hook forward priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
	chain filter-output { type filter hook output priority -110; ct state new jump service-endpoints-check; ct state new jump firewall-check; }
	chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
}
`, nodeV4, chains.String(), elements(ips.String()), elements(nodePorts.String()), peerServices)
}

// kubeProxyIPTables are kube-proxy's chains in iptables mode (Kubernetes 1.36, pkg/proxy/iptables), for iptables-restore.
func kubeProxyIPTables(services []proxied) string {
	var chains, rules, portRules strings.Builder
	for i, s := range services {
		dst := fmt.Sprintf(`-p %s -m comment --comment "default/s%d" -m %s --dport`, s.proto, i, s.proto)
		fmt.Fprintf(&chains, ":KUBE-SVC-%d - [0:0]\n:KUBE-SEP-%d - [0:0]\n", i, i)
		fmt.Fprintf(&rules, "-A KUBE-SERVICES -d %s/32 %s %d -j KUBE-SVC-%d\n", s.clusterIP.Addr(), dst, s.clusterIP.Port(), i)
		fmt.Fprintf(&rules, "-A KUBE-SVC-%d ! -s %s -d %s/32 %s %d -j KUBE-MARK-MASQ\n", i, clusterCIDRs[0], s.clusterIP.Addr(), dst, s.clusterIP.Port())
		fmt.Fprintf(&rules, "-A KUBE-SVC-%d -j KUBE-SEP-%d\n", i, i)
		fmt.Fprintf(&rules, "-A KUBE-SEP-%d -s %s/32 -j KUBE-MARK-MASQ\n", i, s.backend.Addr())
		fmt.Fprintf(&rules, "-A KUBE-SEP-%d -p %s -m %s -j DNAT --to-destination %s\n", i, s.proto, s.proto, s.backend)
		if s.nodePort != 0 {
			fmt.Fprintf(&chains, ":KUBE-EXT-%d - [0:0]\n", i)
			fmt.Fprintf(&portRules, "-A KUBE-NODEPORTS %s %d -j KUBE-EXT-%d\n", dst, s.nodePort, i)
			fmt.Fprintf(&rules, "-A KUBE-EXT-%d -j KUBE-MARK-MASQ\n-A KUBE-EXT-%d -j KUBE-SVC-%d\n", i, i, i)
		}
	}
	return `*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
` + chains.String() + `-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
` + rules.String() + portRules.String() + `-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
`
}
