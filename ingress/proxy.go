// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
)

// Backends says where the ready pods of a Service are.
type Backends interface {
	// Lookup returns the addresses that serve a Service's port now, and whether the Service and
	// port exist. It is called for every request and must not block. The slice must never change
	// after it was returned.
	Lookup(namespace, service string, port networkingv1.ServiceBackendPort) ([]netip.AddrPort, bool)
	// Subscribe returns a channel that receives after changes, and a function that ends it.
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Limits bound what one client or backend can take from the proxy. Zero values take the defaults.
type Limits struct {
	ReadHeader  time.Duration // to receive a request's head; 10 s
	ClientIdle  time.Duration // a kept client connection without a request; 75 s
	ClientStall time.Duration // between two reads or writes of a body; 60 s
	Connect     time.Duration // to a backend; 5 s
	Response    time.Duration // to a reply's head, and between two reads of its body; 60 s
	Tunnel      time.Duration // an upgraded connection without a byte; 1 h
	Drain       time.Duration // for requests under way when the server ends; 10 s
	HeaderBytes int           // of a request or a reply; 64 KiB
	BodyBytes   int64         // of a request; 1 GiB
	IdleConns   int           // kept connections to one backend; 256
	Connections int           // of clients at once; 20,000, fewer where descriptors are scarce
}

func (l Limits) withDefaults() Limits {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&l.ReadHeader, 10*time.Second)
	set(&l.ClientIdle, 75*time.Second)
	set(&l.ClientStall, time.Minute)
	set(&l.Connect, 5*time.Second)
	set(&l.Response, time.Minute)
	set(&l.Tunnel, time.Hour)
	set(&l.Drain, 10*time.Second)
	if l.HeaderBytes == 0 {
		l.HeaderBytes = 64 << 10
	}
	if l.BodyBytes == 0 {
		l.BodyBytes = 1 << 30
	}
	if l.IdleConns == 0 {
		l.IdleConns = 256
	}
	if l.Connections == 0 {
		l.Connections = connectionBound(openFiles())
	}
	return l
}

// proxy is the request path. What it reads for each request is in state, which is swapped whole.
type proxy struct {
	state     atomic.Pointer[state]
	connector *connector
	backends  Backends
	limits    Limits
	trusted   []netip.Prefix
	httpsPort uint16
	metrics   *metrics
	access    *slog.Logger
	tunnels   tunnels
}

// state is a table with what belongs to its routes at run time.
type state struct {
	table  *Table
	routes []routeState // by Route.ID
}

type routeState struct {
	upstream *upstream
	counters *requestCounters
}

// install makes a table the current one. Requests under way keep the one they started with.
func (p *proxy) install(t *Table) {
	known := map[BackendRef]*upstream{}
	if old := p.state.Load(); old != nil {
		for _, r := range old.routes {
			known[r.upstream.ref] = r.upstream
		}
	}
	next := &state{table: t, routes: make([]routeState, len(t.Routes))}
	for i, r := range t.Routes {
		up := known[r.Backend]
		if up == nil {
			up = &upstream{ref: r.Backend}
			known[r.Backend] = up
		}
		next.routes[i] = routeState{upstream: up, counters: p.metrics.route(r.Ingress.String())}
	}
	p.state.Store(next)
	p.metrics.keep(t)
}

// prune drops what is kept about pods that no route leads to any more.
func (p *proxy) prune() {
	live := map[netip.AddrPort]bool{}
	for _, r := range p.state.Load().routes {
		if r.upstream.ref.Service == "" {
			continue
		}
		addrs, _ := p.backends.Lookup(r.upstream.ref.Namespace, r.upstream.ref.Service, r.upstream.ref.Port)
		for _, a := range addrs {
			live[a] = true
		}
	}
	p.connector.prune(live, time.Now())
}

// exchange is one request and its reply.
type exchange struct {
	p       *proxy
	w       http.ResponseWriter
	r       *http.Request
	rc      *http.ResponseController
	route   *Route
	runtime *routeState
	start   time.Time
	client  netip.Addr
	body    *bodySender
	status  int
	sent    int64
	backend netip.AddrPort
	last    bool  // no further backend will be tried
	why     error // what went wrong, for the access log
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	st := p.state.Load()
	x := &exchange{p: p, w: w, r: r, rc: http.NewResponseController(w), start: time.Now()}
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		x.client = ap.Addr().Unmap()
	}
	p.metrics.active.Inc()
	defer x.finish()

	if r.Method == http.MethodConnect || !validTarget(r.RequestURI) {
		x.page(http.StatusBadRequest)
		return
	}
	host := canonicalHost(r.Host)
	x.route = st.table.Match(host, r.URL.Path)
	if x.route == nil {
		x.page(http.StatusNotFound)
		return
	}
	x.runtime = &st.routes[x.route.ID]
	if x.route.Redirect && x.scheme() != "https" {
		x.redirect(host)
		return
	}
	limit := p.limits.BodyBytes
	if x.route.Options.MaxBody > 0 {
		limit = x.route.Options.MaxBody
	} else if x.route.Options.MaxBody < 0 {
		limit = math.MaxInt64
	}
	if r.ContentLength > limit {
		x.page(http.StatusRequestEntityTooLarge)
		return
	}
	if r.ContentLength != 0 && r.Body != nil && r.Body != http.NoBody {
		x.body = &bodySender{x: x, limit: limit, done: make(chan struct{})}
	}
	x.forward()
}

func (x *exchange) finish() {
	x.p.metrics.active.Dec()
	took := time.Since(x.start)
	var counters *requestCounters
	if x.runtime != nil {
		counters = x.runtime.counters
	}
	x.p.metrics.observe(counters, x.status, took)
	if x.p.access == nil {
		return
	}
	ingress, backend := "", ""
	if x.route != nil {
		ingress = x.route.Ingress.String()
	}
	if x.backend.IsValid() {
		backend = x.backend.String()
	}
	attrs := []slog.Attr{
		slog.String("client", x.client.String()), slog.String("method", x.r.Method), slog.String("host", x.r.Host),
		slog.String("target", x.r.RequestURI), slog.String("proto", x.r.Proto), slog.Int("status", x.status),
		slog.Int64("bytes", x.sent), slog.Duration("took", took), slog.String("ingress", ingress),
		slog.String("backend", backend),
	}
	if x.why != nil {
		attrs = append(attrs, slog.Any("err", x.why))
	}
	x.p.access.LogAttrs(context.Background(), slog.LevelInfo, "request", attrs...)
}

// maxAttempts bounds how many backends one request tries: connecting may fail while the data plane
// has not yet heard that a pod is gone.
const maxAttempts = 3

// forward finds a backend that takes the request and relays the reply. Another backend is tried
// only while nothing was taken from the client's body, and no backend can have acted on the request
// or it may act twice.
func (x *exchange) forward() {
	ctx := x.r.Context()
	var tried [maxAttempts]*backend
	var failed error
	fresh := false
	for attempt := 0; ; {
		b, err := x.runtime.upstream.pick(x.p.connector, x.p.backends, tried[:attempt])
		if err != nil {
			x.fail(cmpErr(failed, err))
			return
		}
		x.backend = b.addr
		b.outstanding.Add(1)
		conn, err := x.p.connector.take(ctx, b, fresh)
		if err != nil {
			b.outstanding.Add(-1)
			if ctx.Err() != nil {
				x.fail(ctx.Err())
				return
			}
			x.p.metrics.failures.WithLabelValues("connect").Inc()
			failed = err
			tried[attempt] = b
			if attempt++; attempt == maxAttempts {
				x.fail(err)
				return
			}
			continue
		}
		x.last = attempt+1 == maxAttempts
		again := x.exchangeOn(conn)
		b.outstanding.Add(-1)
		if !again {
			return
		}
		if conn.reused {
			fresh = true // the backend may be well, only its kept connections are not
			continue
		}
		x.p.metrics.failures.WithLabelValues("reply").Inc()
		failed = errSilent
		tried[attempt] = b
		attempt++
	}
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

var errSilent = errors.New("the backend closed the connection without a reply")

// exchangeOn sends the request on one connection and relays the reply. It returns true when nothing
// came back and the request can be sent again.
func (x *exchange) exchangeOn(u *upstreamConn) (again bool) {
	ctx := x.r.Context()
	// A client that goes away ends the backend's work too.
	stop := context.AfterFunc(ctx, func() { u.Close() })
	reusable := false
	defer func() {
		x.body.end(u, x.r.ProtoMajor)
		if stop() && reusable && x.body.complete() && u.br.Buffered() == 0 {
			x.p.connector.put(u)
			return
		}
		u.Close()
	}()

	timeout := x.p.limits.Response
	if t := x.route.Options.ReadTimeout; t > 0 {
		timeout = t
	}
	upgrade := x.writeHead(u.bw)
	if err := u.bw.Flush(); err != nil {
		if again = x.mayRepeat(u, err); !again {
			x.fail(cmpErr(ctx.Err(), err))
		}
		return again
	}
	if x.body != nil {
		// No deadline for the reply while the request is still being sent.
		u.clearRead()
		if x.r.ProtoMajor == 1 {
			_ = x.rc.EnableFullDuplex() // never fails on HTTP/1
		}
		x.body.started = true
		go x.body.run(u, timeout)
	} else {
		u.extendRead(time.Now(), timeout)
	}
	resp, silent, err := x.readReply(u)
	switch {
	case err != nil && silent && x.mayRepeat(u, err):
		return true
	case err != nil:
		if cause := cmpErr(x.body.failure(), ctx.Err()); cause != nil {
			err = cause
		} else {
			x.p.metrics.failures.WithLabelValues("reply").Inc()
		}
		x.fail(err)
	case resp.StatusCode == http.StatusSwitchingProtocols:
		if upgrade == "" {
			x.fail(errors.New("backend switched protocols without being asked"))
			return false
		}
		// From here on each side ends for itself: net/http would take a client that has said all it
		// has to say (half a close) for one that is gone.
		stop()
		x.tunnel(u, resp)
	default:
		reusable = x.relay(u, resp, timeout)
	}
	return false
}

// mayRepeat tells whether a request that failed without a byte of a reply can be sent again:
// doing the work twice would do no harm. Most often a kept connection was closed by the backend
// before the request came.
func (x *exchange) mayRepeat(u *upstreamConn, err error) bool {
	return (u.reused || !x.last) && x.body == nil && idempotent(x.r.Method) && x.r.Context().Err() == nil && !isTimeout(err)
}

// readReply reads up to the head of the final reply, and passes informational ones on. silent says
// that the backend sent nothing at all.
func (x *exchange) readReply(u *upstreamConn) (resp *http.Response, silent bool, err error) {
	for informational := range 8 {
		u.headLimit = int64(x.p.limits.HeaderBytes)
		resp, err = http.ReadResponse(u.br, x.r)
		silent = informational == 0 && u.headLimit == int64(x.p.limits.HeaderBytes)
		u.headLimit = math.MaxInt64
		if err != nil {
			return nil, silent, err
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, false, nil
		}
		x.inform(resp)
	}
	return nil, false, errors.New("backend sent too many informational replies")
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// relay passes a reply on. It returns whether the connection can take another request.
func (x *exchange) relay(u *upstreamConn, resp *http.Response, timeout time.Duration) bool {
	h := x.w.Header()
	copyReplyHeader(h, resp.Header)
	announced := len(resp.Trailer)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	if _, typed := h["Content-Type"]; !typed {
		h["Content-Type"] = nil // or net/http would guess
	}
	if x.body != nil && !x.body.eof.Load() && x.r.ProtoMajor == 1 {
		// What follows on this connection would be the rest of this body.
		h.Set("Connection", "close")
	}
	x.status = resp.StatusCode
	x.w.WriteHeader(resp.StatusCode)
	if announced > 0 || (u.br.Buffered() == 0 && resp.Body != http.NoBody) {
		// Trailers need a chunked reply, so it must not end up with a length; and a backend that
		// pauses after the head wants it seen.
		_ = x.rc.Flush()
	}

	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for {
		if u.br.Buffered() == 0 && (x.body == nil || x.body.eof.Load()) {
			u.extendRead(time.Now(), timeout)
		}
		n, err := resp.Body.Read(*buf)
		if n > 0 {
			x.sent += int64(n)
			if _, werr := x.w.Write((*buf)[:n]); werr != nil {
				x.why = werr
				panic(http.ErrAbortHandler) // ends the client's connection or stream
			}
			if err == nil && u.br.Buffered() == 0 {
				// The backend pauses: what it said so far is due now.
				_ = x.rc.Flush() // the next write reports a dead client
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			x.p.metrics.failures.WithLabelValues("body").Inc()
			x.why = err
			panic(http.ErrAbortHandler) // the client must not take half a reply for a whole one
		}
	}
	for name, values := range resp.Trailer {
		if announced != len(resp.Trailer) {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
	return !resp.Close
}
