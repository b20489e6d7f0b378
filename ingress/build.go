// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/api"
)

// Annotations that skep reads. Each has skep's own name and the one that users of ingress-nginx
// already have in their manifests; skep's own wins.
const (
	// classAnnotation is how a class was chosen before spec.ingressClassName existed.
	classAnnotation = "kubernetes.io/ingress.class"

	ownPrefix   = "skep.io/"
	nginxPrefix = "nginx.ingress.kubernetes.io/"

	sslRedirect      = "ssl-redirect"
	forceSSLRedirect = "force-ssl-redirect"
	bodySize         = "proxy-body-size"
	readTimeout      = "proxy-read-timeout"
)

// Input is everything a table is made from.
type Input struct {
	Ingresses []*networkingv1.Ingress
	Classes   []*networkingv1.IngressClass
	// Certificates holds what could be loaded from the Secrets that References names.
	Certificates map[types.NamespacedName]*tls.Certificate
}

// Ours returns the Ingresses that this controller serves, oldest first: the order in which
// conflicting claims are decided.
func Ours(ingresses []*networkingv1.Ingress, classes []*networkingv1.IngressClass) []*networkingv1.Ingress {
	ours := map[string]bool{}
	known := map[string]bool{}
	byDefault := false
	for _, c := range classes {
		known[c.Name] = true
		if c.Spec.Controller != api.IngressControllerName {
			continue
		}
		ours[c.Name] = true
		if c.Annotations[networkingv1.AnnotationIsDefaultIngressClass] == "true" {
			byDefault = true
		}
	}
	// Our class works before its object exists.
	if !known[api.IngressClassName] {
		ours[api.IngressClassName] = true
	}
	var out []*networkingv1.Ingress
	for _, ing := range ingresses {
		if ing.DeletionTimestamp != nil && len(ing.Finalizers) == 0 {
			continue
		}
		legacy, hasLegacy := ing.Annotations[classAnnotation]
		mine := byDefault
		switch {
		case ing.Spec.IngressClassName != nil:
			mine = ours[*ing.Spec.IngressClassName]
		case hasLegacy:
			mine = ours[legacy]
		}
		if mine {
			out = append(out, ing)
		}
	}
	slices.SortFunc(out, func(a, b *networkingv1.Ingress) int {
		return cmp.Or(
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Namespace, b.Namespace),
			cmp.Compare(a.Name, b.Name),
		)
	})
	return out
}

// References lists the Secrets that a set of Ingresses takes certificates from.
func References(ours []*networkingv1.Ingress) map[types.NamespacedName]bool {
	refs := map[types.NamespacedName]bool{}
	for _, ing := range ours {
		for _, t := range ing.Spec.TLS {
			if t.SecretName != "" {
				refs[types.NamespacedName{Namespace: ing.Namespace, Name: t.SecretName}] = true
			}
		}
	}
	return refs
}

// Build makes the table that an input describes. It has no side effect and does not keep or change
// the objects it is given.
func Build(in Input) *Table {
	b := builder{
		table: &Table{
			hosts:     map[string]*hostRoutes{},
			wildcards: map[string]*hostRoutes{},
			certs:     map[string]*tls.Certificate{},
			wildCerts: map[string]*tls.Certificate{},
		},
		certificates: in.Certificates,
	}
	ours := Ours(in.Ingresses, in.Classes)
	for _, ing := range ours {
		b.addCertificates(ing)
	}
	for _, ing := range ours {
		b.addRoutes(ing)
	}
	b.table.certificates = len(in.Certificates)
	return b.table
}

type builder struct {
	table        *Table
	certificates map[types.NamespacedName]*tls.Certificate
}

func nameOf(ing *networkingv1.Ingress) types.NamespacedName {
	return types.NamespacedName{Namespace: ing.Namespace, Name: ing.Name}
}

func (b *builder) problem(ing *networkingv1.Ingress, reason, format string, args ...any) {
	b.table.Problems = append(b.table.Problems, Problem{nameOf(ing), reason, fmt.Sprintf(format, args...)})
}

func (b *builder) addCertificates(ing *networkingv1.Ingress) {
	for _, t := range ing.Spec.TLS {
		if t.SecretName == "" {
			continue // the fallback certificate serves it
		}
		cert := b.certificates[types.NamespacedName{Namespace: ing.Namespace, Name: t.SecretName}]
		if cert == nil {
			continue // whoever loads Secrets reports why
		}
		for _, host := range tlsHosts(ing, t) {
			switch parent, wild := strings.CutPrefix(host, "*."); {
			case host == "":
				if b.table.defaultCert == nil {
					b.table.defaultCert = cert
				}
			case wild:
				if b.table.wildCerts[parent] == nil {
					b.table.wildCerts[parent] = cert
				}
			default:
				if b.table.certs[host] == nil {
					b.table.certs[host] = cert
				}
			}
			if host != "" && cert.Leaf != nil && cert.Leaf.VerifyHostname(strings.Replace(host, "*.", "wildcard.", 1)) != nil {
				b.problem(ing, "CertificateMismatch", "certificate in Secret %q is not valid for host %q", t.SecretName, host)
			}
		}
	}
}

// tlsHosts are the hosts a TLS section covers: its own, or those of the Ingress' rules when it
// names none ("" stands for every host).
func tlsHosts(ing *networkingv1.Ingress, t networkingv1.IngressTLS) []string {
	var hosts []string
	for _, h := range t.Hosts {
		hosts = append(hosts, canonicalHost(h))
	}
	if len(t.Hosts) == 0 {
		for _, r := range ing.Spec.Rules {
			hosts = append(hosts, canonicalHost(r.Host))
		}
		if len(ing.Spec.Rules) == 0 {
			hosts = append(hosts, "")
		}
	}
	return hosts
}

// secured tells whether a certificate was loaded for a host of this Ingress. As with
// ingress-nginx, a missing certificate does not send people to a page their browser refuses.
func (b *builder) secured(ing *networkingv1.Ingress, host string) bool {
	for _, t := range ing.Spec.TLS {
		if b.certificates[types.NamespacedName{Namespace: ing.Namespace, Name: t.SecretName}] == nil {
			continue
		}
		for _, covered := range tlsHosts(ing, t) {
			if covered == host || covered == "" {
				return true
			}
			parent, wild := strings.CutPrefix(covered, "*.")
			if _, own, ok := strings.Cut(host, "."); wild && ok && own == parent {
				return true
			}
		}
	}
	return false
}

func (b *builder) addRoutes(ing *networkingv1.Ingress) {
	options := b.options(ing)
	redirect := func(host string) bool {
		if flag(ing, forceSSLRedirect, false) {
			return true
		}
		return flag(ing, sslRedirect, true) && b.secured(ing, host)
	}
	add := func(host, p string, exact, otherwise bool, backend networkingv1.IngressBackend) {
		r := &Route{
			ID: len(b.table.Routes), Ingress: nameOf(ing), Host: host, Path: p, Exact: exact, Default: otherwise,
			Backend: b.backend(ing, backend), Redirect: redirect(host), Options: options,
		}
		if winner := b.host(host).claim(r); winner != nil {
			if winner.Ingress != r.Ingress && !otherwise {
				b.problem(ing, "Conflict", "host %q path %q is already served by the older Ingress %s", host, p, winner.Ingress)
			}
			return
		}
		b.table.Routes = append(b.table.Routes, r)
	}
	hosts := map[string]bool{}
	for _, rule := range ing.Spec.Rules {
		host := canonicalHost(rule.Host)
		hosts[host] = true
		if rule.HTTP == nil {
			continue // all of this host goes to the default backend
		}
		for _, p := range rule.HTTP.Paths {
			exact := p.PathType != nil && *p.PathType == networkingv1.PathTypeExact
			add(host, cmp.Or(p.Path, "/"), exact, false, p.Backend)
		}
	}
	if ing.Spec.DefaultBackend == nil {
		return
	}
	if len(ing.Spec.Rules) == 0 {
		hosts[""] = true
	}
	for _, host := range slices.Sorted(maps.Keys(hosts)) {
		add(host, "/", false, true, *ing.Spec.DefaultBackend)
	}
}

func (b *builder) host(host string) *hostRoutes {
	fresh := func() *hostRoutes {
		return &hostRoutes{exact: map[string]*Route{}, prefixes: map[string]*Route{}}
	}
	if host == "" {
		if b.table.any == nil {
			b.table.any = fresh()
		}
		return b.table.any
	}
	group, key := b.table.hosts, host
	if parent, wild := strings.CutPrefix(host, "*."); wild {
		group, key = b.table.wildcards, parent
	}
	if group[key] == nil {
		group[key] = fresh()
	}
	return group[key]
}

// claim enters a route unless an earlier one has its place; then it returns that one.
func (h *hostRoutes) claim(r *Route) *Route {
	if r.Default {
		if h.otherwise == nil {
			h.otherwise = r
			return nil
		}
		return h.otherwise
	}
	group, key := h.exact, r.Path
	if !r.Exact {
		group, key = h.prefixes, strings.TrimSuffix(r.Path, "/")
	}
	if winner := group[key]; winner != nil {
		return winner
	}
	group[key] = r
	if !r.Exact {
		h.longest = max(h.longest, len(key))
	}
	return nil
}

func (b *builder) backend(ing *networkingv1.Ingress, backend networkingv1.IngressBackend) BackendRef {
	if backend.Service == nil {
		b.problem(ing, "UnsupportedBackend", "a resource backend is not supported: name a Service instead")
		return BackendRef{Namespace: ing.Namespace}
	}
	return BackendRef{Namespace: ing.Namespace, Service: backend.Service.Name, Port: backend.Service.Port}
}

func annotation(ing *networkingv1.Ingress, name string) (string, bool) {
	if v, ok := ing.Annotations[ownPrefix+name]; ok {
		return v, true
	}
	v, ok := ing.Annotations[nginxPrefix+name]
	return v, ok
}

func flag(ing *networkingv1.Ingress, name string, otherwise bool) bool {
	if v, ok := annotation(ing, name); ok {
		if on, err := strconv.ParseBool(v); err == nil {
			return on
		}
	}
	return otherwise
}

func (b *builder) options(ing *networkingv1.Ingress) Options {
	var o Options
	if v, ok := annotation(ing, bodySize); ok {
		n, err := parseSize(v)
		if err != nil {
			b.problem(ing, "InvalidAnnotation", "%s: %v", bodySize, err)
		} else if o.MaxBody = n; n == 0 {
			o.MaxBody = -1 // nginx: 0 switches the check off
		}
	}
	if v, ok := annotation(ing, readTimeout); ok {
		// nginx counts in seconds; a Go duration is understood too.
		if s, err := strconv.ParseUint(v, 10, 31); err == nil && s > 0 {
			o.ReadTimeout = time.Duration(s) * time.Second
		} else if d, err := time.ParseDuration(v); err == nil && d > 0 {
			o.ReadTimeout = d
		} else {
			b.problem(ing, "InvalidAnnotation", "%s: %q is neither seconds nor a duration such as 90s", readTimeout, v)
		}
	}
	return o
}

// parseSize reads nginx's sizes: a number of bytes with an optional k, m or g.
func parseSize(s string) (int64, error) {
	trimmed, shift := s, 0
	if s != "" {
		switch s[len(s)-1] {
		case 'k', 'K':
			shift = 10
		case 'm', 'M':
			shift = 20
		case 'g', 'G':
			shift = 30
		}
		if shift > 0 {
			trimmed = s[:len(s)-1]
		}
	}
	n, err := strconv.ParseInt(trimmed, 10, 63)
	if err != nil || n < 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf("%q is not a size: write bytes, or a number with k, m or g", s)
	}
	return n << shift, nil
}
