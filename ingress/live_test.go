// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

// echo is a WebSocket backend.
func echo(w http.ResponseWriter, r *http.Request) {
	up := websocket.Upgrader{Subprotocols: []string{"chat"}}
	c, err := up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer c.Close()
	for {
		kind, b, err := c.ReadMessage()
		if err != nil || c.WriteMessage(kind, b) != nil {
			return
		}
	}
}

func (h *harness) websocket(t *testing.T, url string) *websocket.Conn {
	t.Helper()
	d := websocket.Dialer{
		NetDialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, h.http)
		},
		NetDialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&tls.Dialer{Config: insecure()}).DialContext(ctx, network, h.https)
		},
		Subprotocols: []string{"chat"},
	}
	c, resp, err := d.Dial(url, nil)
	if err != nil {
		t.Fatalf("%v %v", resp, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestWebSocketEcho(t *testing.T) {
	h := start(t, nil, everything())
	h.backends.set("app", app(t, echo))
	for _, url := range []string{"ws://app/ws", "wss://app/ws"} {
		c := h.websocket(t, url)
		if c.Subprotocol() != "chat" {
			t.Errorf("%s: subprotocol %q", url, c.Subprotocol())
		}
		for _, size := range []int{0, 5, 1 << 10, 1 << 20} {
			want := strings.Repeat("x", size)
			if err := c.WriteMessage(websocket.TextMessage, []byte(want)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := c.ReadMessage(); err != nil || string(got) != want {
				t.Fatalf("%s: %d bytes came back as %d, %v", url, size, len(got), err)
			}
		}
		// The client's close reaches the backend and its answer comes back.
		_ = c.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, "bye"))
		if _, _, err := c.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// load sends requests from several clients until it is stopped, and fails on any that fails.
type load struct {
	t       *testing.T
	stop    chan struct{}
	wg      sync.WaitGroup
	done    atomic.Int64
	mu      sync.Mutex
	answers map[string]int
	clients []*atomic.Int64 // requests done by each
}

func (h *harness) load(t *testing.T, clients int, newRequest func() *http.Request) *load {
	l := &load{t: t, stop: make(chan struct{}), answers: map[string]int{}}
	for range clients {
		c := h.clientFor(insecure(), false)
		mine := new(atomic.Int64)
		l.clients = append(l.clients, mine)
		l.wg.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				resp, err := c.Do(newRequest())
				if err != nil {
					t.Errorf("request: %v", err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("reply: %d %q %v", resp.StatusCode, b, err)
					return
				}
				l.done.Add(1)
				mine.Add(1)
				l.mu.Lock()
				l.answers[string(b)]++
				l.mu.Unlock()
			}
		})
	}
	return l
}

// more waits until n more requests were answered.
func (l *load) more(n int64) {
	l.t.Helper()
	target := l.done.Load() + n
	eventually(l.t, "requests to go on", func() bool { return l.done.Load() >= target || l.t.Failed() })
}

// settle waits until no request is under way that had started before.
func (l *load) settle() {
	l.t.Helper()
	for _, c := range l.clients {
		target := c.Load() + 2
		eventually(l.t, "each client to go on", func() bool { return c.Load() >= target || l.t.Failed() })
	}
}

func (l *load) end() map[string]int {
	close(l.stop)
	l.wg.Wait()
	return l.answers
}

func TestRouteChangesUnderLoadDropNothing(t *testing.T) {
	ctx := context.Background()
	h := start(t, nil, ingress("main", rule{"app.com", "/", false, "a"}))
	h.backends.set("a", app(t, named("a")))
	h.backends.set("b", app(t, named("b")))
	l := h.load(t, 8, func() *http.Request {
		req, _ := http.NewRequest("GET", "http://app.com/path", nil)
		return req
	})
	api := h.client.NetworkingV1().Ingresses("default")
	for i := range 20 {
		target := "ab"[i%2 : i%2+1]
		ing := ingress("main", rule{"app.com", "/", false, target})
		ing.Generation = int64(i + 2)
		if _, err := api.Update(ctx, ing, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		other := ingress(fmt.Sprint("other", i), rule{fmt.Sprintf("h%d.com", i), "/", false, "a"})
		if _, err := api.Create(ctx, other, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		l.more(10)
	}
	if answers := l.end(); answers["a"] == 0 || answers["b"] == 0 {
		t.Errorf("answers: %v", answers)
	}
}

func TestBackendsComeAndGoUnderLoad(t *testing.T) {
	h := start(t, nil, everything())
	servers := map[int]*httptest.Server{}
	addrs := func() (out []netip.AddrPort) {
		for _, s := range servers {
			out = append(out, netip.MustParseAddrPort(s.Listener.Addr().String()))
		}
		return out
	}
	add := func(i int) { servers[i] = httptest.NewServer(named(fmt.Sprint(i))) }
	add(0)
	add(1)
	h.backends.set("app", addrs()...)
	posts := atomic.Int64{}
	l := h.load(t, 8, func() *http.Request {
		method, body := "GET", io.Reader(nil)
		if posts.Add(1)%3 == 0 {
			method, body = "POST", strings.NewReader("data")
		}
		req, _ := http.NewRequest(method, "http://app/", body)
		return req
	})
	for i := 2; i < 10; i++ {
		add(i)
		h.backends.set("app", addrs()...)
		l.more(10)
		// The pod goes as pods do: it leaves the table, finishes what it has, and is gone.
		old := servers[i-2]
		delete(servers, i-2)
		h.backends.set("app", addrs()...)
		l.settle()
		old.Close()
		l.more(10)
	}
	if answers := l.end(); len(answers) < 10 {
		t.Errorf("only %d backends answered", len(answers))
	}
	// A pod that dies before the table knows: what was not yet sent goes to the other one.
	for i, s := range servers {
		s.Close()
		delete(servers, i)
		break
	}
	c := h.clientFor(nil, false)
	for range 20 {
		if resp, _ := get(t, c, "http://app/"); resp.StatusCode != 200 {
			t.Errorf("with one dead backend: %d", resp.StatusCode)
		}
	}
	for _, s := range servers {
		s.Close()
	}
}

func TestBalancing(t *testing.T) {
	h := start(t, nil, everything())
	hold := make(chan struct{})
	var addrs []netip.AddrPort
	for i := range 3 {
		addrs = append(addrs, app(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/hold" {
				<-hold
			}
			fmt.Fprint(w, i)
		}))
	}
	h.backends.set("app", addrs...)
	c := h.clientFor(nil, false)
	count := map[string]int{}
	for range 30 {
		_, b := get(t, c, "http://app/")
		count[b]++
	}
	if count["0"] != 10 || count["1"] != 10 || count["2"] != 10 {
		t.Errorf("one after another: %v", count)
	}
	// A busy backend gets nothing while an idle one is next to it.
	var wg sync.WaitGroup
	var busy atomic.Value
	wg.Go(func() {
		_, b := get(t, c, "http://app/hold")
		busy.Store(b)
	})
	eventually(t, "the request to be under way", func() bool { return gauge(t, h, "skep_ingress_requests_active") == 1 })
	clear(count)
	for range 30 {
		_, b := get(t, c, "http://app/")
		count[b]++
	}
	close(hold)
	wg.Wait()
	if count[busy.Load().(string)] != 0 {
		t.Errorf("the busy backend %v got requests: %v", busy.Load(), count)
	}
}

func TestDrainFinishesWhatIsUnderWay(t *testing.T) {
	h := start(t, nil, everything())
	arrived, release := make(chan struct{}), make(chan struct{})
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-release
		fmt.Fprint(w, "finished")
	}))
	result := make(chan string, 1)
	c := h.clientFor(nil, false)
	go func() {
		resp, err := c.Get("http://app/")
		if err != nil {
			result <- err.Error()
			return
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		result <- string(b)
	}()
	<-arrived
	h.stop()
	eventually(t, "new connections to be refused", func() bool {
		conn, err := net.Dial("tcp", h.http)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	close(release)
	if got := <-result; got != "finished" {
		t.Errorf("%q", got)
	}
}

func TestDrainCutsWhatDoesNotEnd(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.Drain = 50 * time.Millisecond }, everything())
	h.backends.set("app", app(t, echo))
	c := h.websocket(t, "ws://app/")
	if err := c.WriteMessage(websocket.TextMessage, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ReadMessage(); err != nil {
		t.Fatal(err)
	}
	h.stop()
	if _, _, err := c.ReadMessage(); err == nil {
		t.Error("the connection outlived the server")
	}
}

// TestAListenerThatFailsEndsTheServer: whoever runs it has to know.
func TestAListenerThatFailsEndsTheServer(t *testing.T) {
	client := fake.NewClientset()
	factory := informers.NewSharedInformerFactory(client, 0)
	l := listen(t)
	s, err := New(Config{
		Client: client, Informers: factory, Backends: newFakeBackends(), ListenHTTP: l,
		StatusAddresses: func() []netip.Addr { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	factory.Start(ctx.Done())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	<-s.Ready()
	l.Close()
	if err := <-done; err == nil {
		t.Error("Run returned without an error")
	}
	cancel()
	factory.Shutdown()
}

func TestEndBeforeReady(t *testing.T) {
	client := fake.NewClientset()
	factory := informers.NewSharedInformerFactory(client, 0) // never started
	l := listen(t)
	s, err := New(Config{Client: client, Informers: factory, Backends: newFakeBackends(), ListenHTTP: l})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("the listener is still open")
	}
}
