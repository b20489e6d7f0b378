// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// connectionBound is how many clients fit beside everything else in this process when it may open
// that many files: a client and its backend take a descriptor each, and half of all are left to the
// store, the runtime and watches, which fail when there is none.
func connectionBound(files uint64) int { return int(max(1, min(20_000, files/4))) }

// openFiles is RLIMIT_NOFILE, whose soft value Go raises to the hard one at start.
func openFiles() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 // cannot fail for a known resource; this is every system's least default
	}
	return limit.Cur
}

// clientListener bounds what clients can take: as many connections at once as slots has room for (the
// next wait, the kernel's queue behind them), and each write has an end, whichever protocol writes: a
// client that does not read loses its connection.
type clientListener struct {
	net.Listener
	stall  time.Duration
	slots  chan struct{} // one a connection; shared by the listeners of a server
	open   prometheus.Gauge
	closed chan struct{}
	close  func() error
}

func newClientListener(l net.Listener, stall time.Duration, slots chan struct{}, open prometheus.Gauge) *clientListener {
	c := &clientListener{Listener: l, stall: stall, slots: slots, open: open, closed: make(chan struct{})}
	c.close = sync.OnceValue(func() error {
		close(c.closed)
		return l.Close()
	})
	return c
}

func (l *clientListener) Close() error { return l.close() }

func (l *clientListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		c.Close()
		return nil, net.ErrClosed
	}
	l.open.Inc()
	return &clientConn{Conn: c, stall: l.stall, leave: sync.OnceFunc(func() {
		l.open.Dec()
		<-l.slots
	})}, nil
}

type clientConn struct {
	net.Conn
	stall time.Duration
	until atomic.Int64 // the write deadline in unix nanoseconds
	owned atomic.Bool  // the caller set a deadline of its own
	leave func()       // gives the slot back, once
}

func (c *clientConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

func (c *clientConn) Write(p []byte) (int, error) {
	if c.owned.Load() {
		return c.Conn.Write(p)
	}
	now := time.Now()
	// Timers are not free: a deadline that is at most an eighth short stays as it is.
	if left := time.Duration(c.until.Load() - now.UnixNano()); left < c.stall-c.stall/8 {
		at := now.Add(c.stall)
		c.until.Store(at.UnixNano())
		_ = c.Conn.SetWriteDeadline(at) // fails only on a closed connection, as Write does
	}
	return c.Conn.Write(p)
}

// SetWriteDeadline gives way to the caller (crypto/tls allows its last alert five seconds) until it
// is set to zero.
func (c *clientConn) SetWriteDeadline(t time.Time) error {
	c.owned.Store(!t.IsZero())
	c.until.Store(0)
	return c.Conn.SetWriteDeadline(t)
}

func (c *clientConn) SetDeadline(t time.Time) error {
	c.owned.Store(!t.IsZero())
	c.until.Store(0)
	return c.Conn.SetDeadline(t)
}

// CloseWrite passes an end of stream on.
func (c *clientConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return net.ErrClosed
}

// serverLog takes what net/http has to say. Nearly all of it is what clients do to themselves
// (broken handshakes, resets), so it is for debugging.
type serverLog struct{ log *slog.Logger }

func (s serverLog) Write(p []byte) (int, error) {
	s.log.Debug("http server", "message", strings.TrimSpace(string(p)))
	return len(p), nil
}
