// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// tunnels are the upgraded connections under way, so that a server that ends can end them.
type tunnels struct {
	mu   sync.Mutex
	open map[*tunnel]struct{}
	wg   sync.WaitGroup
}

func (t *tunnels) add(one *tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		t.open = map[*tunnel]struct{}{}
	}
	t.open[one] = struct{}{}
	t.wg.Add(1)
}

func (t *tunnels) remove(one *tunnel) {
	t.mu.Lock()
	delete(t.open, one)
	t.mu.Unlock()
	t.wg.Done()
}

func (t *tunnels) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for one := range t.open {
		one.close()
	}
}

// tunnel joins a client's and a backend's connection after a protocol switch.
type tunnel struct {
	client, backend net.Conn
	idle, stall     time.Duration
	last            atomic.Int64 // unix nanoseconds of the last byte in either direction
	half            atomic.Bool  // one direction has ended
}

func (t *tunnel) close() {
	t.client.Close()
	t.backend.Close()
}

// tunnel completes the client's upgrade and copies both ways until both ends have finished.
func (x *exchange) tunnel(u *upstreamConn, resp *http.Response) {
	conn, rw, err := x.rc.Hijack()
	if err != nil {
		x.fail(err)
		return
	}
	defer conn.Close()
	x.status = http.StatusSwitchingProtocols
	_ = conn.SetDeadline(time.Time{}) // fails only on a closed connection, as the next write does

	protocol := resp.Header.Get("Upgrade")
	bw := bufio.NewWriter(conn)
	_, _ = bw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + protocol + "\r\n")
	h := http.Header{}
	copyReplyHeader(h, resp.Header)
	_ = h.Write(bw) // errors stay in bw
	_, _ = bw.WriteString("\r\n")
	if err := bw.Flush(); err != nil {
		x.why = err
		return
	}

	u.clearRead()
	t := &tunnel{client: conn, backend: u.Conn, idle: x.p.limits.Tunnel, stall: x.p.limits.ClientStall}
	t.last.Store(time.Now().UnixNano())
	x.p.tunnels.add(t)
	defer x.p.tunnels.remove(t)

	back := make(chan struct{})
	go func() {
		defer close(back)
		x.sent = t.copy(conn, u.br, u.Conn)
	}()
	t.copy(u.Conn, rw.Reader, conn)
	<-back
}

// copy moves bytes from src, which reads ahead of the connection from, to dst until src ends; then
// it passes the end on. A failure in one direction ends both.
func (t *tunnel) copy(dst net.Conn, src io.Reader, from net.Conn) (total int64) {
	buf := make([]byte, 16<<10)
	for {
		_ = from.SetReadDeadline(time.Now().Add(t.idle)) // a closed connection shows in Read
		if t.half.Load() {                               // looked at last, so that no end is missed
			_ = from.SetReadDeadline(time.Now().Add(min(t.idle, t.stall)))
		}
		n, err := src.Read(buf)
		if n > 0 {
			t.last.Store(time.Now().UnixNano())
			_ = dst.SetWriteDeadline(time.Now().Add(t.stall)) // as above, in Write
			if _, werr := dst.Write(buf[:n]); werr != nil {
				t.close()
				return total
			}
			total += int64(n)
		}
		switch {
		case err == nil:
		case err == io.EOF:
			t.half.Store(true)
			cw, ok := dst.(interface{ CloseWrite() error })
			if !ok || cw.CloseWrite() != nil {
				t.close()
				return total
			}
			// The other direction may sit in a read with the long deadline.
			_ = dst.SetReadDeadline(time.Now().Add(min(t.idle, t.stall)))
			return total
		case isTimeout(err) && !t.half.Load() && time.Since(time.Unix(0, t.last.Load())) < t.idle:
			// Quiet in this direction only.
		default:
			t.close()
			return total
		}
	}
}
