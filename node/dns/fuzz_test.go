// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// testHandler knows two services and no upstream.
func testHandler() (*handler, *table) {
	t := &table{}
	t.namespaces.Store("default", struct{}{})
	port := endpointPort("http", "TCP", 8080)
	for _, s := range []*service{
		newService(clusterIP("web", []string{"10.43.0.20"}, servicePort("http", "TCP", 80)), nil),
		newService(headless("db"), []*discoveryv1.EndpointSlice{slice("db", "s", []discoveryv1.EndpointPort{port}, endpointAt("10.42.0.5", "db-0", true))}),
		newService(&corev1.Service{Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}}, nil),
	} {
		if s.key.Name == "" {
			s.key = types.NamespacedName{Namespace: "default", Name: "away"}
		}
		t.set(s.key, s)
	}
	m := newMetrics()
	h := &handler{
		zone: &zone{domain: "cluster.local.", table: t}, forward: newForwarder(func() []string { return nil }, m),
		prefixes: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ready: &atomic.Bool{}, metrics: m,
	}
	t.set(types.NamespacedName{Namespace: "default", Name: "web"}, nil)
	h.ready.Store(true)
	return h, t
}

// FuzzHandler feeds raw bytes, as they come from the network, through the same steps as the server.
func FuzzHandler(f *testing.F) {
	for _, name := range []string{"web.default.svc.cluster.local.", "_http._tcp.db.default.svc.cluster.local.", "10-42-0-5.default.pod.cluster.local.",
		"5.0.42.10.in-addr.arpa.", "away.default.svc.cluster.local.", "example.com.", "cluster.local.", "."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeANY} {
			m := new(dns.Msg).SetQuestion(name, qtype)
			m.SetEdns0(1232, true)
			packed, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(packed)
		}
	}
	h, _ := testHandler()
	f.Fuzz(func(t *testing.T, raw []byte) {
		request := new(dns.Msg)
		if request.Unpack(raw) != nil || request.Response {
			return // the server answers FORMERR, or not at all, before we see it
		}
		reply, _ := h.answer(t.Context(), request)
		reply.Truncate(dns.MinMsgSize)
		packed, err := reply.Pack()
		if err != nil {
			t.Fatalf("the reply to %v cannot be packed: %v\n%v", request, err, reply)
		}
		if len(packed) > dns.MinMsgSize && len(request.Question) == 1 {
			t.Fatalf("the reply has %d bytes", len(packed))
		}
		if reply.Id != request.Id || !reply.Response {
			t.Fatalf("the reply is not one: %v", reply)
		}
	})
}

// FuzzReverse: whatever reads as an address is written back as the same name.
func FuzzReverse(f *testing.F) {
	for _, name := range []string{"5.0.42.10.in-addr.arpa.", "5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.4.0.7.5.6.b.6.3.7.d.f.ip6.arpa.", "x.ip6.arpa."} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		address, ok := reverseAddress(name)
		if !ok {
			return
		}
		back, err := dns.ReverseAddr(address.String())
		if err != nil || (address.Is4() && back != name) {
			t.Fatalf("%q is read as %v, which is %q, %v", name, address, back, err)
		}
	})
}
