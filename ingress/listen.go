// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"container/list"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

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

// room is what a server's listeners have for clients together: as many connections at once as it has slots. When it is
// full, kept connections without a request make room, the longest idle first, as nginx has it; when all are busy, the
// next client waits, the kernel's queue behind it.
type room struct {
	slots   chan struct{} // one a connection
	metrics *metrics

	mu      sync.Mutex
	idle    list.List // of *clientConn, the longest idle in front
	waiting int       // clients that found neither a slot nor an idle connection
}

func newRoom(connections int, m *metrics) *room {
	return &room{slots: make(chan struct{}, connections), metrics: m}
}

// enter waits for a slot; false means that closed was closed.
func (r *room) enter(closed <-chan struct{}) bool {
	for {
		select {
		case r.slots <- struct{}{}:
			return true
		default:
		}
		longest := r.longestIdle()
		if longest == nil {
			break
		}
		r.evict(longest) // another listener may take its slot: then the next one goes
	}
	defer func() {
		r.mu.Lock()
		r.waiting--
		r.mu.Unlock()
	}()
	select {
	case r.slots <- struct{}{}:
		return true
	case <-closed:
		return false
	}
}

// longestIdle takes a connection from the list. Where there is none, the caller waits: who becomes idle makes room.
func (r *room) longestIdle() *clientConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.idle.Front()
	if e == nil {
		r.waiting++
		return nil
	}
	c := e.Value.(*clientConn)
	r.leaveIdle(c)
	return c
}

func (r *room) evict(c *clientConn) {
	r.metrics.evicted.Inc()
	_ = c.Close() // what a client lost that was just sending, it may send again (RFC 9112, 9.3.1)
}

// state is a server's ConnState.
func (r *room) state(conn net.Conn, state http.ConnState) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	c := conn.(*clientConn)
	r.mu.Lock()
	r.leaveIdle(c)
	evict := state == http.StateIdle && r.waiting > 0
	if state == http.StateIdle && !evict {
		c.idle = r.idle.PushBack(c)
		r.metrics.idle.Inc()
	}
	r.mu.Unlock()
	if evict {
		r.evict(c)
	}
}

// leaveIdle is called with mu held.
func (r *room) leaveIdle(c *clientConn) {
	if c.idle != nil {
		r.idle.Remove(c.idle)
		c.idle = nil
		r.metrics.idle.Dec()
	}
}

// clientListener lets clients in as there is room, and each write has an end, whichever protocol writes: a client that
// does not read loses its connection.
type clientListener struct {
	net.Listener
	stall  time.Duration
	room   *room // shared by the listeners of a server
	closed chan struct{}
	close  func() error
}

func newClientListener(l net.Listener, stall time.Duration, room *room) *clientListener {
	c := &clientListener{Listener: l, stall: stall, room: room, closed: make(chan struct{})}
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
	if !l.room.enter(l.closed) {
		c.Close()
		return nil, net.ErrClosed
	}
	open := l.room.metrics.connections
	open.Inc()
	return &clientConn{Conn: c, stall: l.stall, leave: sync.OnceFunc(func() {
		open.Dec()
		<-l.room.slots
	})}, nil
}

type clientConn struct {
	net.Conn
	stall time.Duration
	until atomic.Int64  // the write deadline in unix nanoseconds
	owned atomic.Bool   // the caller set a deadline of its own
	leave func()        // gives the slot back, once
	idle  *list.Element // in the room's list; guarded by its mu
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
