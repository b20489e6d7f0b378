// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

// BenchmarkMatch looks routes up in tables of growing size: it must not grow with them.
func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var all []*networkingv1.Ingress
			for i := range n {
				all = append(all, ingress(fmt.Sprint("i", i), rule{fmt.Sprintf("h%d.example.com", i), "/", false, "a"}, rule{fmt.Sprintf("h%d.example.com", i), "/api/v1", false, "b"}))
			}
			table := Build(Input{Ingresses: all})
			b.ReportAllocs()
			for b.Loop() {
				if table.Match("h7.example.com", "/api/v1/things/42") == nil {
					b.Fatal("no route")
				}
			}
		})
	}
}

func BenchmarkBuild(b *testing.B) {
	var all []*networkingv1.Ingress
	for i := range 5000 {
		all = append(all, ingress(fmt.Sprint("i", i), rule{fmt.Sprintf("h%d.example.com", i), "/", false, "a"}))
	}
	for b.Loop() {
		Build(Input{Ingresses: all})
	}
}

// onePod is a Backends with one address.
type onePod []netip.AddrPort

func (o onePod) Lookup(string, string, networkingv1.ServiceBackendPort) ([]netip.AddrPort, bool) {
	return o, true
}
func (o onePod) Subscribe() (<-chan struct{}, func()) { return nil, func() {} }

// BenchmarkProxy measures requests with 128-byte replies over kept connections: straight to the
// backend, through httputil.ReverseProxy, and through this package. Rounds alternate (A B C A B C)
// so that a busy machine is equally busy for each; the medians are reported as requests a second
// and as shares of the direct path.
func BenchmarkProxy(b *testing.B) {
	const clients, round = 64, 300 * time.Millisecond
	body := make([]byte, 128)
	backend := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) })}
	direct := serveOn(b, backend)

	target, err := url.Parse("http://" + direct)
	if err != nil {
		b.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 1024}
	defer transport.CloseIdleConnections()
	standard := serveOn(b, &http.Server{Handler: &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.SetXForwarded() }, Transport: transport,
	}})

	client := fake.NewClientset(everything())
	factory := informers.NewSharedInformerFactory(client, 0)
	l := listen(b)
	server, err := New(Config{Client: client, Informers: factory, Backends: onePod{netip.MustParseAddrPort(direct)}, ListenHTTP: l})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	factory.Start(ctx.Done())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
		factory.Shutdown()
	}()
	<-server.Ready()

	addrs := []string{direct, standard, l.Addr().String()}
	results := make([][]float64, len(addrs))
	for b.Loop() {
		for i, addr := range addrs {
			results[i] = append(results[i], throughput(b, addr, clients, round))
		}
	}
	median := func(v []float64) float64 {
		slices.Sort(v)
		return v[len(v)/2]
	}
	d, s, own := median(results[0]), median(results[1]), median(results[2])
	b.ReportMetric(0, "ns/op") // a round's length says nothing
	b.ReportMetric(d, "direct-req/s")
	b.ReportMetric(s, "reverseproxy-req/s")
	b.ReportMetric(own, "skep-req/s")
	b.ReportMetric(own/s, "skep/reverseproxy")
	b.ReportMetric(own/d, "skep/direct")
}

func serveOn(b *testing.B, srv *http.Server) string {
	l := listen(b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			b.Error(err)
		}
	}()
	b.Cleanup(func() {
		srv.Close()
		<-done
	})
	return l.Addr().String()
}

// throughput drives a server with a client that costs little itself.
func throughput(b *testing.B, addr string, clients int, d time.Duration) float64 {
	var n atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range clients {
		wg.Go(func() {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				b.Error(err)
				return
			}
			defer c.Close()
			br := bufio.NewReader(c)
			for time.Since(begin) < d {
				if _, err := io.WriteString(c, "GET /x HTTP/1.1\r\nHost: app\r\nAccept: */*\r\n\r\n"); err != nil {
					b.Error(err)
					return
				}
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
					b.Errorf("%d %v", resp.StatusCode, err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds()
}
