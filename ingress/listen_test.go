// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/gorilla/websocket"
)

// client is one connection of a person who asks one thing after the other.
type client struct {
	t *testing.T
	net.Conn
	replies *bufio.Reader
}

func (h *harness) connect(t *testing.T, secure bool) *client {
	t.Helper()
	address := h.http
	if secure {
		address = h.https
	}
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if secure {
		c = tls.Client(c, insecure()) // shakes hands with the first request
	}
	return &client{t: t, Conn: c, replies: bufio.NewReader(c)}
}

func (c *client) ask(path string) {
	c.t.Helper()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: app\r\n\r\n", path); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) answered() {
	c.t.Helper()
	resp, err := http.ReadResponse(c.replies, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
		c.t.Fatal(resp.Status, err)
	}
}

// TestBusyConnectionsAreBounded: while every connection is busy the next client waits, whatever the first one speaks;
// when it is not busy any more, the next has its place.
func TestBusyConnectionsAreBounded(t *testing.T) {
	for name, secure := range map[string]bool{"http": false, "https": true, "ws": false, "wss": true} {
		t.Run(name, func(t *testing.T) {
			h := start(t, func(c *Config) { c.Limits.Connections = 1 }, everything())
			busy, release, second := make(chan struct{}), make(chan struct{}), make(chan struct{})
			h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/busy":
					close(busy)
					<-release
				case "/ws":
					echo(w, r)
				case "/second":
					close(second)
				}
			}))
			var more func() // shows that the first is served
			var finish func()
			if name == "http" || name == "https" {
				first := h.connect(t, secure)
				first.ask("/busy")
				<-busy
				more, finish = func() {}, func() { close(release); first.answered() }
			} else {
				first := h.websocket(t, name+"://app/ws")
				more = func() {
					if err := first.WriteMessage(websocket.TextMessage, []byte("more")); err != nil {
						t.Fatal(err)
					}
					if _, _, err := first.ReadMessage(); err != nil {
						t.Fatal(err)
					}
				}
				finish = func() { first.Close() }
			}
			next := h.connect(t, secure)
			asked := make(chan struct{})
			go func() { // with TLS the client waits for the server's hello
				defer close(asked)
				fmt.Fprint(next, "GET /second HTTP/1.1\r\nHost: app\r\n\r\n")
			}()
			for range 50 { // time enough for the second, if anything served it
				more()
				if open := gauge(t, h, "skep_ingress_connections"); open != 1 {
					t.Fatalf("%v connections are open, want 1", open)
				}
			}
			select {
			case <-second:
				t.Fatal("the second was served beside the first")
			default:
			}
			finish()
			<-asked
			next.answered()
			<-second
			h.connect(t, secure) // waits until the server ends, which it must not hold up
		})
	}
}

// TestKeptConnectionsMakeRoom: who only keeps a connection does not keep others out, and who has kept it longest goes first.
func TestKeptConnectionsMakeRoom(t *testing.T) {
	for name, secure := range map[string]bool{"http": false, "https": true} {
		t.Run(name, func(t *testing.T) {
			h := start(t, func(c *Config) { c.Limits.Connections = 2 }, everything())
			h.backends.set("app", app(t, named("app")))
			one, two := h.connect(t, secure), h.connect(t, secure)
			rest := func(c *client, resting float64) {
				c.ask("/")
				c.answered()
				eventually(t, "the connection to rest", func() bool { return gauge(t, h, "skep_ingress_connections_idle") == resting })
			}
			rest(one, 1)
			rest(two, 2)
			rest(one, 2) // so two rests longest
			three := h.connect(t, secure)
			three.ask("/")
			three.answered()
			if _, err := two.replies.ReadByte(); err == nil {
				t.Error("the connection that was kept longest sends something, want its end")
			}
			one.ask("/")
			one.answered()
		})
	}
}
