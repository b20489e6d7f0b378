// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// What resolvers take into account (Kubernetes' validation has the same limits).
const (
	maxNameservers   = 3
	maxSearchDomains = 32
	maxSearchLength  = 2048
)

// SystemResolvConf is the host's own configuration of name resolution.
const SystemResolvConf = "/etc/resolv.conf"

// resolvedUpstreams is where systemd-resolved writes the servers behind its local stub.
const resolvedUpstreams = "/run/systemd/resolve/resolv.conf"

// HostResolvConf reads the configuration that pods with dnsPolicy Default inherit: the system's, or
// the servers behind systemd-resolved where the system's only names its stub, which a pod cannot
// reach. A host without any has an empty one.
func HostResolvConf() ([]byte, error) {
	content, err := os.ReadFile(SystemResolvConf)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("reading the host's resolver configuration: %w", err)
	}
	if servers := parseResolvConf(content).servers; len(servers) == 1 && servers[0] == "127.0.0.53" {
		if behind, err := os.ReadFile(resolvedUpstreams); err == nil {
			return behind, nil
		}
	}
	return content, nil
}

// resolvConf is the content of a resolv.conf.
type resolvConf struct {
	servers  []string
	searches []string
	options  []string // "name" or "name:value"
}

// parseResolvConf is as lenient as resolv.conf(5): unknown lines do not matter, the last search or
// domain line counts, a trailing dot means nothing.
func parseResolvConf(content []byte) (c resolvConf) {
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		line := lines.Text()
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			c.servers = append(c.servers, fields[1])
		case "domain":
			c.searches = []string{trimDot(fields[1])}
		case "search":
			c.searches = nil
			for _, domain := range fields[1:] {
				c.searches = append(c.searches, trimDot(domain))
			}
		case "options":
			c.options = mergeOptions(c.options, fields[1:])
		}
	}
	return c
}

// trimDot keeps ".", which means to search in no domain at all.
func trimDot(domain string) string {
	if trimmed := strings.TrimRight(domain, "."); trimmed != "" {
		return trimmed
	}
	return "."
}

// ResolvConf yields the content of a pod's /etc/resolv.conf from its dnsPolicy and dnsConfig.
// clusterDNS are the addresses of the cluster's DNS service and domain is the cluster's domain;
// hostResolvConf is the host's configuration (see HostResolvConf). More servers or search domains
// than resolvers look at are left out, as Kubernetes does.
//
// A pod with its own network cannot reach a server on the host's loopback, so where it would
// inherit one it asks the cluster's DNS instead, which forwards to that server.
func ResolvConf(pod *corev1.Pod, clusterDNS []netip.Addr, domain string, hostResolvConf []byte) ([]byte, error) {
	host := parseResolvConf(hostResolvConf)
	var c resolvConf
	switch policy := pod.Spec.DNSPolicy; {
	case policy == corev1.DNSNone:
	case policy == corev1.DNSClusterFirstWithHostNet, (policy == corev1.DNSClusterFirst || policy == "") && !pod.Spec.HostNetwork:
		if len(clusterDNS) == 0 {
			c = host // there is nothing better
			break
		}
		for _, address := range clusterDNS {
			c.servers = append(c.servers, address.String())
		}
		c.searches = append([]string{pod.Namespace + ".svc." + domain, "svc." + domain, domain}, host.searches...)
		c.options = []string{"ndots:5"}
	case policy == corev1.DNSDefault, policy == corev1.DNSClusterFirst:
		c = host
		if !pod.Spec.HostNetwork && len(clusterDNS) > 0 {
			c.servers = replaceLoopback(c.servers, clusterDNS)
		}
	default:
		return nil, fmt.Errorf("pod %s/%s: unknown dnsPolicy %q: use ClusterFirst, ClusterFirstWithHostNet, Default or None",
			pod.Namespace, pod.Name, policy)
	}
	if extra := pod.Spec.DNSConfig; extra != nil {
		c.servers = append(c.servers, extra.Nameservers...)
		for _, search := range extra.Searches {
			c.searches = append(c.searches, trimDot(search))
		}
		var options []string
		for _, option := range extra.Options {
			if option.Value != nil && *option.Value != "" {
				options = append(options, option.Name+":"+*option.Value)
			} else {
				options = append(options, option.Name)
			}
		}
		c.options = mergeOptions(c.options, options)
	}
	return c.limited().format(), nil
}

func replaceLoopback(servers []string, clusterDNS []netip.Addr) []string {
	var replaced []string
	for _, server := range servers {
		if address, err := netip.ParseAddr(server); err != nil || !address.IsLoopback() {
			replaced = append(replaced, server)
			continue
		}
		for _, address := range clusterDNS {
			replaced = append(replaced, address.String())
		}
	}
	return replaced
}

// mergeOptions lets a later option replace an earlier one of the same name, in its place.
func mergeOptions(options, more []string) []string {
	merged := slices.Clone(options)
	for _, option := range more {
		name, _, _ := strings.Cut(option, ":")
		at := slices.IndexFunc(merged, func(other string) bool {
			otherName, _, _ := strings.Cut(other, ":")
			return otherName == name
		})
		if at < 0 {
			merged = append(merged, option)
		} else {
			merged[at] = option
		}
	}
	return merged
}

func (c resolvConf) limited() resolvConf {
	c.servers = unique(c.servers)
	c.servers = c.servers[:min(len(c.servers), maxNameservers)]
	c.searches = unique(c.searches)
	c.searches = c.searches[:min(len(c.searches), maxSearchDomains)]
	length := -1 // there is one space less than there are domains
	for i, search := range c.searches {
		if length += 1 + len(search); length > maxSearchLength {
			c.searches = c.searches[:i]
			break
		}
	}
	return c
}

func unique(list []string) []string {
	var kept []string
	for _, item := range list {
		if !slices.Contains(kept, item) {
			kept = append(kept, item)
		}
	}
	return kept
}

func (c resolvConf) format() []byte {
	var b bytes.Buffer
	if len(c.searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.searches, " "))
	}
	for _, server := range c.servers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(c.options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(c.options, " "))
	}
	return b.Bytes()
}
