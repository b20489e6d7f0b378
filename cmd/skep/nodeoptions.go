// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
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
	"skep.io/skep/dataplane/network"
	"skep.io/skep/node"
	"skep.io/skep/node/hostcheck"
)

// nodeOptions are the flags that `skep server` and `skep agent` share: what is said of one machine.
type nodeOptions struct {
	config            string
	dataDir           string
	nodeName          string
	nodeIPs           []string
	imagesDir         string
	containerdAddress string
	upstreamDNS       []string
	unsafeSysctls     []string
	imageGC           node.ImageGC
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
	f.StringVar(&o.containerdAddress, "containerd-address", "", "Socket of the host's containerd (default: an own containerd inside this process)")
	f.StringSliceVar(&o.upstreamDNS, "upstream-dns", nil, "Name servers for names outside the cluster (default: the host's)")
	f.StringSliceVar(&o.unsafeSysctls, "allowed-unsafe-sysctls", nil, "Kernel settings beside the safe ones that pods may have; a name may end in an asterisk")
	f.IntVar(&o.imageGC.High, "image-gc-high-threshold", 85, "Percent of the data directory's disk in use at which images that nobody uses are removed; 100: never")
	f.IntVar(&o.imageGC.Low, "image-gc-low-threshold", 80, "Percent at which enough of them are removed")
	f.DurationVar(&o.imageGC.MinAge, "minimum-image-ttl-duration", 2*time.Minute, "How long an image stays after it came, or was used, at least")
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
	containerdAddress string
	upstreamDNS       []string
	unsafeSysctls     []string
	imageGC           node.ImageGC
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
}

// host is what complete needs to know of the machine.
type host struct {
	name    string
	addrs   []netip.Addr // at most one a family, IPv4 first
	hasIPv6 bool
}

// complete checks what is said of the machine and derives what is not. It tells bad of each mistake.
func (o *nodeOptions) complete(h host, bad func(flag, format string, args ...any)) nodeSettings {
	s := nodeSettings{containerdAddress: o.containerdAddress, upstreamDNS: o.upstreamDNS, unsafeSysctls: o.unsafeSysctls, imageGC: o.imageGC}
	if g := o.imageGC; g.High < 0 || g.High > 100 || g.Low < 0 || g.Low > g.High {
		bad("image-gc-high-threshold", "%d with --image-gc-low-threshold %d: the high one must be at most 100, and the low one no higher", g.High, g.Low)
	}
	if s.imageGC.MinAge == 0 {
		s.imageGC.MinAge = -1 // as was said, and not the default
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
	h.addrs, err = nodeAddrs(h.hasIPv6)
	return h, err
}

// ipv6Enabled reports whether new interfaces get IPv6, as sysctl net.ipv6.conf has it.
func ipv6Enabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}
