// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"skep.io/skep/api"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// fakeBackends is a table of ready addresses that tests change.
type fakeBackends struct {
	mu      sync.Mutex
	addrs   map[string][]netip.AddrPort // namespace/service
	changed chan struct{}
}

func newFakeBackends() *fakeBackends {
	return &fakeBackends{addrs: map[string][]netip.AddrPort{}, changed: make(chan struct{}, 1)}
}

func (f *fakeBackends) Lookup(namespace, service string, _ networkingv1.ServiceBackendPort) ([]netip.AddrPort, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, ok := f.addrs[namespace+"/"+service]
	return a, ok
}

func (f *fakeBackends) Subscribe() (<-chan struct{}, func()) { return f.changed, func() {} }

func (f *fakeBackends) set(service string, addrs ...netip.AddrPort) {
	f.mu.Lock()
	f.addrs["default/"+service] = slices.Clone(addrs)
	f.mu.Unlock()
	signal(f.changed)
}

// harness is a running server on loopback with everything around it faked but the sockets.
type harness struct {
	t           *testing.T
	client      *fake.Clientset
	backends    *fakeBackends
	server      *Server
	http, https string // host:port
	stop        context.CancelFunc
	done        chan error
	metrics     *prometheus.Registry
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func start(t *testing.T, change func(*Config), objects ...runtime.Object) *harness {
	t.Helper()
	h := &harness{t: t, client: fake.NewClientset(objects...), backends: newFakeBackends(), done: make(chan error, 1), metrics: prometheus.NewRegistry()}
	lh, ls := listen(t), listen(t)
	h.http, h.https = lh.Addr().String(), ls.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	h.stop = cancel
	factory := informers.NewSharedInformerFactory(h.client, 0)
	cfg := Config{
		Client: h.client, Informers: factory, Backends: h.backends, ListenHTTP: lh, ListenHTTPS: ls,
		NodeIPs:         []netip.Addr{netip.MustParseAddr("127.0.0.1")},
		StatusAddresses: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("192.0.2.7")} },
		HTTPSPort:       netip.MustParseAddrPort(h.https).Port(),
		Log:             slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo})),
		Metrics:         h.metrics,
	}
	cfg.AccessLog = slog.New(failedOnly{cfg.Log.Handler()})
	if change != nil {
		change(&cfg)
	}
	var err error
	if h.server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	fctx, fstop := context.WithCancel(context.Background())
	factory.Start(fctx.Done())
	go func() { h.done <- h.server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-h.done; err != nil {
			t.Errorf("Run: %v", err)
		}
		fstop()
		factory.Shutdown()
	})
	select {
	case <-h.server.Ready():
	case <-time.After(30 * time.Second):
		t.Fatal("server is not ready")
	}
	return h
}

// failedOnly passes access log lines on that have an error.
type failedOnly struct{ slog.Handler }

func (f failedOnly) Handle(ctx context.Context, r slog.Record) error {
	failed := false
	r.Attrs(func(a slog.Attr) bool {
		failed = failed || a.Key == "err"
		return true
	})
	if !failed {
		return nil
	}
	return f.Handler.Handle(ctx, r)
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// eventually polls a condition; the limit is only for a failing test.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting for: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// app starts a backend and returns its address.
func app(t testing.TB, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return netip.MustParseAddrPort(srv.Listener.Addr().String())
}

func named(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, text) }
}

// rule describes one line of a test Ingress.
type rule struct {
	host, path string
	exact      bool
	service    string
}

func ingress(name string, rules ...rule) *networkingv1.Ingress {
	class := api.IngressClassName
	ing := &networkingv1.Ingress{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Annotations: map[string]string{}},
		Spec:       networkingv1.IngressSpec{IngressClassName: &class},
	}
	for _, r := range rules {
		pathType := networkingv1.PathTypePrefix
		if r.exact {
			pathType = networkingv1.PathTypeExact
		}
		ing.Spec.Rules = append(ing.Spec.Rules, networkingv1.IngressRule{
			Host: r.host,
			IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{
				Paths: []networkingv1.HTTPIngressPath{{Path: r.path, PathType: &pathType, Backend: serviceBackend(r.service)}},
			}},
		})
	}
	return ing
}

func serviceBackend(name string) networkingv1.IngressBackend {
	return networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{
		Name: name, Port: networkingv1.ServiceBackendPort{Number: 80},
	}}
}

func withTLS(ing *networkingv1.Ingress, secret string, hosts ...string) *networkingv1.Ingress {
	ing.Spec.TLS = append(ing.Spec.TLS, networkingv1.IngressTLS{Hosts: hosts, SecretName: secret})
	return ing
}

func service(name string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
}

// client returns an HTTP client that goes to the server whatever the URL's host, and does not follow redirects.
func (h *harness) clientFor(tlsConfig *tls.Config, http2 bool) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	tr := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			target := h.http
			if strings.HasSuffix(addr, ":443") {
				target = h.https
			}
			return (&net.Dialer{}).DialContext(ctx, network, target)
		},
		TLSClientConfig: tlsConfig, Protocols: protocols, MaxIdleConnsPerHost: 64,
	}
	h.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func get(t testing.TB, c *http.Client, url string) (*http.Response, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func TestHostsAndPathsEndToEnd(t *testing.T) {
	h := start(t, nil,
		ingress("one", rule{"a.example.com", "/", false, "a"}, rule{"a.example.com", "/api", false, "api"}, rule{"a.example.com", "/exact", true, "exact"}),
		ingress("two", rule{"*.example.com", "/", false, "wild"}),
		ingress("three", rule{"", "/open", false, "open"}),
	)
	for _, s := range []string{"a", "api", "exact", "wild", "open"} {
		h.backends.set(s, app(t, named(s)))
	}
	c := h.clientFor(nil, false)
	for url, want := range map[string]string{
		"http://a.example.com/":                "a",
		"http://A.EXAMPLE.com./apix":           "a",
		"http://a.example.com/api/v1":          "api",
		"http://a.example.com/exact":           "exact",
		"http://a.example.com/exact/more":      "a",
		"http://b.example.com/":                "wild",
		"http://x.b.example.com/":              pages[404],
		"http://x.b.example.com/open":          "open",
		"http://127.0.0.1/open/x":              "open",
		"http://a.example.com/x/../api/%2e%2e": "a",
	} {
		if _, got := get(t, c, url); got != want {
			t.Errorf("%s: got %q, want %q", url, got, want)
		}
	}
	eventually(t, "status", func() bool {
		ing, err := h.client.NetworkingV1().Ingresses("default").Get(context.Background(), "one", metav1.GetOptions{})
		return err == nil && len(ing.Status.LoadBalancer.Ingress) == 1 && ing.Status.LoadBalancer.Ingress[0].IP == "192.0.2.7"
	})
}
