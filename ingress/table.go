// SPDX-License-Identifier: Apache-2.0

// Package ingress answers HTTP and HTTPS for the cluster's Ingress objects and forwards each
// request to a ready pod.
package ingress

import (
	"crypto/tls"
	"net/netip"
	"path"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// BackendRef names where a route leads. Service is empty for a backend that is not a Service,
// which skep does not serve.
type BackendRef struct {
	Namespace string
	Service   string
	Port      networkingv1.ServiceBackendPort
}

// Options are what annotations say about the routes of one Ingress.
type Options struct {
	// MaxBody bounds a request's body in bytes: 0 takes the server's default, negative is unbounded.
	MaxBody int64
	// ReadTimeout bounds the wait for a reply's head and then between two reads; 0 takes the
	// server's default.
	ReadTimeout time.Duration
}

// Route is one line of the table. ID is its place in Table.Routes.
type Route struct {
	ID       int
	Ingress  types.NamespacedName
	Host     string // "" for every host, "*.x" for a wildcard
	Path     string
	Exact    bool
	Default  bool // a defaultBackend: matches what no path of the host matches
	Backend  BackendRef
	Redirect bool // to HTTPS, with status 308
	Options  Options
}

// Table is what the proxy reads for each request. It never changes once built.
type Table struct {
	Routes   []*Route
	Problems []Problem

	hosts     map[string]*hostRoutes // exact names
	wildcards map[string]*hostRoutes // keyed by what follows "*."
	any       *hostRoutes            // rules without a host

	certs        map[string]*tls.Certificate
	wildCerts    map[string]*tls.Certificate
	defaultCert  *tls.Certificate
	certificates int
}

// Problem is something in an Ingress that its owner should hear about.
type Problem struct {
	Ingress types.NamespacedName
	Reason  string
	Message string
}

// hostRoutes are the paths of one host.
type hostRoutes struct {
	exact     map[string]*Route
	prefixes  map[string]*Route // keys without trailing slash; "" matches everything
	longest   int               // length of the longest prefix: bounds the work of a lookup
	otherwise *Route
}

// Match finds the route of a request, or nil. host is as canonicalHost returns it and urlPath is
// decoded. The most specific host that has a matching path decides: exact, wildcard, then rules
// without a host; in a host an Exact path, then the longest Prefix, then its default backend.
func (t *Table) Match(host, urlPath string) *Route {
	urlPath = canonicalPath(urlPath)
	if h := t.hosts[host]; h != nil {
		if r := h.match(urlPath); r != nil {
			return r
		}
	}
	if _, parent, ok := strings.Cut(host, "."); ok && len(t.wildcards) > 0 {
		if h := t.wildcards[parent]; h != nil && host[0] != '.' {
			if r := h.match(urlPath); r != nil {
				return r
			}
		}
	}
	if t.any != nil {
		return t.any.match(urlPath)
	}
	return nil
}

func (h *hostRoutes) match(p string) *Route {
	if r := h.exact[p]; r != nil {
		return r
	}
	if len(h.prefixes) > 0 {
		if r := h.longestPrefix(p); r != nil {
			return r
		}
	}
	return h.otherwise
}

// longestPrefix walks from the request's path towards the root, one element a step. Elements
// beyond the longest configured prefix are cut off first, so a hostile path costs no more than a
// long rule.
func (h *hostRoutes) longestPrefix(p string) *Route {
	p = strings.TrimSuffix(p, "/")
	if len(p) > h.longest {
		cut := h.longest
		if p[cut] != '/' {
			cut = max(strings.LastIndexByte(p[:cut], '/'), 0)
		}
		p = p[:cut]
	}
	for {
		if r := h.prefixes[p]; r != nil {
			return r
		}
		i := strings.LastIndexByte(p, '/')
		if i < 0 {
			return nil
		}
		p = p[:i]
	}
}

// canonicalPath resolves what a backend would resolve too (dot segments, doubled slashes), so that
// "/public/../admin" is routed as "/admin". The request is forwarded as it came.
func canonicalPath(p string) string {
	if p == "" || p[0] != '/' {
		return "/" // "*" of OPTIONS, or nothing
	}
	if !strings.Contains(p, "//") && !strings.Contains(p, "/.") {
		return p
	}
	clean := path.Clean(p)
	directory := strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")
	if directory && clean != "/" {
		clean += "/"
	}
	return clean
}

// canonicalHost brings a Host header to the form that table keys have: lower case, no port, no
// trailing dot, no brackets.
func canonicalHost(host string) string {
	if strings.HasPrefix(host, "[") {
		inside, _, ok := strings.Cut(host[1:], "]")
		if !ok {
			return ""
		}
		if a, err := netip.ParseAddr(inside); err == nil {
			return a.String()
		}
		return ""
	}
	if i := strings.IndexByte(host, ':'); i >= 0 {
		host = host[:i]
	}
	host = strings.TrimSuffix(host, ".")
	for i := range len(host) {
		if c := host[i]; 'A' <= c && c <= 'Z' {
			return strings.ToLower(host)
		}
	}
	return host
}

// Certificate finds the certificate for a server name, or nil.
func (t *Table) Certificate(serverName string) *tls.Certificate {
	name := canonicalHost(serverName)
	if c := t.certs[name]; c != nil {
		return c
	}
	if _, parent, ok := strings.Cut(name, "."); ok {
		if c := t.wildCerts[parent]; c != nil {
			return c
		}
	}
	return t.defaultCert
}
