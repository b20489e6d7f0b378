// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/storage/storagebackend"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
)

// Config is what New needs. Store and PKI must outlive the server.
type Config struct {
	Store *store.Store
	PKI   *pki.Authority

	// BindAddress and Port are where TLS is served. The zero address is every address of both
	// families; the zero port is api.DefaultAPIPort.
	BindAddress net.IP
	Port        int
	// Listener, when set, is served instead of BindAddress and Port.
	Listener net.Listener
	// AdvertiseAddress is the endpoint of the Service "kubernetes" and must be reachable from pods.
	AdvertiseAddress net.IP
	// ExtraSANs are names and addresses for the serving certificate beside those that follow from
	// this Config and the host.
	ExtraSANs []string

	// ServiceCIDRs are one or two ranges, of different families; the first is preferred.
	ServiceCIDRs []netip.Prefix
	// NodePortRange is "first-last", inclusive; empty is 30000-32767.
	NodePortRange string
	// ClusterDomain is the DNS suffix of services; empty is api.DefaultClusterDomain.
	ClusterDomain string

	// CompactionInterval is how often old versions of objects are dropped from the store, and how
	// old they are then at least; 0 is five minutes. A watch or a paged list that is further
	// behind has to start over.
	CompactionInterval time.Duration

	// RequestTimeout bounds a request that is not a watch; 0 is one minute. It also bounds how
	// long the server waits at its end for requests that are still being answered.
	RequestTimeout time.Duration

	// Access says who else may use the API, what is audited and how objects are encrypted; nil is NewAccess.
	Access *Access

	// Clustered says that other servers serve the same store.
	Clustered bool
	// Join, when set, answers api.JoinPath: requests of those whom the role skep:server-join lets in.
	Join http.Handler

	// OnWrite, when set, is called before each request that changes an object, renewals of leases and
	// events apart. It must not block.
	OnWrite func()

	Log *slog.Logger
}

// complete returns c with defaults, or an error that names every field that is wrong.
func (c Config) complete() (Config, error) {
	var errs []error
	if c.Store == nil {
		errs = append(errs, errors.New("Store is missing"))
	}
	if c.PKI == nil {
		errs = append(errs, errors.New("PKI is missing"))
	}
	if c.AdvertiseAddress == nil || c.AdvertiseAddress.IsUnspecified() {
		errs = append(errs, errors.New("AdvertiseAddress is missing: give an address of this host that pods can reach"))
	}
	if n := len(c.ServiceCIDRs); n != 1 && n != 2 {
		errs = append(errs, fmt.Errorf("ServiceCIDRs has %d ranges: give one, or one of each family", n))
	}
	if len(c.ServiceCIDRs) == 2 && c.ServiceCIDRs[0].Addr().Is4() == c.ServiceCIDRs[1].Addr().Is4() {
		errs = append(errs, fmt.Errorf("ServiceCIDRs %s and %s are of one family: give one of each", c.ServiceCIDRs[0], c.ServiceCIDRs[1]))
	}
	if c.NodePortRange != "" {
		if _, err := utilnet.ParsePortRange(c.NodePortRange); err != nil {
			errs = append(errs, fmt.Errorf("NodePortRange: %w", err))
		}
	}
	if len(errs) > 0 {
		return c, fmt.Errorf("apiserver: %w", errors.Join(errs...))
	}
	if c.Access == nil {
		c.Access = NewAccess()
	}
	if err := c.Access.Validate(); err != nil {
		return c, fmt.Errorf("apiserver: %w", err)
	}
	if c.BindAddress == nil {
		c.BindAddress = net.IPv6zero
		if !hasIPv6() {
			c.BindAddress = net.IPv4zero
		}
	}
	if c.Port == 0 {
		c.Port = api.DefaultAPIPort
	}
	if c.NodePortRange == "" {
		c.NodePortRange = "30000-32767"
	}
	if c.ClusterDomain == "" {
		c.ClusterDomain = api.DefaultClusterDomain
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = time.Minute
	}
	if c.CompactionInterval == 0 {
		c.CompactionInterval = storagebackend.DefaultCompactInterval
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// issuer is the "iss" of service-account tokens.
func (c Config) issuer() string { return "https://kubernetes.default.svc." + c.ClusterDomain }

func (c Config) serviceCIDRList() string {
	var s []string
	for _, p := range c.ServiceCIDRs {
		s = append(s, p.Masked().String())
	}
	return strings.Join(s, ",")
}

// servingNames are the names and addresses by which clients call this server: as a Service, by
// the host's name, by what was configured, and by every address that the host has.
func (c Config) servingNames(hostname string, hostAddrs []net.Addr) []string {
	names := []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc." + c.ClusterDomain,
		"localhost", "127.0.0.1", "::1",
		c.AdvertiseAddress.String(),
	}
	if hostname != "" {
		names = append(names, hostname)
	}
	if !c.BindAddress.IsUnspecified() {
		names = append(names, c.BindAddress.String())
	}
	for _, p := range c.ServiceCIDRs {
		names = append(names, p.Masked().Addr().Next().String())
	}
	for _, a := range hostAddrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			names = append(names, n.IP.String())
		}
	}
	names = append(names, c.ExtraSANs...)
	slices.Sort(names)
	return slices.Compact(names)
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
