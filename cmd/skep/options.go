// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/validation"

	"skep.io/skep/api"
)

// serverOptions are the flags of `skep server`; every one is also a key of its YAML file.
type serverOptions struct {
	config            string
	dataDir           string
	nodeName          string
	nodeIPs           []string
	bindAddress       string
	securePort        int
	advertiseAddress  string
	tlsSANs           []string
	clusterCIDR       string
	serviceCIDR       string
	nodePortRange     string
	clusterDomain     string
	imagesDir         string
	containerdAddress string
	writeKubeconfig   string
	ingressHTTPPort   int
	ingressHTTPSPort  int
	upstreamDNS       []string
	logLevel          string
	logFormat         string
}

func (o *serverOptions) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.config, "config", "", "YAML file whose keys are these flags' names (default "+api.ServerConfigPath+", if it exists)")
	f.StringVar(&o.dataDir, "data-dir", api.DefaultDataDir, "Where everything is kept that must survive a reboot")
	f.StringVar(&o.nodeName, "node-name", "", "Name of this node (default: the host's name)")
	f.StringSliceVar(&o.nodeIPs, "node-ip", nil, "Addresses of this node, at most one a family (default: those of the interface with the default route)")
	f.StringVar(&o.bindAddress, "bind-address", "::", "Address on which the API is served")
	f.IntVar(&o.securePort, "secure-port", api.DefaultAPIPort, "Port on which the API is served")
	f.StringVar(&o.advertiseAddress, "advertise-address", "", "Address under which other machines reach the API (default: the node's first address)")
	f.StringSliceVar(&o.tlsSANs, "tls-san", nil, "Further host names and addresses for the API's certificate")
	f.StringVar(&o.clusterCIDR, "cluster-cidr", api.DefaultClusterCIDR, "Address ranges of pods, at most one a family, separated by a comma")
	f.StringVar(&o.serviceCIDR, "service-cluster-ip-range", api.DefaultServiceCIDR, "Address ranges of services, at most one a family, separated by a comma")
	f.StringVar(&o.nodePortRange, "service-node-port-range", "30000-32767", "Ports that services of type NodePort may get")
	f.StringVar(&o.clusterDomain, "cluster-domain", api.DefaultClusterDomain, "Domain of the cluster's names")
	f.StringVar(&o.imagesDir, "images-dir", "", "Directory of image archives that are imported at start (default: DATA-DIR/images)")
	f.StringVar(&o.containerdAddress, "containerd-address", "", "Socket of the host's containerd (default: an own containerd inside this process)")
	f.StringVar(&o.writeKubeconfig, "write-kubeconfig", api.KubeconfigPath, "Where the administrator's client configuration is written, mode 0600")
	f.IntVar(&o.ingressHTTPPort, "ingress-http-port", 80, "Port of every node on which the ingress answers HTTP")
	f.IntVar(&o.ingressHTTPSPort, "ingress-https-port", 443, "Port of every node on which the ingress answers HTTPS")
	f.StringSliceVar(&o.upstreamDNS, "upstream-dns", nil, "Name servers for names outside the cluster (default: the host's)")
	f.StringVar(&o.logLevel, "log-level", "info", "One of debug, info, warn, error")
	f.StringVar(&o.logFormat, "log-format", "text", "One of text, json")
}

// serverSettings are the options once they have been checked and completed.
type serverSettings struct {
	dataDir           string
	nodeName          string
	nodeIPs           []netip.Addr
	bindAddress       net.IP
	securePort        int
	advertiseAddress  net.IP
	tlsSANs           []string
	clusterCIDRs      []netip.Prefix
	serviceCIDRs      []netip.Prefix
	nodePortRange     utilnet.PortRange
	clusterDomain     string
	clusterDNS        []netip.Addr
	imagesDir         string
	containerdAddress string
	kubeconfigPath    string
	ingressHTTPPort   uint16
	ingressHTTPSPort  uint16
	upstreamDNS       []string
}

// host is what complete needs to know of the machine.
type host struct {
	name    string
	addrs   []netip.Addr // at most one a family, IPv4 first
	hasIPv6 bool
}

// complete checks every option and derives what was not given. It reports all mistakes at once.
func (o *serverOptions) complete(h host) (serverSettings, error) {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, fmt.Errorf(format, args...)))
	}
	s := serverSettings{
		containerdAddress: o.containerdAddress, kubeconfigPath: o.writeKubeconfig,
		tlsSANs: o.tlsSANs, clusterDomain: o.clusterDomain, upstreamDNS: o.upstreamDNS,
	}

	var err error
	if s.dataDir, err = filepath.Abs(o.dataDir); err != nil || o.dataDir == "" {
		bad("data-dir", "%q is not a path", o.dataDir)
	}
	s.imagesDir = o.imagesDir
	if s.imagesDir == "" {
		s.imagesDir = filepath.Join(s.dataDir, "images")
	}

	s.nodeName = o.nodeName
	if s.nodeName == "" {
		s.nodeName = strings.ToLower(h.name)
	}
	for _, problem := range validation.IsDNS1123Subdomain(s.nodeName) {
		bad("node-name", "%q cannot name a node: %s", s.nodeName, problem)
	}
	for _, problem := range validation.IsDNS1123Subdomain(s.clusterDomain) {
		bad("cluster-domain", "%q: %s", s.clusterDomain, problem)
	}

	s.nodeIPs = h.addrs
	if len(o.nodeIPs) > 0 {
		s.nodeIPs = nil
		for _, text := range o.nodeIPs {
			a, err := netip.ParseAddr(text)
			if err != nil {
				bad("node-ip", "%q is not an IP address", text)
				continue
			}
			s.nodeIPs = append(s.nodeIPs, a.Unmap())
		}
	}
	if len(s.nodeIPs) == 0 && len(errs) == 0 {
		bad("node-ip", "this machine has no address but loopback's: give it one, or name the address to use")
	}

	if s.bindAddress = net.ParseIP(o.bindAddress); s.bindAddress == nil {
		bad("bind-address", "%q is not an IP address", o.bindAddress)
	} else if s.bindAddress.Equal(net.IPv6unspecified) && !h.hasIPv6 {
		s.bindAddress = net.IPv4zero
	}
	if len(s.nodeIPs) > 0 {
		s.advertiseAddress = s.nodeIPs[0].AsSlice()
	}
	if o.advertiseAddress != "" {
		if s.advertiseAddress = net.ParseIP(o.advertiseAddress); s.advertiseAddress == nil {
			bad("advertise-address", "%q is not an IP address", o.advertiseAddress)
		}
	}

	if s.securePort = o.securePort; !validPort(o.securePort) {
		bad("secure-port", "%d is not a port", o.securePort)
	}
	if s.ingressHTTPPort = uint16(o.ingressHTTPPort); !validPort(o.ingressHTTPPort) {
		bad("ingress-http-port", "%d is not a port", o.ingressHTTPPort)
	}
	if s.ingressHTTPSPort = uint16(o.ingressHTTPSPort); !validPort(o.ingressHTTPSPort) {
		bad("ingress-https-port", "%d is not a port", o.ingressHTTPSPort)
	}
	if r, err := utilnet.ParsePortRange(o.nodePortRange); err != nil {
		bad("service-node-port-range", "%w", err)
	} else {
		s.nodePortRange = *r
	}

	if s.clusterCIDRs, err = parseRanges(o.clusterCIDR, h.hasIPv6, 22, 56); err != nil {
		bad("cluster-cidr", "%w", err)
	}
	if s.serviceCIDRs, err = parseRanges(o.serviceCIDR, h.hasIPv6, 24, 120); err != nil {
		bad("service-cluster-ip-range", "%w", err)
	}
	for _, service := range s.serviceCIDRs {
		for _, pods := range s.clusterCIDRs {
			if service.Overlaps(pods) {
				bad("service-cluster-ip-range", "%s overlaps --cluster-cidr %s", service, pods)
			}
		}
		s.clusterDNS = append(s.clusterDNS, nthAddr(service, 10))
	}
	return s, errors.Join(errs...)
}

func validPort(p int) bool { return p > 0 && p < 1<<16 }

// parseRanges reads at most one range a family, IPv4 first; IPv6 ranges are left out on hosts
// without IPv6. A range longer than the given prefix length of its family is too small to use.
func parseRanges(text string, hasIPv6 bool, longest4, longest6 int) ([]netip.Prefix, error) {
	var v4, v6 []netip.Prefix
	for part := range strings.SplitSeq(text, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("%q is not an address range such as 10.42.0.0/16", part)
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%s has bits set behind its prefix length: did you mean %s?", p, p.Masked())
		}
		longest := longest6
		if p.Addr().Is4() {
			v4, longest = append(v4, p), longest4
		} else {
			v6 = append(v6, p)
		}
		if p.Bits() > longest {
			return nil, fmt.Errorf("%s is too small: its prefix length must be at most /%d", p, longest)
		}
	}
	if len(v4) > 1 || len(v6) > 1 {
		return nil, fmt.Errorf("%q has more than one range of a family", text)
	}
	if !hasIPv6 {
		if len(v4) == 0 {
			return nil, fmt.Errorf("%q has only IPv6 ranges, and this host has no IPv6", text)
		}
		return v4, nil
	}
	return append(v4, v6...), nil
}

// nthAddr is the nth address of a range, counted from its network address.
func nthAddr(p netip.Prefix, n int) netip.Addr {
	a := p.Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// thisHost asks the machine for what complete needs.
func thisHost() (host, error) {
	name, err := os.Hostname()
	if err != nil {
		return host{}, fmt.Errorf("host name: %w", err)
	}
	h := host{name: name, hasIPv6: ipv6Enabled()}
	h.addrs, err = nodeAddrs(h.hasIPv6)
	return h, err
}

// ipv6Enabled reports whether new interfaces get IPv6, as sysctl net.ipv6.conf has it.
func ipv6Enabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}
