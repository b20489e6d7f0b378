// SPDX-License-Identifier: Apache-2.0

package store

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// userTimeout is a connection's limit in milliseconds.
func userTimeout(t *testing.T, c net.Conn) (limit int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		limit, inner = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
	}); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
	return limit
}

func TestBoundSockets(t *testing.T) {
	pair := func(network, address string) (port int, ends [2]net.Conn) {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if ends[0], err = net.Dial(network, l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if ends[1], err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		for _, end := range ends {
			t.Cleanup(func() { end.Close() })
		}
		return l.Addr().(*net.TCPAddr).Port, ends
	}
	port, bound := pair("tcp", "127.0.0.1:0")
	_, other := pair("tcp", "127.0.0.1:0")
	seen, err := boundSockets(nil, port)
	if err != nil {
		t.Fatal(err)
	}
	for i := range bound {
		if got := userTimeout(t, bound[i]); got != int(silentLimit.Milliseconds()) {
			t.Errorf("end %d may be silent for %d ms", i, got)
		}
		if got := userTimeout(t, other[i]); got != 0 {
			t.Errorf("end %d of somebody else's is limited to %d ms", i, got)
		}
	}
	if len(seen) < 4 {
		t.Errorf("saw %v", seen)
	}
	// What was seen is not looked at again.
	for _, end := range other {
		otherPort := end.LocalAddr().(*net.TCPAddr).Port
		if _, err := boundSockets(seen, otherPort); err != nil || userTimeout(t, end) != 0 {
			t.Errorf("looked again: %v", err)
		}
	}
}
