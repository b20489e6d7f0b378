// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/pflag"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/validation"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/scheduler"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/network"
)

// serverOptions are the flags of `skep server`; every one is also a key of its YAML file.
type serverOptions struct {
	nodeOptions
	bindAddress      string
	securePort       int
	advertiseAddress string
	tlsSANs          []string
	clusterCIDR      string
	serviceCIDR      string
	nodePortRange    string
	clusterDomain    string
	writeKubeconfig  string
	ingressHTTPPort  int
	ingressHTTPSPort int
	routing          string
	nodeGrace        time.Duration
	nodePortMode     string
	access           *apiserver.Access
	secretsEncrypted bool
	schedulerConfig  string
	snapshots        snapshotOptions
	servers          serversOptions
}

func (o *serverOptions) addFlags(f *pflag.FlagSet) {
	o.nodeOptions.addFlags(f, api.ServerConfigPath)
	o.snapshots.addFlags(f)
	o.servers.addFlags(f)
	o.access = apiserver.NewAccess()
	o.access.AddFlags(f)
	f.BoolVar(&o.secretsEncrypted, "secrets-encryption", false, "Encrypt Secrets in the store, with keys that skep makes and keeps in DATA-DIR/server/tls/encryption.key; `skep secrets rotate` encrypts those that are there, and changes the key")
	f.StringVar(&o.schedulerConfig, "scheduler-config", "", "File with a KubeSchedulerConfiguration: the scheduler's profiles, which scores count how much in each (default: one profile, Kubernetes' weights)")
	f.StringVar(&o.bindAddress, "bind-address", "::", "Address on which the API is served")
	f.IntVar(&o.securePort, "secure-port", api.DefaultAPIPort, "Port on which the API is served")
	f.StringVar(&o.advertiseAddress, "advertise-address", "", "Address under which other machines reach the API (default: the node's first address)")
	f.StringSliceVar(&o.tlsSANs, "tls-san", nil, "Further host names and addresses for the API's certificate")
	f.StringVar(&o.clusterCIDR, "cluster-cidr", api.DefaultClusterCIDR, "Address ranges of pods, at most one a family, separated by a comma")
	f.StringVar(&o.serviceCIDR, "service-cluster-ip-range", api.DefaultServiceCIDR, "Address ranges of services, at most one a family, separated by a comma")
	f.StringVar(&o.nodePortRange, "service-node-port-range", "30000-32767", "Ports that services of type NodePort may get")
	f.StringVar(&o.clusterDomain, "cluster-domain", api.DefaultClusterDomain, "Domain of the cluster's names")
	f.StringVar(&o.writeKubeconfig, "write-kubeconfig", api.KubeconfigPath, "Where the administrator's client configuration is written, mode 0600")
	f.DurationVar(&o.nodeGrace, "node-monitor-grace-period", nodelifecycle.DefaultTiming.Grace, "How long a node may be silent until it counts as dead; nodes give a sign four times as often")
	f.StringVar(&o.nodePortMode, "nodeport-mode", string(loader.SNAT), "Who answers a connection from outside that a node hands on to another: snat, the node that was asked; dsr, the backend's node itself; hybrid, dsr for TCP and snat for UDP")
	f.StringVar(&o.routing, "routing", string(network.VXLAN), "How nodes reach each other's pods: vxlan, on every network; direct, where all nodes are on one link")
	f.IntVar(&o.ingressHTTPPort, "ingress-http-port", 80, "Port of every node on which the ingress answers HTTP")
	f.IntVar(&o.ingressHTTPSPort, "ingress-https-port", 443, "Port of every node on which the ingress answers HTTPS")
}

// serverSettings are the options once they have been checked and completed.
type serverSettings struct {
	nodeSettings
	clusterSettings
	bindAddress      net.IP
	securePort       int
	advertiseAddress net.IP
	tlsSANs          []string
	kubeconfigPath   string
	access           *apiserver.Access
	secretsEncrypted bool
	profiles         scheduler.Profiles
	snapshots        snapshotSettings
	servers          serversSettings
	hasIPv6          bool
	networks         []hostNetwork
}

// complete checks every option and derives what was not given. It reports all mistakes at once.
func (o *serverOptions) complete(h host) (serverSettings, error) {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, fmt.Errorf(format, args...)))
	}
	s := serverSettings{kubeconfigPath: o.writeKubeconfig, tlsSANs: o.tlsSANs, hasIPv6: h.hasIPv6, networks: h.networks, access: o.access, secretsEncrypted: o.secretsEncrypted}
	s.nodeSettings = o.nodeOptions.complete(h, bad)
	s.snapshots = o.snapshots.complete(s.dataDir, bad)
	s.servers = o.servers.complete(bad)
	if err := o.access.Validate(); err != nil {
		errs = append(errs, err)
	}
	if o.secretsEncrypted && o.access.EncryptionConfig != "" {
		bad("secrets-encryption", "give either this, for keys that skep makes, or --encryption-provider-config")
	}
	if o.schedulerConfig != "" {
		var err error
		if s.profiles, err = scheduler.LoadProfiles(o.schedulerConfig); err != nil {
			bad("scheduler-config", "%w", err)
		}
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
	var err error
	if s.clusterSettings, err = o.cluster(h.hasIPv6); err != nil {
		errs = append(errs, err)
	}
	return s, errors.Join(errs...)
}

// cluster checks and completes what is the same on every node. Ranges of a family that this host does not
// have are left out.
func (o *serverOptions) cluster(hasIPv6 bool) (clusterSettings, error) {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--%s: %w", flag, fmt.Errorf(format, args...)))
	}
	s := clusterSettings{clusterDomain: o.clusterDomain}
	for _, problem := range validation.IsDNS1123Subdomain(s.clusterDomain) {
		bad("cluster-domain", "%q: %s", s.clusterDomain, problem)
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

	if s.nodeGrace = o.nodeGrace; s.nodeGrace < minNodeGrace || s.nodeGrace%time.Second != 0 {
		bad("node-monitor-grace-period", "%s is not possible: give whole seconds, at least %s", s.nodeGrace, minNodeGrace)
	}

	var err error
	if s.nodePortMode, err = loader.ParseNodePortMode(o.nodePortMode); err != nil {
		bad("nodeport-mode", "%w", err)
	}
	if s.routing, err = network.ParseRouting(o.routing); err != nil {
		bad("routing", "%w", err)
	}
	if s.clusterCIDRs, err = parseRanges(o.clusterCIDR, hasIPv6, 22, 56); err != nil {
		bad("cluster-cidr", "%w", err)
	}
	if s.serviceCIDRs, err = parseRanges(o.serviceCIDR, hasIPv6, 24, 120); err != nil {
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

// minNodeGrace is how short a node may be silent at least: a server that fails takes longer to be replaced than what is
// shorter, and would take all nodes with it.
const minNodeGrace = 8 * time.Second

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
