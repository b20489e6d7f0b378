// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

func namespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// clusterIP makes a Service with addresses and ports given as name/protocol.
func clusterIP(name string, ips []string, ports ...corev1.ServicePort) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: ips[0], ClusterIPs: ips, Ports: ports},
	}
}

func headless(name string) *corev1.Service { return clusterIP(name, []string{corev1.ClusterIPNone}) }

func slice(service, name string, ports []discoveryv1.EndpointPort, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: endpoints, Ports: ports,
	}
	if len(endpoints) > 0 && strings.Contains(endpoints[0].Addresses[0], ":") {
		s.AddressType = discoveryv1.AddressTypeIPv6
	}
	return s
}

func endpointAt(address, hostname string, ready bool) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
	if hostname != "" {
		e.Hostname = &hostname
	}
	return e
}

func servicePort(name string, protocol corev1.Protocol, number int32) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Protocol: protocol, Port: number}
}

func endpointPort(name string, protocol corev1.Protocol, number int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number}
}

// upstream is a DNS server that a test controls.
type upstream struct {
	address string
	asked   atomic.Int32
}

func startUpstream(t testing.TB, answer func(w dns.ResponseWriter, m *dns.Msg)) *upstream {
	t.Helper()
	var both sockets // any free port may be free for UDP only
	for err := both.add(t.Context(), netip.MustParseAddrPort("127.0.0.1:0")); len(both.addresses) == 0; err = both.add(t.Context(), netip.MustParseAddrPort("127.0.0.1:0")) {
		if !errors.Is(err, unix.EADDRINUSE) && err != nil {
			t.Fatal(err)
		}
	}
	packets, listener := both.packets[0], both.listeners[0]
	u := &upstream{address: packets.LocalAddr().String()}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		u.asked.Add(1)
		answer(w, m)
	})
	var serving sync.WaitGroup
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		serving.Go(func() { _ = s.ActivateAndServe() })
		<-started
		defer t.Cleanup(func() { _ = s.Shutdown() })
	}
	t.Cleanup(serving.Wait) // runs after both have been told to end
	return u
}

// addressOf answers every question for an address with the given one.
func addressOf(text string) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, m *dns.Msg) {
		reply := new(dns.Msg).SetReply(m)
		if m.Question[0].Qtype == dns.TypeA {
			reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(text)}}
		} else {
			reply.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 60}, Ns: ".", Mbox: ".", Minttl: 30}}
		}
		_ = w.WriteMsg(reply)
	}
}

type testServer struct {
	t       testing.TB
	address string
	client  *fake.Clientset
	metrics *prometheus.Registry
}

// startServer runs the whole thing on a port of the loopback and waits until it knows the objects.
func startServer(t testing.TB, change func(*Config), objects ...runtime.Object) *testServer {
	t.Helper()
	before := goleak.IgnoreCurrent()
	client := fake.NewClientset(objects...)
	factory := informers.NewSharedInformerFactory(client, 0)
	ctx, cancel := context.WithCancel(context.Background())
	listening := make(chan []netip.AddrPort, 1)
	s := &testServer{t: t, client: client, metrics: prometheus.NewRegistry()}
	cfg := Config{
		Addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Port: -1, Domain: "cluster.local",
		Informers: factory, NodeName: "n", Log: slog.New(slog.DiscardHandler), Metrics: s.metrics,
		Prefixes:       []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd73:6b65::/32")},
		ResolvConfPath: t.TempDir() + "/resolv.conf",
		Listening:      func(addresses []netip.AddrPort) { listening <- addresses },
	}
	if change != nil {
		change(&cfg)
	}
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		factory.Shutdown()
		goleak.VerifyNone(t, before)
	})
	select {
	case addresses := <-listening:
		s.address = addresses[0].String()
	case err := <-done:
		done <- err
		t.Fatalf("Run: %v", err)
	}
	s.eventually("the lists are there", func() bool { return s.ask("nothing.cluster.local.", dns.TypeA).Rcode == dns.RcodeNameError })
	return s
}

func (s *testServer) eventually(what string, condition func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			s.t.Fatalf("did not happen: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func (s *testServer) ask(name string, qtype uint16) *dns.Msg {
	s.t.Helper()
	return s.exchange(new(dns.Msg).SetQuestion(name, qtype), "udp")
}

func (s *testServer) exchange(m *dns.Msg, network string) *dns.Msg {
	s.t.Helper()
	reply, _, err := (&dns.Client{Net: network, Timeout: 20 * time.Second, UDPSize: 4096}).Exchange(m, s.address)
	if err != nil {
		s.t.Fatalf("%s: %v", m.Question[0].Name, err)
	}
	return reply
}

// values are the records' contents without their headers, sorted.
func values(records []dns.RR) []string {
	var all []string
	for _, r := range records {
		if r.Header().Rrtype != dns.TypeOPT {
			all = append(all, strings.TrimPrefix(r.String(), r.Header().String()))
		}
	}
	slices.Sort(all)
	return all
}
