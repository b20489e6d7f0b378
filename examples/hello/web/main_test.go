// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// serve runs the server on loopback and returns its address, itself, how to end it and its result.
func serve(t *testing.T, env map[string]string, delay time.Duration) (string, *server, context.CancelFunc, chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(func(name string) string { return env[name] })
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	done := make(chan error, 1)
	go func() { done <- run(ctx, l, s, delay) }()
	return l.Addr().String(), s, cancel, done
}

func fetch(t *testing.T, url string, header http.Header) (int, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestPages(t *testing.T) {
	greeting := filepath.Join(t.TempDir(), "greeting")
	if err := os.WriteFile(greeting, []byte("Good morning <you>\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	addr, _, _, _ := serve(t, map[string]string{"POD_NAME": "hello-1", "NODE_NAME": "n1", "POD_IP": "10.42.0.9", "GREETING_FILE": greeting}, 0)
	code, text := fetch(t, "http://"+addr+"/x", http.Header{"X-Forwarded-For": {"192.0.2.9"}})
	for _, want := range []string{"Good morning <you>", "hello-1", "n1", "10.42.0.9", "127.0.0.1", "192.0.2.9", addr, "/x"} {
		if code != 200 || !strings.Contains(text, want) {
			t.Errorf("plain page (%d) lacks %q:\n%s", code, want, text)
		}
	}
	_, html := fetch(t, "http://"+addr+"/", http.Header{"Accept": {"text/html,*/*"}})
	for _, want := range []string{"<h1>Good morning &lt;you&gt;</h1>", "hello-1", "<!doctype html>"} {
		if !strings.Contains(html, want) {
			t.Errorf("page lacks %q:\n%s", want, html)
		}
	}
	// The file is a mounted ConfigMap: a change shows at once.
	if err := os.WriteFile(greeting, []byte("Good night"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, text := fetch(t, "http://"+addr+"/", nil); !strings.HasPrefix(text, "Good night\n") {
		t.Errorf("old greeting:\n%s", text)
	}
}

func TestEchoAndDrain(t *testing.T) {
	addr, s, cancel, done := serve(t, nil, time.Hour)
	c, _, err := websocket.DefaultDialer.Dial("ws://"+addr+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.WriteMessage(websocket.TextMessage, []byte("hi")); err != nil {
		t.Fatal(err)
	}
	if _, b, err := c.ReadMessage(); err != nil || string(b) != "hi" {
		t.Fatalf("echo: %q, %v", b, err)
	}
	if code, _ := fetch(t, "http://"+addr+"/healthz", nil); code != 200 {
		t.Fatalf("healthz before: %d", code)
	}
	cancel()
	for !s.draining.Load() {
		time.Sleep(time.Millisecond)
	}
	if code, _ := fetch(t, "http://"+addr+"/healthz", nil); code != http.StatusServiceUnavailable {
		t.Fatalf("healthz while draining: %d", code)
	}
	if code, _ := fetch(t, "http://"+addr+"/", nil); code != 200 {
		t.Fatalf("requests still have to be served while draining: %d", code)
	}
	select {
	case err := <-done:
		t.Fatalf("ended before its delay: %v", err)
	default:
	}
}

func TestShutdownEndsSockets(t *testing.T) {
	addr, _, cancel, done := serve(t, nil, 0)
	c, _, err := websocket.DefaultDialer.Dial("ws://"+addr+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseGoingAway) {
		t.Fatalf("the client was not told: %v", err)
	}
}
