// SPDX-License-Identifier: Apache-2.0

// Command web is the example application: a small web server that says which pod answered, on
// which node, and whom it takes the client to be.
//
// It is configured by its environment; `web --help` says how.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

const usage = `web: a small web server that says which pod answered

  /         the page (plain text, or HTML for browsers)
  /healthz  readiness: fails while draining     /livez  liveness     /ws  WebSocket echo

Environment
  POD_NAME, NODE_NAME, POD_IP   what to say about itself (downward API)
  GREETING                      the first line; GREETING_FILE names a file that is read for each page
  LISTEN                        address to listen on (":8080")
  DRAIN_DELAY                   how long to go on after SIGTERM while failing readiness ("3s")
`

//go:embed page.html
var pageHTML string

// server answers requests; draining makes its readiness probe fail.
type server struct {
	pod, node, podIP string
	greetingFile     string
	greeting         string
	page             *template.Template
	served           atomic.Int64
	draining         atomic.Bool

	mu      sync.Mutex
	sockets map[*websocket.Conn]struct{}
	closed  bool // no socket is taken any more
}

// facts are what one reply tells.
type facts struct {
	Greeting, Pod, PodIP, Node    string
	Client, ForwardedFor          string
	Host, Scheme, Path, RequestID string
	Served                        int64
}

func newServer(getenv func(string) string) *server {
	s := &server{
		pod: getenv("POD_NAME"), node: getenv("NODE_NAME"), podIP: getenv("POD_IP"),
		greeting: getenv("GREETING"), greetingFile: getenv("GREETING_FILE"),
		page:    template.Must(template.New("page").Parse(pageHTML)), // embedded, so checked by every test
		sockets: map[*websocket.Conn]struct{}{},
	}
	if s.pod == "" {
		s.pod, _ = os.Hostname() // an empty name is only less to read
	}
	if s.greeting == "" {
		s.greeting = "Hello from skep!"
	}
	return s
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", s.hello)
	mux.HandleFunc("/healthz", s.ready)
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/ws", s.echo)
	return mux
}

func (s *server) facts(r *http.Request) facts {
	client, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		client = r.RemoteAddr
	}
	scheme := r.Header.Get("X-Forwarded-Proto")
	if scheme == "" {
		scheme = "http"
	}
	greeting := s.greeting
	if s.greetingFile != "" {
		if b, err := os.ReadFile(s.greetingFile); err == nil {
			greeting = strings.TrimSpace(string(b))
		}
	}
	return facts{
		Greeting: greeting, Pod: s.pod, PodIP: s.podIP, Node: s.node,
		Client: client, ForwardedFor: r.Header.Get("X-Forwarded-For"), RequestID: r.Header.Get("X-Request-Id"),
		Host: r.Host, Scheme: scheme, Path: r.URL.Path, Served: s.served.Add(1),
	}
}

func (s *server) hello(w http.ResponseWriter, r *http.Request) {
	f := s.facts(r)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Vary", "Accept")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		if err := s.page.Execute(w, f); err != nil {
			slog.Warn("writing the page", "err", err)
		}
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "%s\n\n", f.Greeting)
	for _, line := range [][2]string{
		{"pod", f.Pod}, {"pod address", f.PodIP}, {"node", f.Node}, {"client", f.Client},
		{"forwarded for", f.ForwardedFor}, {"host", f.Host}, {"scheme", f.Scheme}, {"path", f.Path}, {"request id", f.RequestID},
	} {
		if line[1] != "" {
			fmt.Fprintf(w, "%-14s %s\n", line[0]+":", line[1])
		}
	}
	fmt.Fprintf(w, "%-14s %d\n", "requests:", f.Served)
}

func (s *server) ready(w http.ResponseWriter, _ *http.Request) {
	if s.draining.Load() {
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

// echo sends every WebSocket message back.
func (s *server) echo(w http.ResponseWriter, r *http.Request) {
	up := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }} // an echo has no secrets
	c, err := up.Upgrade(w, r, nil)
	if err != nil {
		return // Upgrade has answered
	}
	defer c.Close()
	s.mu.Lock()
	s.sockets[c] = struct{}{}
	if s.closed {
		bye(c)
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.sockets, c)
		s.mu.Unlock()
	}()
	c.SetReadLimit(1 << 20)
	for {
		kind, message, err := c.ReadMessage()
		if err != nil {
			return
		}
		if err := c.WriteMessage(kind, message); err != nil {
			return
		}
	}
}

// closeSockets tells WebSocket clients to reconnect elsewhere.
func (s *server) closeSockets() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.sockets {
		bye(c)
	}
}

func bye(c *websocket.Conn) {
	message := websocket.FormatCloseMessage(websocket.CloseGoingAway, "the pod is ending")
	_ = c.WriteControl(websocket.CloseMessage, message, time.Now().Add(time.Second)) // it is closed either way
	c.Close()
}

// run serves until ctx ends, then fails readiness, keeps serving for delay so that everybody hears
// of it, and finishes what is under way.
func run(ctx context.Context, l net.Listener, s *server, delay time.Duration) error {
	srv := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	slog.Info("serving", "address", l.Addr().String(), "pod", s.pod, "node", s.node)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	s.draining.Store(true)
	slog.Info("draining", "delay", delay)
	wait := time.NewTimer(delay)
	defer wait.Stop()
	select {
	case err := <-failed:
		return err
	case <-wait.C:
	}
	bound, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s.closeSockets()
	err := srv.Shutdown(bound)
	if served := <-failed; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	slog.Info("done", "requests", s.served.Load())
	return err
}

func start() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	delay := 3 * time.Second
	if v := os.Getenv("DRAIN_DELAY"); v != "" {
		var err error
		if delay, err = time.ParseDuration(v); err != nil {
			return fmt.Errorf("DRAIN_DELAY: %w", err)
		}
	}
	address := os.Getenv("LISTEN")
	if address == "" {
		address = ":8080"
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return run(ctx, l, newServer(os.Getenv), delay)
}

func main() {
	if len(os.Args) > 1 {
		fmt.Print(usage)
		if os.Args[1] != "--help" && os.Args[1] != "-h" {
			os.Exit(2)
		}
		return
	}
	if err := start(); err != nil {
		slog.Error("web", "err", err)
		os.Exit(1)
	}
}
