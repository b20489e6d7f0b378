// SPDX-License-Identifier: Apache-2.0

// Package inprocess is an HTTP transport that calls a handler of the same process.
package inprocess

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
)

// Transport calls a handler: no socket, no TLS, no parsing, and one goroutine for a watch where a
// connection takes four. The handler sees HTTP/2, which is how Kubernetes' filters tell a response
// that can be flushed but not hijacked.
type Transport struct {
	handler atomic.Pointer[http.Handler]
	log     *slog.Logger
}

// bodyLimit is how many bytes of a response may wait for a reader that is slower than the handler.
// A larger response waits for its reader, as it would in a socket.
const bodyLimit = 256 << 10

// New returns a transport that refuses every request until Serve. Panics of handlers go to log.
func New(log *slog.Logger) *Transport { return &Transport{log: log} }

// Serve sets the handler; nil refuses every request.
func (t *Transport) Serve(h http.Handler) {
	if h == nil {
		t.handler.Store(nil)
		return
	}
	t.handler.Store(&h)
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	h := t.handler.Load()
	if h == nil {
		// What a client gets from a port that nobody listens on, so that it tries again.
		closeBody(req.Body)
		return nil, &net.OpError{Op: "dial", Net: "in-process", Err: syscall.ECONNREFUSED}
	}
	// The caller's context carries its own request's user and deadlines when a handler calls the
	// API. Only its end may cross, as over a wire.
	ctx, cancel := context.WithCancel(context.Background())
	w := &responseWriter{header: http.Header{}, body: newBody(cancel), ready: make(chan struct{})}
	stop := context.AfterFunc(req.Context(), func() {
		cancel()
		w.body.abort(req.Context().Err())
	})

	in := &http.Request{
		Method: req.Method, URL: requestURL(req), Host: req.Host, Header: req.Header.Clone(),
		Proto: "HTTP/2.0", ProtoMajor: 2, ProtoMinor: 0,
		Body: req.Body, ContentLength: req.ContentLength,
		RemoteAddr: "127.0.0.1:0", RequestURI: req.URL.RequestURI(),
	}
	if in.Host == "" {
		in.Host = req.URL.Host
	}
	if in.Header == nil {
		in.Header = http.Header{}
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	go func() {
		defer stop()
		defer cancel()
		defer closeBody(req.Body)
		w.finish(t.call(*h, w, in.WithContext(ctx)))
	}()

	select {
	case <-w.ready:
		return w.response(req), nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

// call runs the handler and turns a panic into an error, as net/http's server does.
func (t *Transport) call(h http.Handler, w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		err = io.ErrUnexpectedEOF
		if cause, ok := p.(error); !ok || !errors.Is(cause, http.ErrAbortHandler) {
			t.log.Error("panic in API handler", "method", r.Method, "path", r.URL.Path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	h.ServeHTTP(w, r)
	return nil
}

// responseWriter is the handler's side of a request.
type responseWriter struct {
	header http.Header
	body   *body
	ready  chan struct{} // closed once status and sent are set
	once   sync.Once
	status int
	sent   http.Header
	failed error // the handler ended before it answered
}

func (w *responseWriter) Header() http.Header { return w.header }

func (w *responseWriter) WriteHeader(status int) {
	if status >= 100 && status < 200 { // informational: the answer is still to come
		return
	}
	w.once.Do(func() {
		w.status, w.sent = status, w.header.Clone()
		close(w.ready)
	})
}

func (w *responseWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.write(p)
}

// Flush implements http.Flusher: what is written is readable at once, so only the header is left.
func (w *responseWriter) Flush() { w.WriteHeader(http.StatusOK) }

// CloseNotify implements http.CloseNotifier, by which upstream recognises a real server's writer.
// It never fires: the request's context says the same.
func (w *responseWriter) CloseNotify() <-chan bool { return nil }

func (w *responseWriter) finish(err error) {
	w.once.Do(func() {
		w.failed = err
		w.status, w.sent = http.StatusOK, w.header.Clone()
		close(w.ready)
	})
	w.body.finish(err)
}

func (w *responseWriter) response(req *http.Request) *http.Response {
	status := w.status
	if w.failed != nil {
		// The caller learns of it when it reads the body; a status must not say that all is well.
		status = http.StatusInternalServerError
	}
	return &http.Response{
		Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), StatusCode: status,
		Proto: "HTTP/2.0", ProtoMajor: 2,
		Header: w.sent, Body: w.body, ContentLength: -1, Request: req,
	}
}

// body carries the response from the handler to its reader.
type body struct {
	mu     sync.Mutex
	change sync.Cond
	buf    bytes.Buffer
	err    error // what a reader gets after buf
	closed bool  // nobody reads any more
	cancel context.CancelFunc
}

func newBody(cancel context.CancelFunc) *body {
	b := &body{cancel: cancel}
	b.change.L = &b.mu
	return b
}

var errReaderGone = errors.New("client closed the response")

func (b *body) write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.buf.Len() >= bodyLimit && !b.closed {
		b.change.Wait()
	}
	if b.closed {
		return 0, errReaderGone
	}
	b.buf.Write(p)
	b.change.Broadcast()
	return len(p), nil
}

func (b *body) finish(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		err = io.EOF
	}
	if b.err == nil {
		b.err = err
	}
	b.change.Broadcast()
}

// abort ends the body because the caller's context did.
func (b *body) abort(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Reset()
	b.closed = true
	if b.err == nil {
		b.err = err
	}
	b.change.Broadcast()
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.buf.Len() == 0 && b.err == nil && !b.closed {
		b.change.Wait()
	}
	switch {
	case b.closed && b.err == nil:
		return 0, http.ErrBodyReadAfterClose
	case b.buf.Len() > 0:
		n, err := b.buf.Read(p)
		if b.buf.Len() == 0 && b.buf.Cap() > 16<<10 {
			b.buf = bytes.Buffer{} // a watch keeps its body for hours: drop what a burst needed
		}
		b.change.Broadcast()
		return n, err
	}
	return 0, b.err
}

// Close implements io.Closer and ends the handler's request.
func (b *body) Close() error {
	b.mu.Lock()
	b.closed = true
	b.buf = bytes.Buffer{}
	b.change.Broadcast()
	b.mu.Unlock()
	b.cancel()
	return nil
}

// requestURL is the URL as a server sees it: without scheme and host.
func requestURL(req *http.Request) *url.URL {
	u := *req.URL
	u.Scheme, u.Host, u.User, u.Fragment = "", "", nil, ""
	return &u
}

func closeBody(c io.Closer) {
	if c != nil {
		_ = c.Close() // the transport owes the caller a close; nobody is left to tell of its error
	}
}
