// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// table is what questions about the cluster are answered from. It has one writer (watch.go) that
// replaces one immutable service at a time; readers take no lock.
type table struct {
	services   sync.Map // types.NamespacedName -> *service
	namespaces sync.Map // string -> struct{}
	reverse    sync.Map // netip.Addr -> []owner
}

// owner is a name that an address belongs to. Several services may select one pod.
type owner struct {
	of   types.NamespacedName
	name string // relative to the cluster's domain: "web.default.svc"
}

// service is one Service with its endpoints as DNS shows them. It never changes.
type service struct {
	key      types.NamespacedName
	external string // the target of an ExternalName service, fully qualified
	headless bool
	v4, v6   []netip.Addr // what the service's name resolves to
	ports    []port       // of a service with an address of its own
	// endpoints are those with a name of their own: all that are ready.
	endpoints []endpoint
}

// port is a port of a Service.
type port struct {
	name     string
	protocol string // lower case
	number   uint16
}

// endpoint is one address behind a service.
type endpoint struct {
	hostname string // its label below the service's name
	address  netip.Addr
	ports    []port
}

// newService computes what DNS shows of a Service, or nil when that is nothing.
func newService(object *corev1.Service, slicesOf []*discoveryv1.EndpointSlice) *service {
	s := &service{key: types.NamespacedName{Namespace: object.Namespace, Name: object.Name}}
	if object.Spec.Type == corev1.ServiceTypeExternalName {
		s.external = strings.ToLower(strings.TrimSuffix(object.Spec.ExternalName, ".")) + "."
		return s
	}
	s.headless = object.Spec.ClusterIP == corev1.ClusterIPNone
	s.endpoints = endpointsOf(slicesOf, object.Spec.PublishNotReadyAddresses)
	var addresses []netip.Addr
	if s.headless {
		for _, e := range s.endpoints {
			addresses = append(addresses, e.address)
		}
	} else {
		for _, text := range object.Spec.ClusterIPs {
			if address, err := netip.ParseAddr(text); err == nil {
				addresses = append(addresses, address)
			}
		}
		for _, p := range object.Spec.Ports {
			s.ports = append(s.ports, port{name: strings.ToLower(p.Name), protocol: protocolLabel(p.Protocol), number: uint16(p.Port)})
		}
	}
	seen := make(map[netip.Addr]bool, len(addresses))
	for _, address := range addresses {
		switch {
		case seen[address]:
		case address.Is4():
			s.v4 = append(s.v4, address)
		default:
			s.v6 = append(s.v6, address)
		}
		seen[address] = true
	}
	// A Service waits for its address, and a headless one without endpoints has no name (Kubernetes
	// DNS specification 1.1.0, 2.4.1).
	if len(s.v4)+len(s.v6) == 0 {
		return nil
	}
	return s
}

func endpointsOf(slicesOf []*discoveryv1.EndpointSlice, notReadyToo bool) []endpoint {
	var all []endpoint
	for _, slice := range slicesOf {
		if slice.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		var ports []port
		for _, p := range slice.Ports {
			if p.Port == nil {
				continue
			}
			converted := port{number: uint16(*p.Port), protocol: "tcp"}
			if p.Name != nil {
				converted.name = strings.ToLower(*p.Name)
			}
			if p.Protocol != nil {
				converted.protocol = protocolLabel(*p.Protocol)
			}
			ports = append(ports, converted)
		}
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if ready := e.Conditions.Ready; ready != nil && !*ready && !notReadyToo {
				continue
			}
			for _, text := range e.Addresses {
				address, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				hostname := dashed(address)
				if e.Hostname != nil && *e.Hostname != "" {
					hostname = strings.ToLower(*e.Hostname)
				}
				all = append(all, endpoint{hostname: hostname, address: address, ports: ports})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b endpoint) int {
		return cmp.Or(cmp.Compare(a.hostname, b.hostname), a.address.Compare(b.address))
	})
	return mergeSame(all)
}

// mergeSame joins what several slices say about one address, as during a slice's replacement or
// when a service's ports differ between endpoints.
func mergeSame(sorted []endpoint) []endpoint {
	var merged []endpoint
	for _, e := range sorted {
		if n := len(merged); n > 0 && merged[n-1].hostname == e.hostname && merged[n-1].address == e.address {
			last := &merged[n-1]
			last.ports = slices.Clone(last.ports)
			for _, p := range e.ports {
				if !slices.Contains(last.ports, p) {
					last.ports = append(last.ports, p)
				}
			}
			continue
		}
		merged = append(merged, e)
	}
	return merged
}

func protocolLabel(p corev1.Protocol) string {
	if p == "" {
		return "tcp"
	}
	return strings.ToLower(string(p))
}

// dashed is the label of an address: 10-42-0-5, or fd73-6b65--5.
func dashed(address netip.Addr) string {
	text := strings.NewReplacer(".", "-", ":", "-").Replace(address.String())
	// A label neither starts nor ends with a dash.
	if strings.HasPrefix(text, "-") {
		text = "0" + text
	}
	if strings.HasSuffix(text, "-") {
		text += "0"
	}
	return text
}

// undashed is dashed's inverse.
func undashed(label string) (netip.Addr, bool) {
	if strings.Count(label, "-") == 3 && !strings.Contains(label, "--") {
		if address, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ".")); err == nil {
			return address, true
		}
	}
	address, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	return address, err == nil && address.Is6() && !address.Is4In6()
}

func (s *service) name() string { return s.key.Name + "." + s.key.Namespace + ".svc" }

// owners lists the reverse records of a service: its own addresses, or those of its endpoints when
// it has none.
func (s *service) owners() map[netip.Addr]owner {
	all := map[netip.Addr]owner{}
	switch {
	case s == nil || s.external != "":
	case s.headless:
		for _, e := range s.endpoints {
			all[e.address] = owner{s.key, e.hostname + "." + s.name()}
		}
	default:
		for _, address := range slices.Concat(s.v4, s.v6) {
			all[address] = owner{s.key, s.name()}
		}
	}
	return all
}

func (t *table) service(key types.NamespacedName) *service {
	if s, ok := t.services.Load(key); ok {
		return s.(*service)
	}
	return nil
}

func (t *table) hasNamespace(name string) bool {
	_, ok := t.namespaces.Load(name)
	return ok
}

func (t *table) ownersOf(address netip.Addr) []owner {
	if owners, ok := t.reverse.Load(address); ok {
		return owners.([]owner)
	}
	return nil
}

// set replaces one service; nil removes it. Only the writer calls it.
func (t *table) set(key types.NamespacedName, s *service) {
	before := t.service(key).owners()
	after := s.owners()
	if s == nil {
		t.services.Delete(key)
	} else {
		t.services.Store(key, s)
	}
	for address := range before {
		if _, stays := after[address]; !stays {
			t.setOwner(address, key, nil)
		}
	}
	for address, o := range after {
		if before[address] != o {
			t.setOwner(address, key, &o)
		}
	}
}

func (t *table) setOwner(address netip.Addr, key types.NamespacedName, o *owner) {
	var owners []owner
	for _, other := range t.ownersOf(address) {
		if other.of != key {
			owners = append(owners, other)
		}
	}
	if o != nil {
		owners = append(owners, *o)
	}
	if len(owners) == 0 {
		t.reverse.Delete(address)
		return
	}
	slices.SortFunc(owners, func(a, b owner) int { return cmp.Compare(a.name, b.name) })
	t.reverse.Store(address, owners)
}
