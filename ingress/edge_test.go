// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestRepliesWithoutBody keeps one client connection through every kind of reply that has none.
func TestRepliesWithoutBody(t *testing.T) {
	h := start(t, nil, everything())
	var conns sync.Map
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/204":
			w.WriteHeader(204)
		case "/304":
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(304)
		case "/empty":
			w.Header().Set("Content-Length", "0")
		case "/head":
			w.Header().Set("Content-Length", "12345")
		}
	}))
	srv.Config.ConnState = func(c net.Conn, s http.ConnState) { conns.Store(c, s) }
	srv.Start()
	t.Cleanup(srv.Close)
	h.backends.set("app", netip.MustParseAddrPort(srv.Listener.Addr().String()))
	c, err := net.Dial("tcp", h.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	for range 2 {
		for _, tc := range []struct {
			method, path string
			status       int
			length       int64
		}{{"GET", "/204", 204, 0}, {"GET", "/304", 304, 0}, {"GET", "/empty", 200, 0}, {"HEAD", "/head", 200, 12345}, {"POST", "/empty", 200, 0}, {"OPTIONS", "*", 200, 0}} {
			fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: app\r\n\r\n", tc.method, tc.path)
			resp, err := http.ReadResponse(br, &http.Request{Method: tc.method})
			if err != nil {
				t.Fatalf("%s %s: %v", tc.method, tc.path, err)
			}
			b, err := io.ReadAll(resp.Body)
			if err != nil || len(b) != 0 || resp.StatusCode != tc.status || resp.ContentLength != tc.length {
				t.Errorf("%s %s: %d, length %d, %q %v", tc.method, tc.path, resp.StatusCode, resp.ContentLength, b, err)
			}
		}
	}
	n := 0
	conns.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d connections to the backend for requests one after another", n)
	}
}

func TestUpgradeThatTheBackendRefuses(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "no "+r.Header.Get("Upgrade"))
	}))
	req, _ := http.NewRequest("GET", "http://app/", nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "websocket")
	resp, err := h.clientFor(nil, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 403 || string(b) != "no websocket" {
		t.Errorf("%d %q", resp.StatusCode, b)
	}
	// And one who switches unasked is not followed.
	h.backends.set("app", raw(t, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"))
	if resp, _ := get(t, h.clientFor(nil, false), "http://app/"); resp.StatusCode != 502 {
		t.Errorf("unasked switch: %d", resp.StatusCode)
	}
}

// TestUpgradedConnectionCanCloseHalf: the end of one direction passes, the other goes on. What the
// client sends right behind its request must not be lost.
func TestUpgradedConnectionCanCloseHalf(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", app(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: sum\r\n\r\n")
		all, err := io.ReadAll(rw)
		fmt.Fprintf(conn, "%d bytes %v", len(all), err)
	}))
	c, err := net.Dial("tcp", h.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: app\r\nConnection: Upgrade\r\nUpgrade: sum\r\n\r\nearly")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	if _, err := c.Write(bytes.Repeat([]byte("x"), 100000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(br); err != nil || string(b) != "100005 bytes <nil>" {
		t.Errorf("%q %v", b, err)
	}
}

// TestKeptConnectionsEndWithTheirPod: an address that leaves the table may come back as another pod.
func TestKeptConnectionsEndWithTheirPod(t *testing.T) {
	h := start(t, nil, everything())
	closed := make(chan struct{}, 10)
	srv := httptest.NewUnstartedServer(named("ok"))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			closed <- struct{}{}
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	addr := netip.MustParseAddrPort(srv.Listener.Addr().String())
	c := h.clientFor(nil, false)
	for range 3 {
		h.backends.set("app", addr)
		if resp, _ := get(t, c, "http://app/"); resp.StatusCode != 200 {
			t.Fatal(resp.StatusCode)
		}
		h.backends.set("app")
		<-closed
	}
}

// TestPortsAndNamespacesReachTheLookup: a backend is named by number or by name, in its Ingress' namespace.
func TestPortsAndNamespacesReachTheLookup(t *testing.T) {
	byName := ingress("i", rule{"named", "/", false, "app"})
	byName.Namespace = "team"
	byName.Spec.Rules[0].HTTP.Paths[0].Backend.Service.Port = networkingv1.ServiceBackendPort{Name: "http"}
	resource := ingress("r", rule{"resource", "/", false, "app"})
	resource.Spec.Rules[0].HTTP.Paths[0].Backend = networkingv1.IngressBackend{Resource: &corev1.TypedLocalObjectReference{Kind: "Bucket", Name: "b"}}
	table := Build(Input{Ingresses: []*networkingv1.Ingress{byName, ingress("n", rule{"numbered", "/", false, "app"}), resource}})
	for host, want := range map[string]BackendRef{
		"named":    {"team", "app", networkingv1.ServiceBackendPort{Name: "http"}},
		"numbered": {"default", "app", networkingv1.ServiceBackendPort{Number: 80}},
		"resource": {Namespace: "default"},
	} {
		if got := table.Match(host, "/").Backend; got != want {
			t.Errorf("%s: %+v, want %+v", host, got, want)
		}
	}
	if len(table.Problems) != 1 || table.Problems[0].Reason != "UnsupportedBackend" {
		t.Errorf("%+v", table.Problems)
	}
	h := start(t, nil, resource)
	if resp, _ := get(t, h.clientFor(nil, false), "http://resource/"); resp.StatusCode != 503 {
		t.Errorf("resource backend: %d", resp.StatusCode)
	}
}

func TestMetricSeriesFollowTheIngresses(t *testing.T) {
	ctx := context.Background()
	h := start(t, nil, ingress("one", rule{"one", "/", false, "app"}))
	h.backends.set("app", app(t, named("x")))
	c := h.clientFor(nil, false)
	for i := range 20 {
		get(t, c, "http://one/")
		get(t, c, fmt.Sprintf("http://made-up-%d/%d", i, i))
	}
	series := func() (out string) {
		families, err := h.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "skep_ingress_requests_total" {
				for _, m := range f.GetMetric() {
					if m.GetCounter().GetValue() > 0 {
						out += fmt.Sprintf("%s %s %v;", m.GetLabel()[1].GetValue(), m.GetLabel()[0].GetValue(), m.GetCounter().GetValue())
					}
				}
			}
		}
		return out
	}
	eventually(t, "all to be counted", func() bool { return strings.Contains(series(), "default/one 2xx 20;") })
	if got := series(); !strings.Contains(got, "4xx 20;") || strings.Contains(got, "made-up") {
		t.Errorf("series: %s", got)
	}
	if err := h.client.NetworkingV1().Ingresses("default").Delete(ctx, "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the Ingress' series to go", func() bool { return !strings.Contains(series(), "default/one") })
}
