// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// stallListener gives each connection a bound on how long one write may take, whichever protocol
// writes: a client that does not read loses its connection.
type stallListener struct {
	net.Listener
	stall time.Duration
}

func (l stallListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &stallConn{Conn: c, stall: l.stall}, nil
}

type stallConn struct {
	net.Conn
	stall time.Duration
	until atomic.Int64 // the write deadline in unix nanoseconds
	owned atomic.Bool  // the caller set a deadline of its own
}

func (c *stallConn) Write(p []byte) (int, error) {
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
func (c *stallConn) SetWriteDeadline(t time.Time) error {
	c.owned.Store(!t.IsZero())
	c.until.Store(0)
	return c.Conn.SetWriteDeadline(t)
}

func (c *stallConn) SetDeadline(t time.Time) error {
	c.owned.Store(!t.IsZero())
	c.until.Store(0)
	return c.Conn.SetDeadline(t)
}

// CloseWrite passes an end of stream on.
func (c *stallConn) CloseWrite() error {
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
