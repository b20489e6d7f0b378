// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"skep.io/skep/dataplane/maps"
)

// hold opens a connection in a namespace and waits for its server's first words.
func (n *testNode) hold(from namespace, to netip.AddrPort) *net.TCPConn {
	n.t.Helper()
	var c net.Conn
	from.do(n.t, func() (err error) {
		if c, err = net.Dial("tcp", to.String()); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 256))
		return err
	})
	n.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// tcpFlows are the connections with a port that the kernel's map holds.
func (n *testNode) tcpFlows(port uint16) (count int, flags uint32) {
	n.t.Helper()
	all, err := n.dp.maps.Flows()
	if err != nil {
		n.t.Fatal(err)
	}
	for t, f := range all {
		if t.Proto == maps.TCP && (t.Sport.Number() == port || t.Dport.Number() == port) {
			count++
			flags |= f.Flags
		}
	}
	return count, flags
}

// TestFlowEndsWithItsConnection: a closed connection takes no room; an open one stays, and so does for a while what the
// node opened, whose late packets no policy may judge.
func TestFlowEndsWithItsConnection(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b")
	a, b := pods[0], pods[1]
	for _, to := range []netip.AddrPort{at(b.v4(), 8080), at(b.v6(), 8080)} {
		wait := func(what string, want int) {
			t.Helper()
			eventually(t, what, func() error {
				if count, _ := n.tcpFlows(8080); count != want {
					return fmt.Errorf("%d flows, want %d", count, want)
				}
				return nil
			})
		}
		half := n.hold(a.ns, to)
		reset := n.hold(a.ns, to)
		wait("two connections", 2)
		if err := reset.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		reset.Close()
		wait("the reset one to go", 1)
		// b's server closes when it has read the end, which comes after what it echoes.
		if _, err := half.Write([]byte("more")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(half, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		wait("the other to stay", 1)
		if err := half.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(half); err != nil || len(rest) != 0 {
			t.Fatalf("%q, %v", rest, err)
		}
		half.Close()
		wait("the closed one to go", 0)
	}
	own := n.hold(0, at(b.v4(), 8080))
	own.Close()
	eventually(t, "the node's own connection to be over", func() error {
		count, flags := n.tcpFlows(8080)
		if want := maps.FlowFin | maps.FlowFinBack; count != 1 || flags&uint32(want) != uint32(want) {
			return fmt.Errorf("%d flows with flags %b", count, flags)
		}
		return nil
	})
}
