// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

func testObjects() []runtime.Object {
	web := []discoveryv1.EndpointPort{endpointPort("http", "TCP", 8080), endpointPort("dns", "UDP", 5353)}
	external := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "away"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "Example.COM"}}
	inside := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "inside"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "web.default.svc.cluster.local"}}
	circle := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "circle"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "circle.default.svc.cluster.local"}}
	early := headless("early")
	early.Spec.PublishNotReadyAddresses = true
	return []runtime.Object{
		namespace("default"), namespace("empty"), external, inside, circle, early,
		clusterIP("web", []string{"10.43.0.20", "fd73:6b65:7043::20"}, servicePort("http", "TCP", 80), servicePort("", "TCP", 81)),
		clusterIP("four", []string{"10.43.0.4"}, servicePort("udp", "UDP", 9)),
		clusterIP("pending", []string{""}),
		headless("db"), headless("none"),
		slice("web", "web-1", web, endpointAt("10.42.0.9", "", true)),
		slice("db", "db-4", web, endpointAt("10.42.0.5", "db-0", true), endpointAt("10.42.0.6", "", true), endpointAt("10.42.0.7", "db-2", false)),
		slice("db", "db-6", web, endpointAt("fd73:6b65:7042::5", "db-0", true)),
		slice("none", "none-1", web, endpointAt("10.42.0.8", "", false)),
		slice("early", "early-1", web, endpointAt("10.42.0.10", "e-0", false)),
	}
}

func TestClusterAnswers(t *testing.T) {
	outside := startUpstream(t, addressOf("192.0.2.1"))
	s := startServer(t, func(c *Config) { c.Upstreams = []string{outside.address} }, testObjects()...)
	const nodata, nxdomain = "nodata", "nxdomain"
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // records joined by "; ", or one of the above
		extra string
	}{
		{"web.default.svc", dns.TypeA, "10.43.0.20", ""},
		{"WEB.Default.SVC", dns.TypeA, "10.43.0.20", ""},
		{"web.default.svc", dns.TypeAAAA, "fd73:6b65:7043::20", ""},
		{"web.default.svc", dns.TypeMX, nodata, ""},
		{"four.default.svc", dns.TypeAAAA, nodata, ""},
		{"pending.default.svc", dns.TypeA, nxdomain, ""},
		{"missing.default.svc", dns.TypeA, nxdomain, ""},
		{"web.missing.svc", dns.TypeA, nxdomain, ""},
		{"", dns.TypeA, nodata, ""},
		{"", dns.TypeSOA, "ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5", ""},
		{"", dns.TypeNS, "ns.dns.cluster.local.", ""},
		{"svc", dns.TypeA, nodata, ""},
		{"default.svc", dns.TypeA, nodata, ""},
		{"empty.svc", dns.TypeA, nodata, ""},
		{"missing.svc", dns.TypeA, nxdomain, ""},
		{"else", dns.TypeA, nxdomain, ""},
		{"dns-version", dns.TypeTXT, `"1.1.0"`, ""},
		{"dns-version", dns.TypeA, nodata, ""},

		{"_http._tcp.web.default.svc", dns.TypeSRV, "0 100 80 web.default.svc.cluster.local.", "10.43.0.20; fd73:6b65:7043::20"},
		{"_http._tcp.web.default.svc", dns.TypeA, nodata, ""},
		{"_http._udp.web.default.svc", dns.TypeSRV, nxdomain, ""},
		{"_nope._tcp.web.default.svc", dns.TypeSRV, nxdomain, ""},
		{"_tcp.web.default.svc", dns.TypeSRV, nodata, ""},
		{"_udp.web.default.svc", dns.TypeSRV, nxdomain, ""},
		{"_._tcp.web.default.svc", dns.TypeSRV, nxdomain, ""},
		{"web.default.svc", dns.TypeSRV, "0 100 80 web.default.svc.cluster.local.; 0 100 81 web.default.svc.cluster.local.", "10.43.0.20; fd73:6b65:7043::20"},

		{"db.default.svc", dns.TypeA, "10.42.0.5; 10.42.0.6", ""},
		{"db.default.svc", dns.TypeAAAA, "fd73:6b65:7042::5", ""},
		{"db-0.db.default.svc", dns.TypeA, "10.42.0.5", ""},
		{"db-0.db.default.svc", dns.TypeAAAA, "fd73:6b65:7042::5", ""},
		{"10-42-0-6.db.default.svc", dns.TypeA, "10.42.0.6", ""},
		{"10-42-0-6.db.default.svc", dns.TypeAAAA, nodata, ""},
		{"db-2.db.default.svc", dns.TypeA, nxdomain, ""}, // not ready
		{"_http._tcp.db.default.svc", dns.TypeSRV, "0 100 8080 10-42-0-6.db.default.svc.cluster.local.; 0 100 8080 db-0.db.default.svc.cluster.local.",
			"10.42.0.5; 10.42.0.6; fd73:6b65:7042::5"},
		{"_dns._udp.db.default.svc", dns.TypeSRV, "0 100 5353 10-42-0-6.db.default.svc.cluster.local.; 0 100 5353 db-0.db.default.svc.cluster.local.",
			"10.42.0.5; 10.42.0.6; fd73:6b65:7042::5"},
		{"none.default.svc", dns.TypeA, nxdomain, ""},
		{"early.default.svc", dns.TypeA, "10.42.0.10", ""},

		{"10-42-0-5.default.pod", dns.TypeA, "10.42.0.5", ""},
		{"10-42-0-5.default.pod", dns.TypeAAAA, nodata, ""},
		{"fd73-6b65-7042--5.default.pod", dns.TypeAAAA, "fd73:6b65:7042::5", ""},
		{"10-42-0-5.missing.pod", dns.TypeA, nxdomain, ""},
		{"10-42-0-500.default.pod", dns.TypeA, nxdomain, ""},
		{"web.default.pod", dns.TypeA, nxdomain, ""},
		{"default.pod", dns.TypeA, nodata, ""},
		{"pod", dns.TypeA, nodata, ""},

		{"away.default.svc", dns.TypeA, "192.0.2.1; example.com.", ""},
		{"away.default.svc", dns.TypeCNAME, "example.com.", ""},
		{"inside.default.svc", dns.TypeA, "10.43.0.20; web.default.svc.cluster.local.", ""},
		// What ndots:5 makes of a name outside.
		{"www.example.com.default.svc", dns.TypeA, nxdomain, ""},
	} {
		full := c.name + ".cluster.local."
		if c.name == "" {
			full = "cluster.local."
		}
		t.Run(dns.TypeToString[c.qtype]+" "+c.name, func(t *testing.T) {
			reply := s.ask(full, c.qtype)
			got := strings.Join(values(reply.Answer), "; ")
			switch {
			case reply.Rcode == dns.RcodeNameError:
				got = nxdomain
			case reply.Rcode != dns.RcodeSuccess:
				got = dns.RcodeToString[reply.Rcode]
			case len(reply.Answer) == 0:
				got = nodata
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if extra := strings.Join(values(reply.Extra), "; "); extra != c.extra {
				t.Errorf("additional %q, want %q", extra, c.extra)
			}
			if !reply.Authoritative || !reply.RecursionAvailable {
				t.Error("AA or RA is missing")
			}
			if negative := got == nodata || got == nxdomain; negative {
				if len(reply.Ns) != 1 || reply.Ns[0].Header().Name != "cluster.local." || reply.Ns[0].(*dns.SOA).Minttl != ttl {
					t.Errorf("a negative answer needs the zone's SOA, got %v", reply.Ns)
				}
			}
			for _, r := range reply.Answer {
				if r.Header().Rrtype == c.qtype && c.name != "inside.default.svc" && c.name != "away.default.svc" && r.Header().Name != full {
					t.Errorf("asked for %q, answered for %q", full, r.Header().Name)
				}
			}
		})
	}
	if reply := s.ask("circle.default.svc.cluster.local.", dns.TypeA); reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("an alias to itself: %v", reply)
	}
}

func TestReverse(t *testing.T) {
	outside := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		reply := new(dns.Msg).SetReply(m)
		reply.Answer = []dns.RR{&dns.PTR{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: 9}, Ptr: "outside.example."}}
		_ = w.WriteMsg(reply)
	})
	s := startServer(t, func(c *Config) { c.Upstreams = []string{outside.address} }, testObjects()...)
	for address, want := range map[string]string{
		"10.43.0.20":         "web.default.svc.cluster.local.",
		"fd73:6b65:7043::20": "web.default.svc.cluster.local.",
		"10.42.0.5":          "db-0.db.default.svc.cluster.local.",
		"fd73:6b65:7042::5":  "db-0.db.default.svc.cluster.local.",
		"10.42.0.6":          "10-42-0-6.db.default.svc.cluster.local.",
		"10.42.0.9":          "", // only behind a service with an address of its own
		"10.42.9.9":          "",
		"192.0.2.77":         "outside.example.",
	} {
		name, err := dns.ReverseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		reply := s.ask(name, dns.TypePTR)
		if want == "" {
			if reply.Rcode != dns.RcodeNameError || len(reply.Ns) != 1 {
				t.Errorf("%s: want NXDOMAIN with SOA, got %v", address, reply)
			}
			continue
		}
		if got := values(reply.Answer); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: got %v, want %s", address, got, want)
		}
	}
}

func TestFollowsTheCluster(t *testing.T) {
	s := startServer(t, nil, testObjects()...)
	ctx := t.Context()
	svc := clusterIP("new", []string{"10.43.0.99"})
	if _, err := s.client.CoreV1().Services("default").Create(ctx, svc, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.eventually("a new service resolves", func() bool {
		return slices.Equal(values(s.ask("new.default.svc.cluster.local.", dns.TypeA).Answer), []string{"10.43.0.99"})
	})
	if err := s.client.CoreV1().Services("default").Delete(ctx, "new", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.eventually("a deleted service does not", func() bool {
		reverse := s.ask("99.0.43.10.in-addr.arpa.", dns.TypePTR)
		return s.ask("new.default.svc.cluster.local.", dns.TypeA).Rcode == dns.RcodeNameError && reverse.Rcode == dns.RcodeNameError
	})
	// An endpoint moves from one service to another.
	moved := slice("none", "db-4", nil, endpointAt("10.42.0.5", "db-0", true))
	if _, err := s.client.DiscoveryV1().EndpointSlices("default").Update(ctx, moved, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.eventually("the endpoint is with its new service only", func() bool {
		return slices.Equal(values(s.ask("none.default.svc.cluster.local.", dns.TypeA).Answer), []string{"10.42.0.5"}) &&
			len(s.ask("db.default.svc.cluster.local.", dns.TypeA).Answer) == 0 &&
			slices.Equal(values(s.ask("5.0.42.10.in-addr.arpa.", dns.TypePTR).Answer), []string{"db-0.none.default.svc.cluster.local."})
	})
}

func TestSizes(t *testing.T) {
	big := headless("big")
	var endpoints []discoveryv1.Endpoint
	for i := range 100 {
		endpoints = append(endpoints, endpointAt(netip.AddrFrom4([4]byte{10, 42, 1, byte(i + 1)}).String(), "", true))
	}
	s := startServer(t, nil, namespace("default"), big, slice("big", "big-1", nil, endpoints...))
	plain := func() *dns.Msg { return new(dns.Msg).SetQuestion("big.default.svc.cluster.local.", dns.TypeA) }
	for _, c := range []struct {
		name    string
		network string
		edns    uint16
		largest int
		whole   bool
	}{
		{"udp without EDNS", "udp", 0, 512, false},
		{"udp with 1232", "udp", 1232, 1232, false},
		{"udp with 65535", "udp", 65535, 1232, false},
		{"tcp", "tcp", 0, 65535, true},
	} {
		m := plain()
		if c.edns > 0 {
			m.SetEdns0(c.edns, false)
		}
		reply := s.exchange(m, c.network)
		if reply.Truncated == c.whole || (len(reply.Answer) == 100) != c.whole {
			t.Errorf("%s: %d answers, truncated %v", c.name, len(reply.Answer), reply.Truncated)
		}
		reply.Compress = true // as it came
		if packed, err := reply.Pack(); err != nil || len(packed) > c.largest {
			t.Errorf("%s: %d bytes, %v", c.name, len(packed), err)
		}
		if opt := reply.IsEdns0(); (opt != nil) != (c.edns > 0) {
			t.Errorf("%s: OPT is %v", c.name, opt)
		}
	}
	m := plain()
	m.SetEdns0(1232, false)
	m.IsEdns0().SetVersion(1)
	if reply := s.exchange(m, "udp"); reply.Rcode != dns.RcodeBadVers {
		t.Errorf("EDNS version 1: %v", reply)
	}
}

func TestRefusals(t *testing.T) {
	s := startServer(t, nil)
	chaos := new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	notify := new(dns.Msg).SetNotify("cluster.local.")
	for what, c := range map[string]struct {
		m    *dns.Msg
		want int
	}{
		"another class": {chaos, dns.RcodeRefused},
		"zone transfer": {new(dns.Msg).SetQuestion("cluster.local.", dns.TypeIXFR), dns.RcodeRefused},
		"notify":        {notify, dns.RcodeNotImplemented},
		"no upstream":   {new(dns.Msg).SetQuestion("example.com.", dns.TypeA), dns.RcodeServerFailure},
		"any":           {new(dns.Msg).SetQuestion("cluster.local.", dns.TypeANY), dns.RcodeSuccess},
	} {
		if reply := s.exchange(c.m, "udp"); reply.Rcode != c.want {
			t.Errorf("%s: got %s", what, dns.RcodeToString[reply.Rcode])
		}
	}
}

func TestForwarding(t *testing.T) {
	good := startUpstream(t, addressOf("192.0.2.1"))
	broken := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		_ = w.WriteMsg(new(dns.Msg).SetRcode(m, dns.RcodeServerFailure))
	})
	s := startServer(t, func(c *Config) { c.Upstreams = []string{broken.address, good.address} })
	for _, name := range []string{"www.example.com.", "WWW.example.com."} {
		reply := s.ask(name, dns.TypeA)
		if got := values(reply.Answer); !slices.Equal(got, []string{"192.0.2.1"}) || reply.Answer[0].Header().Name != name || reply.Authoritative {
			t.Errorf("%s: %v", name, reply)
		}
	}
	if asked := good.asked.Load(); asked != 1 {
		t.Errorf("the server was asked %d times: the answer was not kept", asked)
	}
	for range 2 {
		if reply := s.ask("www.example.com.", dns.TypeAAAA); reply.Rcode != dns.RcodeSuccess || len(reply.Answer) != 0 {
			t.Errorf("negative: %v", reply)
		}
	}
	if asked := good.asked.Load(); asked != 2 {
		t.Errorf("the server was asked %d times: the negative answer was not kept", asked)
	}
	if asked := broken.asked.Load(); asked != 1 {
		t.Errorf("the broken server was asked %d times, although the other one answers", asked)
	}
}

func TestForwardsOverTCPWhenTruncated(t *testing.T) {
	outside := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		reply := new(dns.Msg).SetReply(m)
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			reply.Truncated = true
		} else {
			for i := range 200 {
				reply.Answer = append(reply.Answer, &dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, byte(i))})
			}
		}
		_ = w.WriteMsg(reply)
	})
	s := startServer(t, func(c *Config) { c.Upstreams = []string{outside.address} })
	m := new(dns.Msg).SetQuestion("big.example.", dns.TypeA)
	if reply := s.exchange(m, "tcp"); len(reply.Answer) != 200 {
		t.Errorf("got %d answers", len(reply.Answer))
	}
	if reply := s.exchange(m, "udp"); !reply.Truncated || len(reply.Answer) == 0 {
		t.Errorf("over UDP the answer must say that it is not whole: %v", reply)
	}
}

// Twenty ask at once for a name that nobody knows yet: one question leaves.
func TestAsksOnce(t *testing.T) {
	asked, release := make(chan struct{}, 100), make(chan struct{})
	outside := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		asked <- struct{}{}
		<-release
		addressOf("192.0.2.1")(w, m)
	})
	m := newMetrics()
	f := newForwarder(func() []string { return []string{outside.address} }, m)
	answers := make(chan error, 20)
	for range 20 {
		go func() {
			_, err := f.resolve(context.Background(), question{name: "example.com.", qtype: dns.TypeA, rd: true})
			answers <- err
		}()
	}
	<-asked
	deadline := time.Now().Add(10 * time.Second)
	for len(f.slots) < 20 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	close(release)
	for range 20 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if n := outside.asked.Load(); n > 2 { // the slowest asker may come after the first flight
		t.Errorf("%d questions left", n)
	}
}

func TestUpstreamsFollowResolvConf(t *testing.T) {
	first, second := startUpstream(t, addressOf("192.0.2.1")), startUpstream(t, addressOf("192.0.2.2"))
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	// resolv.conf knows no ports; the parser takes what follows "nameserver" as it is.
	write := func(to, content string) {
		t.Helper()
		if err := os.WriteFile(to+".new", []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(to+".new", to); err != nil {
			t.Fatal(err)
		}
	}
	target := filepath.Join(t.TempDir(), "stub.conf")
	write(target, "nameserver "+first.address+"\n")
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, func(c *Config) { c.ResolvConfPath = path })
	resolvesTo := func(want string) func() bool {
		return func() bool {
			return slices.Equal(values(s.ask("example.com.", dns.TypeA).Answer), []string{want})
		}
	}
	s.eventually("the first server answers", resolvesTo("192.0.2.1"))
	write(target, "nameserver "+second.address+"\n")
	s.eventually("the target of the link is followed", resolvesTo("192.0.2.2"))
	write(path, "nameserver "+first.address+"\n") // replaces the link
	s.eventually("the file in place of the link is followed", resolvesTo("192.0.2.1"))
	write(path, "nameserver "+s.address+"\n")
	s.eventually("we do not ask ourselves", func() bool { return s.ask("other.example.com.", dns.TypeA).Rcode == dns.RcodeServerFailure })
}

// Another server forwards our questions back to us: they fail, and do not multiply.
func TestLoopThroughAnother(t *testing.T) {
	var back atomic.Value
	relay := startUpstream(t, func(w dns.ResponseWriter, m *dns.Msg) {
		reply, _, err := (&dns.Client{Timeout: 20 * time.Second}).Exchange(m, back.Load().(string))
		if err != nil {
			reply = new(dns.Msg).SetRcode(m, dns.RcodeServerFailure)
		}
		_ = w.WriteMsg(reply)
	})
	listening := make(chan struct{})
	s := startServer(t, func(c *Config) {
		c.Upstreams = []string{relay.address}
		told := c.Listening
		c.Listening = func(a []netip.AddrPort) {
			back.Store(a[0].String())
			close(listening)
			told(a)
		}
	})
	<-listening
	if reply := s.ask("example.com.", dns.TypeA); reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %v", reply)
	}
	if asked := relay.asked.Load(); asked > 2 {
		t.Errorf("%d questions were sent", asked)
	}
}

func TestBeforeTheListsAreThere(t *testing.T) {
	h, _ := testHandler()
	h.ready.Store(false)
	ask := func(name string, qtype uint16) int {
		reply, _ := h.answer(t.Context(), new(dns.Msg).SetQuestion(name, qtype))
		return reply.Rcode
	}
	for _, name := range []string{"web.default.svc.cluster.local.", "9.9.42.10.in-addr.arpa."} {
		if got := ask(name, dns.TypePTR); got != dns.RcodeServerFailure {
			t.Errorf("%s: %s", name, dns.RcodeToString[got])
		}
	}
	h.ready.Store(true)
	for _, name := range []string{"web.default.svc.cluster.local.", "9.9.42.10.in-addr.arpa."} {
		if got := ask(name, dns.TypePTR); got != dns.RcodeNameError {
			t.Errorf("%s: %s", name, dns.RcodeToString[got])
		}
	}
}

func TestGoResolver(t *testing.T) {
	outside := startUpstream(t, addressOf("192.0.2.1"))
	s := startServer(t, func(c *Config) { c.Upstreams = []string{outside.address} }, testObjects()...)
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, s.address)
	}}
	ctx := t.Context()
	for host, want := range map[string][]string{
		"web.default.svc.cluster.local.":        {"10.43.0.20", "fd73:6b65:7043::20"},
		"db-0.db.default.svc.cluster.local.":    {"10.42.0.5", "fd73:6b65:7042::5"},
		"10-42-0-77.default.pod.cluster.local.": {"10.42.0.77"},
		"away.default.svc.cluster.local.":       {"192.0.2.1"},
		"www.example.com.":                      {"192.0.2.1"},
	} {
		got, err := r.LookupHost(ctx, host)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", host, got, err)
		}
	}
	if names, err := r.LookupAddr(ctx, "10.43.0.20"); err != nil || names[0] != "web.default.svc.cluster.local." {
		t.Errorf("reverse: %v, %v", names, err)
	}
	if _, records, err := r.LookupSRV(ctx, "http", "tcp", "web.default.svc.cluster.local."); err != nil || records[0].Port != 80 {
		t.Errorf("SRV: %v, %v", records, err)
	}
	if text, err := r.LookupTXT(ctx, "dns-version.cluster.local."); err != nil || text[0] != "1.1.0" {
		t.Errorf("TXT: %v, %v", text, err)
	}
	if _, err := r.LookupHost(ctx, "missing.default.svc.cluster.local."); !notFound(err) {
		t.Errorf("missing: %v", err)
	}
}

// A process that is told to end while it starts has done nothing wrong.
func TestEndsBeforeItBegins(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	factory := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	services := factory.Core().V1().Services().Informer()
	factory.StartWithContext(ctx)
	cancel()
	factory.Shutdown()
	if !services.IsStopped() {
		t.Fatal("the informer has not ended")
	}
	err := Run(ctx, Config{
		Addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Port: -1, Domain: "cluster.local", Informers: factory, NodeName: "n",
		Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), ResolvConfPath: t.TempDir() + "/resolv.conf",
	})
	if err != nil {
		t.Error(err)
	}
}

func notFound(err error) bool {
	var dnsError *net.DNSError
	return errors.As(err, &dnsError) && dnsError.IsNotFound
}
