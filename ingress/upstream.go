// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"context"
	"errors"

	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// errNoEndpoints says that a Service has no ready pod, or does not exist.
var errNoEndpoints = errors.New("no ready endpoints")

// connector opens connections to backends and keeps idle ones for the next request.
type connector struct {
	dial        func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)
	maxIdle     int           // a backend
	idleTimeout time.Duration // after which a kept connection is closed

	mu       sync.Mutex
	backends map[netip.AddrPort]*backend
	closed   bool
}

// backend is one pod address. It outlives tables, so that what is known about it does too.
type backend struct {
	addr        netip.AddrPort
	outstanding atomic.Int32
	avoidUntil  atomic.Int64 // unix nanoseconds; a connection attempt failed lately

	mu   sync.Mutex
	idle []*upstreamConn // oldest first
	gone bool            // no route leads here any more
}

// upstreamConn is one connection to a backend.
type upstreamConn struct {
	net.Conn
	raw       syscall.RawConn
	backend   *backend
	br        *bufio.Reader
	bw        *bufio.Writer
	headLimit int64 // bytes that may still be read; a reply's head is bounded
	reused    bool
	idleSince time.Time
	deadline  atomic.Int64 // the read deadline in unix nanoseconds, 0 for none
}

// extendRead moves the read deadline to about timeout from now. Timers are not free: a deadline
// that is at most an eighth short stays as it is.
func (u *upstreamConn) extendRead(now time.Time, timeout time.Duration) {
	left := time.Duration(u.deadline.Load() - now.UnixNano())
	if left <= timeout && left >= timeout-timeout/8 {
		return
	}
	at := now.Add(timeout)
	u.deadline.Store(at.UnixNano())
	_ = u.Conn.SetReadDeadline(at) // fails only on a closed connection, which Read reports
}

func (u *upstreamConn) clearRead() {
	if u.deadline.Swap(0) != 0 {
		_ = u.Conn.SetReadDeadline(time.Time{})
	}
}

var errHeadTooLarge = errors.New("the reply's head is too large")

func (u *upstreamConn) Read(p []byte) (int, error) {
	if u.headLimit <= 0 {
		return 0, errHeadTooLarge
	}
	if int64(len(p)) > u.headLimit {
		p = p[:u.headLimit]
	}
	n, err := u.Conn.Read(p)
	if u.headLimit != math.MaxInt64 {
		u.headLimit -= int64(n)
	}
	return n, err
}

// alive tells whether an idle connection can still be used: the peer has neither closed it nor
// sent anything unasked. It costs one system call and saves a failed request.
func (u *upstreamConn) alive() bool {
	if u.br.Buffered() > 0 {
		return false
	}
	if u.raw == nil {
		return true // not a socket: a test's pipe
	}
	quiet := false
	// Control rather than Read: a read deadline that passed while the connection lay idle is no
	// sign of death.
	err := u.raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, errno := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = errno == syscall.EAGAIN || errno == syscall.EWOULDBLOCK
	})
	return err == nil && quiet
}

func (c *connector) backend(addr netip.AddrPort) *backend {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.backends[addr]
	if b == nil {
		b = &backend{addr: addr, gone: c.closed}
		c.backends[addr] = b
	}
	return b
}

// take returns an idle connection to b, or opens one.
func (c *connector) take(ctx context.Context, b *backend, fresh bool) (*upstreamConn, error) {
	for !fresh {
		b.mu.Lock()
		n := len(b.idle)
		if n == 0 {
			b.mu.Unlock()
			break
		}
		u := b.idle[n-1]
		b.idle[n-1] = nil
		b.idle = b.idle[:n-1]
		b.mu.Unlock()
		if time.Since(u.idleSince) < c.idleTimeout && u.alive() {
			u.reused = true
			return u, nil
		}
		u.Close()
	}
	conn, err := c.dial(ctx, b.addr)
	if err != nil {
		if ctx.Err() == nil {
			b.avoidUntil.Store(time.Now().Add(time.Second).UnixNano())
		}
		return nil, err
	}
	u := &upstreamConn{Conn: conn, backend: b, headLimit: math.MaxInt64}
	if sc, ok := conn.(syscall.Conn); ok {
		if u.raw, err = sc.SyscallConn(); err != nil {
			conn.Close()
			return nil, err
		}
	}
	u.br = bufio.NewReaderSize(u, 4096)
	u.bw = bufio.NewWriterSize(conn, 4096)
	return u, nil
}

// put keeps a connection whose request and reply are complete.
func (c *connector) put(u *upstreamConn) {
	u.idleSince = time.Now()
	b := u.backend
	b.mu.Lock()
	keep := !b.gone && len(b.idle) < c.maxIdle
	if keep {
		b.idle = append(b.idle, u)
	}
	b.mu.Unlock()
	if !keep {
		u.Close()
	}
}

// prune forgets the backends that live does not hold, with their idle connections: an address that
// comes back belongs to another pod. It also closes what was idle for too long.
func (c *connector) prune(live map[netip.AddrPort]bool, now time.Time) {
	c.mu.Lock()
	all := make([]*backend, 0, len(c.backends))
	for addr, b := range c.backends {
		all = append(all, b)
		if !live[addr] {
			delete(c.backends, addr)
		}
	}
	c.mu.Unlock()
	for _, b := range all {
		var stale []*upstreamConn
		b.mu.Lock()
		if !live[b.addr] {
			b.gone = true
			stale, b.idle = b.idle, nil
		} else {
			n := 0
			for n < len(b.idle) && now.Sub(b.idle[n].idleSince) >= c.idleTimeout {
				n++
			}
			stale = slices.Clone(b.idle[:n])
			b.idle = slices.Delete(b.idle, 0, n)
		}
		b.mu.Unlock()
		for _, u := range stale {
			u.Close()
		}
	}
}

// close closes every idle connection; those in use are closed when they come back.
func (c *connector) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.prune(nil, time.Now())
}

// upstream balances the requests of one backend reference over its pods.
type upstream struct {
	ref  BackendRef
	next atomic.Uint32
	set  atomic.Pointer[backendSet]
}

type backendSet struct {
	addrs    []netip.AddrPort // as Lookup returned them
	backends []*backend
}

// refresh returns the current backends. Lookup's answer is compared by identity first: a table
// that has not changed costs nothing here.
func (up *upstream) refresh(c *connector, lookup Backends) *backendSet {
	if up.ref.Service == "" {
		return nil
	}
	addrs, found := lookup.Lookup(up.ref.Namespace, up.ref.Service, up.ref.Port)
	if !found || len(addrs) == 0 {
		return nil
	}
	set := up.set.Load()
	if set != nil && len(set.addrs) == len(addrs) && (&set.addrs[0] == &addrs[0] || slices.Equal(set.addrs, addrs)) {
		return set
	}
	set = &backendSet{addrs: addrs, backends: make([]*backend, len(addrs))}
	for i, a := range addrs {
		set.backends[i] = c.backend(a)
	}
	up.set.Store(set)
	return set
}

// pick chooses a backend: the next in turn, or the one after it when that has fewer requests under
// way. Backends in tried, and while there are others those that refused lately, are passed over.
func (up *upstream) pick(c *connector, lookup Backends, tried []*backend) (*backend, error) {
	set := up.refresh(c, lookup)
	if set == nil {
		return nil, errNoEndpoints
	}
	n := len(set.backends)
	start := int(up.next.Add(1)) % n
	var best, avoided *backend
	seen := 0
	var now int64
	for i := 0; i < n && seen < 2; i++ {
		b := set.backends[(start+i)%n]
		if slices.Contains(tried, b) {
			continue
		}
		if until := b.avoidUntil.Load(); until != 0 {
			if now == 0 {
				now = time.Now().UnixNano()
			}
			if now < until {
				if avoided == nil {
					avoided = b
				}
				continue
			}
			b.avoidUntil.CompareAndSwap(until, 0)
		}
		seen++
		if best == nil || b.outstanding.Load() < best.outstanding.Load() {
			best = b
		}
	}
	switch {
	case best == nil && avoided == nil:
		return nil, errNoEndpoints
	case best == nil:
		best = avoided
	}
	b := best
	b.mu.Lock()
	gone := b.gone
	b.mu.Unlock()
	if gone {
		// Pruned between two lookups and back again: take what is known under its address now.
		up.set.Store(nil)
		b = c.backend(b.addr)
	}
	return b, nil
}
