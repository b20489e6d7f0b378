// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/conntrack"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/network"
	"skep.io/skep/node"
	"skep.io/skep/node/eviction"
	"skep.io/skep/node/hostcheck"
)

// nodeOptions are the flags that `skep server` and `skep agent` share: what is said of one machine.
type nodeOptions struct {
	config            string
	dataDir           string
	nodeName          string
	nodeIPs           []string
	imagesDir         string
	staticPodDir      string
	containerdAddress string
	registryConfigDir string
	upstreamDNS       []string
	unsafeSysctls     []string
	xdp               string
	imageGC           node.ImageGC
	evictionHard      string
	evictionSoft      string
	evictionSoftGrace string
	evictionMaxGrace  int
	evictionPeriod    time.Duration
	kubeReserved      string
	systemReserved    string
	podMaxPids        int64
	shutdown          node.Shutdown
	conntrackMax      uint32
	logLevel          string
	logFormat         string
	logFile           string
	logFileMaxSize    int
}

func (o *nodeOptions) addFlags(f *pflag.FlagSet, configPath string) {
	f.StringVar(&o.config, "config", "", "YAML file whose keys are these flags' names (default "+configPath+", if it exists)")
	f.StringVar(&o.dataDir, "data-dir", api.DefaultDataDir, "Where everything is kept that must survive a reboot")
	f.StringVar(&o.nodeName, "node-name", "", "Name of this node (default: the host's name)")
	f.StringSliceVar(&o.nodeIPs, "node-ip", nil, "Addresses of this node, at most one a family (default: those of the interface with the default route)")
	f.StringVar(&o.imagesDir, "images-dir", "", "Directory of image archives that are imported at start (default: DATA-DIR/images)")
	f.StringVar(&o.staticPodDir, "pod-manifest-path", "", "Directory of manifests of static pods, which this node runs whatever the API says (default: DATA-DIR/pod-manifests)")
	f.StringVar(&o.containerdAddress, "containerd-address", "", "Socket of the host's containerd (default: an own containerd inside this process)")
	f.StringVar(&o.registryConfigDir, "registry-config-dir", api.RegistryConfigDir, "Directory of registries' mirrors and certificates, laid out as containerd's certs.d: REGISTRY/hosts.toml")
	f.StringSliceVar(&o.upstreamDNS, "upstream-dns", nil, "Name servers for names outside the cluster (default: the host's)")
	f.StringVar(&o.xdp, "xdp", string(loader.XDPAuto), "Where NodePorts with backends elsewhere are served before the stack: auto, with --routing=direct, by the driver where it can and else by the kernel; native; generic; off")
	f.StringSliceVar(&o.unsafeSysctls, "allowed-unsafe-sysctls", nil, "Kernel settings beside the safe ones that pods may have; a name may end in an asterisk")
	f.IntVar(&o.imageGC.High, "image-gc-high-threshold", 85, "Percent of the data directory's disk in use at which images that nobody uses are removed; 100: never")
	f.IntVar(&o.imageGC.Low, "image-gc-low-threshold", 80, "Percent at which enough of them are removed")
	f.DurationVar(&o.imageGC.MinAge, "minimum-image-ttl-duration", 2*time.Minute, "How long an image stays after it came, or was used, at least")
	f.StringVar(&o.evictionHard, "eviction-hard", eviction.Defaults, "What must be left of this node's resources, else pods are evicted; empty: they never are")
	f.StringVar(&o.evictionSoft, "eviction-soft", "", "What should be left of this node's resources, else pods are evicted after --eviction-soft-grace-period: memory.available<1Gi")
	f.StringVar(&o.evictionSoftGrace, "eviction-soft-grace-period", "", "How long each soft threshold may be passed: memory.available=1m30s")
	f.IntVar(&o.evictionMaxGrace, "eviction-max-pod-grace-period", 0, "Seconds that a pod has at most to end which is evicted for a soft threshold")
	f.DurationVar(&o.evictionPeriod, "eviction-pressure-transition-period", 5*time.Minute, "How long this node goes on saying that it is short of something after it was")
	f.StringVar(&o.kubeReserved, "kube-reserved", "", "What pods do not get, for skep itself: cpu=100m,memory=500Mi,ephemeral-storage=1Gi,pid=1000, or some of these")
	f.StringVar(&o.systemReserved, "system-reserved", "", "What pods do not get, for the rest of this host, in the same form")
	f.Int64Var(&o.podMaxPids, "pod-max-pids", 0, "How many processes and threads one pod may have (default: a quarter of what all pods may have; -1: no limit of its own)")
	f.DurationVar(&o.shutdown.Grace, "shutdown-grace-period", 30*time.Second, "How long this node's pods have to end before the machine is shut down")
	f.DurationVar(&o.shutdown.Critical, "shutdown-grace-period-critical-pods", 10*time.Second, "How much of that is kept for critical pods, which end last")
	f.Uint32Var(&o.conntrackMax, "conntrack-max", 0, "Connections of each of TCP and UDP that the data plane keeps track of: the one that was used longest ago goes when another comes (default: by memory, 65536 or more)")
	f.StringVar(&o.logLevel, "log-level", "info", "One of debug, info, warn, error")
	f.StringVar(&o.logFormat, "log-format", "text", "One of text, json")
	f.StringVar(&o.logFile, "log-file", "", "File to log to, instead of standard error; it is rotated, and the last three are kept")
	f.IntVar(&o.logFileMaxSize, "log-file-max-size", 50, "Megabytes after which the log file is rotated")
}

// prepare reads the configuration file, makes the log and looks whether this host can run skep. Its
// errors are for main.
func (o *nodeOptions) prepare(cmd *cobra.Command, streams genericiooptions.IOStreams, defaultConfig string) (*slog.Logger, error) {
	if o.config == "" {
		if _, err := os.Stat(defaultConfig); err == nil {
			o.config = defaultConfig
		}
	}
	if o.config != "" {
		if err := loadConfig(o.config, cmd.LocalFlags()); err != nil {
			return nil, fail("%w", err)
		}
	}
	out, err := logOutput(streams.ErrOut, o.logFile, o.logFileMaxSize)
	if err != nil {
		return nil, fail("%w", err)
	}
	log, err := newLogger(out, o.logLevel, o.logFormat)
	if err != nil {
		return nil, fail("%w", err)
	}
	results := hostcheck.Run(hostcheck.This())
	if err := hostcheck.Err(results); err != nil {
		return nil, fail("this host cannot run skep:\n%w\n`skep check` prints the whole list", err)
	}
	for _, r := range results {
		if r.Outcome == hostcheck.Reduced {
			log.Warn("this host lacks something", "what", r.Name, "instead", r.Detail, "remedy", r.Remedy)
		}
	}
	return log, nil
}

// nodeSettings are nodeOptions once they have been checked and completed.
type nodeSettings struct {
	dataDir           string
	nodeName          string
	nodeIPs           []netip.Addr
	imagesDir         string
	staticPodDir      string
	containerdAddress string
	registryConfigDir string
	upstreamDNS       []string
	xdp               loader.XDPMode
	unsafeSysctls     []string
	imageGC           node.ImageGC
	eviction          node.Eviction
	kubeReserved      node.Reserved
	systemReserved    node.Reserved
	podMaxPids        int64
	shutdown          node.Shutdown
	conntrackMax      uint32
}

// clusterSettings are the same on every node: a server is told them, an agent learns them.
type clusterSettings struct {
	clusterCIDRs     []netip.Prefix
	serviceCIDRs     []netip.Prefix
	nodePortRange    utilnet.PortRange
	clusterDomain    string
	clusterDNS       []netip.Addr
	ingressHTTPPort  uint16
	ingressHTTPSPort uint16
	routing          network.Routing
	nodePortMode     loader.NodePortMode
	nodeGrace        time.Duration // how long a node may be silent
}

// host is what complete needs to know of the machine.
type host struct {
	name    string
	addrs   []netip.Addr // at most one a family, IPv4 first
	hasIPv6 bool
	// networks are those that this machine is in, by its devices; skep's own are not among them.
	networks []hostNetwork
}

type hostNetwork struct {
	device string
	prefix netip.Prefix
}

// complete checks what is said of the machine and derives what is not. It tells bad of each mistake.
func (o *nodeOptions) complete(h host, bad func(flag, format string, args ...any)) nodeSettings {
	s := nodeSettings{containerdAddress: o.containerdAddress, registryConfigDir: o.registryConfigDir, upstreamDNS: o.upstreamDNS, unsafeSysctls: o.unsafeSysctls, imageGC: o.imageGC, conntrackMax: o.conntrackMax}
	if g := o.imageGC; g.High < 0 || g.High > 100 || g.Low < 0 || g.Low > g.High {
		bad("image-gc-high-threshold", "%d with --image-gc-low-threshold %d: the high one must be at most 100, and the low one no higher", g.High, g.Low)
	}
	hard, err := eviction.Parse(o.evictionHard)
	if err != nil {
		bad("eviction-hard", "%w", err)
	}
	soft, err := eviction.Parse(o.evictionSoft)
	if err != nil {
		bad("eviction-soft", "%w", err)
	}
	softGrace, err := eviction.ParseGrace(o.evictionSoftGrace, soft)
	if err != nil {
		bad("eviction-soft-grace-period", "%w", err)
	}
	if o.evictionMaxGrace < 0 {
		bad("eviction-max-pod-grace-period", "%d is not a number of seconds", o.evictionMaxGrace)
	}
	s.eviction = node.Eviction{Hard: hard, Soft: soft, SoftGrace: softGrace, MaxPodGrace: time.Duration(o.evictionMaxGrace) * time.Second, Transition: o.evictionPeriod}
	if o.evictionPeriod == 0 {
		s.eviction.Transition = -1 // as was said, and not the default
	}
	if s.kubeReserved, err = node.ParseReserved(o.kubeReserved); err != nil {
		bad("kube-reserved", "%w", err)
	}
	if s.systemReserved, err = node.ParseReserved(o.systemReserved); err != nil {
		bad("system-reserved", "%w", err)
	}
	if s.podMaxPids = o.podMaxPids; o.podMaxPids < -1 {
		bad("pod-max-pids", "%d is neither a number of processes nor -1", o.podMaxPids)
	}
	if s.shutdown = o.shutdown; o.shutdown.Critical < 0 || o.shutdown.Grace < o.shutdown.Critical {
		bad("shutdown-grace-period", "%s with --shutdown-grace-period-critical-pods %s: the part cannot be more than the whole", o.shutdown.Grace, o.shutdown.Critical)
	}
	if n := o.conntrackMax; n != 0 && (n < conntrack.Least || n > conntrack.Most) {
		bad("conntrack-max", "%d is not between %d and %d", n, conntrack.Least, conntrack.Most)
	}
	if s.imageGC.MinAge == 0 {
		s.imageGC.MinAge = -1 // as was said, and not the default
	}
	if s.xdp, err = loader.ParseXDPMode(o.xdp); err != nil {
		bad("xdp", "%w", err)
	}
	if s.dataDir, err = filepath.Abs(o.dataDir); err != nil || o.dataDir == "" {
		bad("data-dir", "%q is not a path", o.dataDir)
	}
	s.imagesDir = o.imagesDir
	if s.imagesDir == "" {
		s.imagesDir = filepath.Join(s.dataDir, "images")
	}
	s.staticPodDir = o.staticPodDir
	if s.staticPodDir == "" {
		s.staticPodDir = filepath.Join(s.dataDir, "pod-manifests")
	} else if !filepath.IsAbs(s.staticPodDir) {
		bad("pod-manifest-path", "%q is not an absolute path", s.staticPodDir)
	}
	s.nodeName = o.nodeName
	if s.nodeName == "" {
		s.nodeName = strings.ToLower(h.name)
	}
	for _, problem := range validation.IsDNS1123Subdomain(s.nodeName) {
		bad("node-name", "%q cannot name a node: %s", s.nodeName, problem)
	}
	s.nodeIPs = h.addrs
	if len(o.nodeIPs) == 0 && len(h.addrs) == 0 {
		bad("node-ip", "this machine has no address but loopback's: give it one, or name the address to use")
	}
	if len(o.nodeIPs) > 0 {
		s.nodeIPs = nil
	}
	for _, text := range o.nodeIPs {
		a, err := netip.ParseAddr(text)
		if err != nil {
			bad("node-ip", "%q is not an IP address", text)
			continue
		}
		s.nodeIPs = append(s.nodeIPs, a.Unmap())
	}
	return s
}

// thisHost asks the machine for what complete needs.
func thisHost() (host, error) {
	name, err := os.Hostname()
	if err != nil {
		return host{}, fmt.Errorf("host name: %w", err)
	}
	h := host{name: name, hasIPv6: ipv6Enabled()}
	if h.addrs, err = nodeAddrs(h.hasIPv6); err != nil {
		return h, err
	}
	h.networks, err = hostNetworks()
	return h, err
}

// hostNetworks are the networks of every device that is not skep's.
func hostNetworks() ([]hostNetwork, error) {
	devices, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("this machine's devices: %w", err)
	}
	var out []hostNetwork
	for _, d := range devices {
		if strings.HasPrefix(d.Name, "skep") || d.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := d.Addrs()
		if err != nil {
			continue // the device has gone
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				out = append(out, hostNetwork{d.Name, p.Masked()})
			}
		}
	}
	return out, nil
}

// conflicts tells of each network of the machine that pods or services would have, too: whoever is in it could not be
// reached any more.
func (c clusterSettings) conflicts(networks []hostNetwork) error {
	var errs []error
	for flag, ranges := range map[string][]netip.Prefix{"cluster-cidr": c.clusterCIDRs, "service-cluster-ip-range": c.serviceCIDRs} {
		for _, r := range ranges {
			for _, n := range networks {
				if r.Overlaps(n.prefix) {
					errs = append(errs, fmt.Errorf("the cluster's --%s %s overlaps the network %s of this machine's %s: give the first server another range, or this machine another network", flag, r, n.prefix, n.device))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// ipv6Enabled reports whether new interfaces get IPv6, as sysctl net.ipv6.conf has it.
func ipv6Enabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}
