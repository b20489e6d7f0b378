// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// slowClient is how long a container's output waits for one who is attached and does not read;
// after that the session ends, and the container goes on.
const slowClient = 10 * time.Second

// maxFrame bounds what ReadFrames accepts.
const maxFrame = 1 << 20

// clients are the connections of those who are attached. A frame to them is one byte stream number
// (1 stdout, 2 stderr), four bytes length (big endian), data.
type clients struct {
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func newClients() *clients { return &clients{conns: map[net.Conn]struct{}{}} }

func (c *clients) add(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.conns[conn] = struct{}{}
	return true
}

func (c *clients) send(stream byte, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.conns) == 0 {
		return
	}
	frame := make([]byte, 5, 5+len(data))
	frame[0] = stream
	binary.BigEndian.PutUint32(frame[1:], uint32(len(data)))
	frame = append(frame, data...)
	for conn := range c.conns {
		_ = conn.SetWriteDeadline(time.Now().Add(slowClient))
		if _, err := conn.Write(frame); err != nil {
			conn.Close()
			delete(c.conns, conn)
		}
	}
}

func (c *clients) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for conn := range c.conns {
		conn.Close()
		delete(c.conns, conn)
	}
}

// ReadFrames copies what the attach socket sends until the container's output ends. A nil writer
// drops its stream.
func ReadFrames(r io.Reader, stdout, stderr io.Writer) error {
	var head [5]byte
	buf := make([]byte, readBuffer)
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		n := binary.BigEndian.Uint32(head[1:])
		if n > maxFrame {
			return fmt.Errorf("attach: frame of %d bytes", n)
		}
		if int(n) > len(buf) {
			buf = make([]byte, n)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return err
		}
		var w io.Writer
		switch head[0] {
		case 1:
			w = stdout
		case 2:
			w = stderr
		default:
			return fmt.Errorf("attach: unknown stream %d", head[0])
		}
		if w == nil {
			continue
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
}
