// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
)

// everything is an Ingress that sends all requests to Service "app".
func everything() *networkingv1.Ingress { return ingress("all", rule{"", "/", false, "app"}) }

func TestHeadersToTheBackend(t *testing.T) {
	h := start(t, nil, everything())
	var seen *http.Request
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r.Clone(context.Background())
		w.Header().Set("Connection", "X-Secret")
		w.Header().Set("X-Secret", "1")
		w.Header().Set("X-Public", "2")
		w.Header()["Content-Type"] = nil
		fmt.Fprint(w, "<html>")
	}))
	req, _ := http.NewRequest("GET", "http://app.example.com/a%2Fb/../c?q=%20&&x", nil)
	for name, value := range map[string]string{
		"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil", "X-Real-Ip": "6.6.6.6", "Forwarded": "for=6.6.6.6",
		"X_Forwarded_For": "6.6.6.6", "Connection": "X-Hop, close", "X-Hop": "1", "Keep-Alive": "1", "Proxy-Authorization": "x", "Te": "trailers, deflate",
		"X-Request-Id": "abc", "Cookie": "a=b", "Upgrade": "h2c",
	} {
		req.Header.Set(name, value)
	}
	resp, err := h.clientFor(nil, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	_, port, _ := net.SplitHostPort(h.http)
	for name, want := range map[string]string{
		"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "app.example.com", "X-Forwarded-Port": port,
		"X-Real-Ip": "127.0.0.1", "X-Request-Id": "abc", "Cookie": "a=b", "Te": "trailers",
		"X-Hop": "", "Keep-Alive": "", "Proxy-Authorization": "", "Forwarded": "", "X_forwarded_for": "", "Upgrade": "", "Connection": "",
	} {
		if got := strings.Join(seen.Header[name], "|"); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if seen.RequestURI != "/a%2Fb/../c?q=%20&&x" || seen.Host != "app.example.com" {
		t.Errorf("target %q host %q", seen.RequestURI, seen.Host)
	}
	if resp.Header.Get("X-Secret") != "" || resp.Header.Get("X-Public") != "2" || resp.Header.Get("Content-Type") != "" {
		t.Errorf("reply: %v", resp.Header)
	}
}

func TestTrustedProxyIsBelieved(t *testing.T) {
	ing := withTLS(ingress("all", rule{"app.com", "/", false, "app"}), "s", "app.com")
	h := start(t, func(c *Config) { c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }, ing, tlsSecret(t, "s", "app.com"))
	var seen http.Header
	h.backends.set("app", app(t, func(_ http.ResponseWriter, r *http.Request) { seen = r.Header.Clone() }))
	req, _ := http.NewRequest("GET", "http://app.com/", nil)
	req.Header.Set("X-Forwarded-For", "192.0.2.1, 192.0.2.2")
	req.Header.Set("X-Forwarded-Proto", "https")
	req.Header.Set("X-Forwarded-Port", "443")
	resp, err := h.clientFor(nil, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 || seen.Get("X-Forwarded-For") != "192.0.2.1, 192.0.2.2, 127.0.0.1" || seen.Get("X-Real-Ip") != "192.0.2.1" ||
		seen.Get("X-Forwarded-Proto") != "https" || seen.Get("X-Forwarded-Port") != "443" {
		t.Errorf("%d %v", resp.StatusCode, seen)
	}
}

func TestTrailersAndEarlyHintsBothWays(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</x.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		w.Header().Set("Trailer", "X-Sum")
		b, _ := io.ReadAll(r.Body)
		_, _ = w.Write(b)
		w.Header().Set("X-Sum", r.Trailer.Get("X-Client-Sum"))
		w.Header().Set(http.TrailerPrefix+"X-Late", "yes")
	}))
	for _, http2 := range []bool{false, true} {
		url := "http://app.com/"
		if http2 {
			url = "https://app.com/"
		}
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", url, pr)
		req.Trailer = http.Header{"X-Client-Sum": nil}
		go func() {
			fmt.Fprint(pw, "part")
			req.Trailer.Set("X-Client-Sum", "42")
			pw.Close()
		}()
		resp, err := h.clientFor(insecure(), http2).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "part" || resp.Trailer.Get("X-Sum") != "42" || resp.Trailer.Get("X-Late") != "yes" {
			t.Errorf("http2=%v: %q %v, trailer %v", http2, body, err, resp.Trailer)
		}
		if resp.Header.Get("Link") != "" {
			t.Errorf("the hint's header is in the reply: %v", resp.Header)
		}
	}
}

func TestServerSentEventsArriveAtOnce(t *testing.T) {
	h := start(t, nil, everything())
	next := make(chan string)
	gone := make(chan struct{})
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		for {
			select {
			case s := <-next:
				fmt.Fprintf(w, "data: %s\n\n", s)
				_ = rc.Flush()
			case <-r.Context().Done():
				close(gone)
				return
			}
		}
	}))
	resp, err := h.clientFor(nil, false).Get("http://app/")
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(resp.Body)
	for i := range 5 {
		next <- fmt.Sprint(i)
		lines.Scan()
		if got := lines.Text(); got != fmt.Sprintf("data: %d", i) {
			t.Fatalf("event %d: %q", i, got)
		}
		lines.Scan()
	}
	resp.Body.Close()
	<-gone // a client that leaves is not kept from the backend
}

func TestBigBodiesBothWays(t *testing.T) {
	h := start(t, nil, everything(), tlsSecret(t, "s", "app.com"))
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if r.ContentLength >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		_, _ = io.Copy(w, r.Body)
	}))
	const size = 20 << 20
	block := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	want := sha256.Sum256(block)
	for _, tc := range []struct {
		name           string
		chunked, http2 bool
	}{{"length", false, false}, {"chunked", true, false}, {"h2", false, true}, {"h2 no length", true, true}} {
		var body io.Reader = bytes.NewReader(block)
		if tc.chunked {
			body = io.MultiReader(body)
		}
		url := "http://app.com/"
		if tc.http2 {
			url = "https://app.com/"
		}
		resp, err := h.clientFor(insecure(), tc.http2).Post(url, "application/octet-stream", body)
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		sum := sha256.New()
		n, err := io.Copy(sum, resp.Body)
		resp.Body.Close()
		if err != nil || n != size || !bytes.Equal(sum.Sum(nil), want[:]) {
			t.Errorf("%s: %d bytes, %v", tc.name, n, err)
		}
	}
}

func TestOwnPages(t *testing.T) {
	dead := listen(t)
	refused := netip.MustParseAddrPort(dead.Addr().String())
	dead.Close()
	limited := ingress("limited", rule{"limited", "/", false, "app"})
	limited.Annotations["nginx.ingress.kubernetes.io/proxy-body-size"] = "1k"
	slow := ingress("slow", rule{"slow", "/", false, "slow"})
	slow.Annotations["skep.io/proxy-read-timeout"] = "50ms"
	h := start(t, nil, limited, slow, ingress("i", rule{"empty", "/", false, "empty"}, rule{"none", "/", false, "none"}, rule{"dead", "/", false, "dead"},
		rule{"junk", "/", false, "junk"}, rule{"huge", "/", false, "huge"}, rule{"hangup", "/", false, "hangup"}))
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	h.backends.set("empty")
	h.backends.set("dead", refused)
	h.backends.set("slow", app(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}))
	h.backends.set("junk", raw(t, "SSH-2.0-OpenSSH\r\n\r\n"))
	h.backends.set("huge", raw(t, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("y", 100<<10)+"\r\n\r\n"))
	h.backends.set("hangup", raw(t, ""))
	c := h.clientFor(nil, false)
	for host, want := range map[string]int{"nowhere": 404, "empty": 503, "none": 503, "dead": 502, "slow": 504, "junk": 502, "huge": 502, "hangup": 502} {
		resp, body := get(t, c, "http://"+host+"/")
		if resp.StatusCode != want || body != pages[want] || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %q, want %d", host, resp.StatusCode, body, want)
		}
	}
	for _, body := range []io.Reader{strings.NewReader(strings.Repeat("x", 2000)), io.MultiReader(strings.NewReader(strings.Repeat("x", 2000)))} {
		resp, err := c.Post("http://limited/", "text/plain", body)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 413 {
			t.Errorf("too large a body: %d", resp.StatusCode)
		}
	}
	resp, err := c.Post("http://limited/", "text/plain", strings.NewReader(strings.Repeat("x", 1000)))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("a body of allowed size: %d", resp.StatusCode)
	}
}

// raw starts a backend that answers every connection with the same bytes and closes it.
func raw(t *testing.T, answer string) netip.AddrPort {
	l := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, answer)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return netip.MustParseAddrPort(l.Addr().String())
}

// TestCutReplyIsNotTakenForWhole: a backend that dies in the middle must show at the client.
func TestCutReplyIsNotTakenForWhole(t *testing.T) {
	h := start(t, nil, everything())
	for _, answer := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"} {
		h.backends.set("app", raw(t, answer))
		resp, err := h.clientFor(nil, false).Get("http://app/")
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("half a reply looked whole: %q", answer)
		}
	}
}

func TestEarlyReplyToAnUnfinishedBody(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", raw(t, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno"))
	c, err := net.Dial("tcp", h.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 100000\r\n\r\npart")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 401 || string(body) != "no" || !resp.Close {
		t.Errorf("%v %q %v", resp, body, err)
	}
}

func TestContinueComesBeforeTheBody(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s%s", b, r.Header.Get("Expect"))
	}))
	c, err := net.Dial("tcp", h.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	br := bufio.NewReader(c)
	fmt.Fprint(c, "PUT / HTTP/1.1\r\nHost: app\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
	if line, err := br.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
		t.Fatalf("%q %v", line, err)
	}
	_, _ = br.ReadString('\n')
	fmt.Fprint(c, "body")
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(resp.Body); string(b) != "body" {
		t.Errorf("%q", b)
	}
}

// TestSmugglingIsRefused sends requests about whose length two servers could disagree.
func TestSmugglingIsRefused(t *testing.T) {
	h := start(t, nil, everything())
	var paths sync.Map
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		paths.Store(r.URL.Path, true)
		_, _ = io.Copy(io.Discard, r.Body)
	}))
	for name, request := range map[string]string{
		"two lengths":       "POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\nContent-Length: 30\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"length list":       "POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 0, 30\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"signed length":     "POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: +0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"obscured chunked":  "POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"space before":      "POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"two hosts":         "GET /smuggled HTTP/1.1\r\nHost: app\r\nHost: other\r\n\r\n",
		"bad chunk size":    "POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n",
		"field with a line": "GET /smuggled HTTP/1.1\r\nHost: app\r\nX: a\rGET /smuggled HTTP/1.1\r\n\r\n",
		"no host":           "GET /smuggled HTTP/1.1\r\n\r\n",
		"connect":           "CONNECT app:80 HTTP/1.1\r\nHost: app\r\n\r\n",
	} {
		c, err := net.Dial("tcp", h.http)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, request)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode < 400 {
			t.Errorf("%s: %v %v", name, resp, err)
		}
		_, _ = io.Copy(io.Discard, c) // closed by the server
		c.Close()
	}
	if _, ok := paths.Load("/smuggled"); ok {
		t.Error("a smuggled request reached the backend")
	}

	// Both at once: RFC 9112 lets a proxy take the chunks and drop the length, on one connection only.
	c, err := net.Dial("tcp", h.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "POST /both HTTP/1.1\r\nHost: app\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n")
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	t.Logf("both: %d, close %v", resp.StatusCode, resp.Close)
}

func TestRetryReachesAnotherBackend(t *testing.T) {
	dead := listen(t)
	refused := netip.MustParseAddrPort(dead.Addr().String())
	dead.Close()
	h := start(t, nil, everything())
	var bodies atomic.Int32
	good := app(t, func(w http.ResponseWriter, r *http.Request) {
		if b, _ := io.ReadAll(r.Body); string(b) == "payload" {
			bodies.Add(1)
		}
	})
	h.backends.set("app", refused, good)
	c := h.clientFor(nil, false)
	for range 10 {
		// A body that was not read yet can go to the next backend as well.
		resp, err := c.Post("http://app/", "text/plain", strings.NewReader("payload"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if bodies.Load() != 10 {
		t.Errorf("%d bodies arrived", bodies.Load())
	}
}

// TestKeptConnectionThatDied: the backend closes kept connections whenever it likes.
func TestKeptConnectionThatDied(t *testing.T) {
	h := start(t, nil, everything())
	var served atomic.Int32
	l := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				// One reply, then the next request on this connection is answered by hanging up.
				br := bufio.NewReader(c)
				for i := range 2 {
					if _, err := http.ReadRequest(br); err != nil || i == 1 {
						return
					}
					served.Add(1)
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	h.backends.set("app", netip.MustParseAddrPort(l.Addr().String()))
	c := h.clientFor(nil, false)
	for range 10 {
		if resp, body := get(t, c, "http://app/"); resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("%d %q", resp.StatusCode, body)
		}
	}
	if served.Load() != 10 {
		t.Errorf("served %d", served.Load())
	}
	// What is not idempotent is not sent twice.
	get(t, c, "http://app/") // leaves a kept connection that will hang up
	resp, err := c.Post("http://app/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 502 {
		t.Errorf("POST on a dying connection: %d, want 502", resp.StatusCode)
	}
}

func TestSlowClientsLoseTheirConnection(t *testing.T) {
	h := start(t, func(c *Config) {
		c.Limits.ReadHeader = 50 * time.Millisecond
		c.Limits.ClientStall = 50 * time.Millisecond
	}, everything())
	cut := make(chan struct{}, 1)
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_, _ = io.Copy(io.Discard, r.Body)
			return
		}
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				cut <- struct{}{}
				return
			}
		}
	}))
	for name, request := range map[string]string{
		"head":    "GET / HTTP/1.1\r\nHost: app\r\nX-Slow: ",
		"body":    "POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 10\r\n\r\nabc",
		"reading": "GET / HTTP/1.1\r\nHost: app\r\n\r\n",
	} {
		c, err := net.Dial("tcp", h.http)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, request)
		if name == "reading" {
			<-cut // nothing is read, so the server gives up and the backend notices
		} else {
			b, _ := io.ReadAll(c) // returns when the server closes
			if name == "body" && !strings.HasPrefix(string(b), "HTTP/1.1 408") {
				t.Errorf("body: %q", b)
			}
		}
		c.Close()
	}
}

func TestConnectionBoundLeavesDescriptors(t *testing.T) {
	for files, want := range map[uint64]int{0: 1, 1024: 256, 20_000: 5_000, 80_000: 20_000, 1 << 20: 20_000, math.MaxUint64: 20_000} {
		if got := connectionBound(files); got != want {
			t.Errorf("with %d files: %d connections, want %d", files, got, want)
		}
	}
}

func gauge(t *testing.T, h *harness, name string) float64 {
	t.Helper()
	families, err := h.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}
