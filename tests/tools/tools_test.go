// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func TestUntil(t *testing.T) {
	tries := 0
	try := func(context.Context) (string, error) {
		if tries++; tries < 3 {
			return "not yet", errors.New("refused")
		}
		return "first\nready now", nil
	}
	if err := until("first.*ready", time.Minute, try); err != nil || tries != 3 {
		t.Errorf("%d tries, %v", tries, err)
	}
	if err := until("refused", time.Minute, func(context.Context) (string, error) { return "", errors.New("connection refused") }); err != nil {
		t.Errorf("an error is an outcome, too: %v", err)
	}
	if err := until("never", time.Millisecond, try); err == nil {
		t.Error("what never comes is no error")
	}
	if err := until("(", time.Second, try); err == nil {
		t.Error("a bad pattern is no error")
	}
	if err := until("", time.Second, func(context.Context) (string, error) { return "", errors.New("no") }); err == nil {
		t.Error("without a pattern the one try's error is lost")
	}
}

// A socket tells where it leads, whatever becomes of the connection that its owner has.
func TestSocketPeer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	var s socket
	conn, err := (&net.Dialer{Control: s.hold}).Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if got := s.peer(); got != "127.0.0.1" {
		t.Errorf("leads to %q", got)
	}
	s.release()
	for text, want := range map[string]string{
		"0100007F": "127.0.0.1", "B80D0120000000000000000001000000": "2001:db8::1", "0000000000000000FFFF00000A2A0001": "1.0.42.10",
		"00000000": "", "01": "", "zz": "",
	} {
		if got := wordsAddress(text); got != want {
			t.Errorf("%s is %q, want %q", text, got, want)
		}
	}
}

func TestHTTP(t *testing.T) {
	var upgrader websocket.Upgrader
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ws" {
			conn, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				return
			}
			defer conn.Close()
			kind, message, err := conn.ReadMessage()
			if err == nil {
				_ = conn.WriteMessage(kind, append([]byte(r.Host+" "), message...))
			}
			return
		}
		w.Header().Set("X-Host", r.Host)
		w.WriteHeader(http.StatusTeapot)
		_, _ = w.Write([]byte(r.Header.Get("X-Question")))
	}))
	defer server.Close()
	for _, args := range [][]string{
		{"-until", "418 I'm a teapot.*X-Host: tea.test.*milk", "-host", "tea.test", "-H", "X-Question: milk", server.URL},
		{"-until", "websocket: tea.test hello", "-host", "tea.test", "-ws", "hello", strings.Replace(server.URL, "https", "wss", 1) + "/ws"},
	} {
		if err := httpMain(append([]string{"-limit", "10s"}, args...)); err != nil {
			t.Errorf("http %q: %v", args, err)
		}
	}
	for _, args := range [][]string{{}, {"-H", "no colon", server.URL}, {"-ca", "/nonexistent", server.URL}} {
		if err := httpMain(args); err == nil {
			t.Errorf("http %q is no error", args)
		}
	}
}

// TestLoad has a server that breaks one connection: the judge must count exactly the kept one.
func TestLoad(t *testing.T) {
	for _, c := range []struct {
		name   string
		breaks bool
		kept   bool
		failed bool
	}{{"whole", false, true, false}, {"broken", true, true, true}, {"new ones fail, too", true, false, true}} {
		t.Run(c.name, func(t *testing.T) {
			var requests atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if requests.Add(1) == 3 && c.breaks {
					panic(http.ErrAbortHandler)
				}
			}))
			defer server.Close()
			ctx, cancel := context.WithCancel(t.Context())
			l := &load{url: server.URL, pause: time.Millisecond}
			done := make(chan struct{})
			go func() {
				defer close(done)
				l.client(ctx, c.kept, func() {})
			}()
			for requests.Load() < 4 {
				select {
				case <-done: // a kept client ends with its connection
				case <-time.After(time.Millisecond):
					continue
				}
				break
			}
			cancel()
			<-done
			if failed := l.report.Failed > 0; failed != c.failed || l.report.Requests < 2 {
				t.Errorf("report %+v", l.report)
			}
		})
	}
}

func TestConnect(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	address := server.Listener.Addr().(*net.TCPAddr)
	buffer := make([]byte, 4096)
	if err := once(address, buffer); err != nil {
		t.Error(err)
	}
	server.Close()
	if err := once(address, buffer); err == nil {
		t.Error("a closed port answers")
	}
}
