// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// talk is one UDP socket that has had an answer.
type talk struct {
	what string
	conn net.PacketConn
	to   net.Addr // nil: it is connected
}

// exchange sends and waits for the answer. Returns who answered.
func (k *talk) exchange() (string, error) {
	var err error
	if k.to == nil {
		_, err = k.conn.(net.Conn).Write([]byte("x"))
	} else {
		_, err = k.conn.WriteTo([]byte("x"), k.to)
	}
	if err != nil {
		return "", err
	}
	return k.read()
}

func (k *talk) read() (string, error) {
	buf := make([]byte, 256)
	if err := k.conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	n, _, err := k.conn.ReadFrom(buf)
	name, _, _ := strings.Cut(string(buf[:n]), " ")
	return name, err
}

// start opens a socket in ns, connected or bound to a port (or 0), and has every address answer once.
func start(t *testing.T, ns namespace, what, network string, connected bool, port int, to ...netip.AddrPort) *talk {
	t.Helper()
	k := &talk{what: what}
	ns.do(t, func() (err error) {
		if connected {
			c, err := net.Dial(network, to[0].String())
			if err == nil {
				k.conn = c.(*net.UDPConn)
			}
			return err
		}
		k.conn, err = net.ListenPacket(network, fmt.Sprint(":", port))
		return err
	})
	t.Cleanup(func() { k.conn.Close() })
	for i := range to {
		if !connected {
			k.to = net.UDPAddrFromAddrPort(to[len(to)-1-i]) // the first is the last that is asked
		}
		if _, err := k.exchange(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	return k
}

// TestOrphans: a UDP socket whose backend has gone is destroyed, wherever it is; no other is.
func TestOrphans(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	pods := n.servingPods("old", "new")
	old, new := pods[0], pods[1]
	web, other := n.service("web", nil, old), n.service("other", nil, new)
	for to, name := range map[netip.AddrPort]string{web.v4: "old", web.v6: "old", other.v4: "new", other.v6: "new"} {
		n.answers(a.ns, "udp", to, name)
		n.answers(0, "udp", to, name)
	}
	var orphans, others []*talk
	for where, ns := range map[string]namespace{"pod": a.ns, "node": 0} {
		for i, network := range []string{"udp4", "udp6"} {
			service := [...]netip.AddrPort{web.v4, web.v6}[i]
			second := [...]netip.AddrPort{other.v4, other.v6}[i]
			direct := netip.AddrPortFrom(old.Addrs[i], 8080)
			at := where + " " + network + " "
			orphans = append(orphans,
				start(t, ns, at+"connected", network, true, 0, service),
				start(t, ns, at+"not connected", network, false, 0, service),
				start(t, ns, at+"not connected, dual-stack", "udp", false, 0, service))
			others = append(others,
				start(t, ns, at+"connected directly", network, true, 0, direct),
				start(t, ns, at+"directly", network, false, 0, direct),
				start(t, ns, at+"connected to the other", network, true, 0, second),
				start(t, ns, at+"not connected, to both", network, false, 0, service, second),
				start(t, ns, at+"with a port of its own", network, false, 5000, service))
		}
	}
	n.endpoints("web", new)
	for _, k := range orphans {
		if _, err := k.read(); !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("%s: waiting for an answer ended with %v, want %v", k.what, err, syscall.ECONNABORTED)
		}
	}
	eventually(t, "the count", func() error {
		if got := int(n.metric("skep_dataplane_udp_sockets_destroyed_total")); got != len(orphans) {
			return fmt.Errorf("%d sockets are destroyed, want %d", got, len(orphans))
		}
		return nil
	})
	for _, k := range others {
		want := "new"
		if strings.Contains(k.what, "directly") {
			want = "old"
		}
		if got, err := k.exchange(); err != nil || got != want {
			t.Errorf("%s: %q answers, %v; want %q", k.what, got, err, want)
		}
	}
	// One that is not connected goes on with its next message.
	for _, k := range orphans {
		if k.to == nil {
			continue
		}
		if got, err := k.exchange(); err != nil || got != "new" {
			t.Errorf("%s: %q answers, %v", k.what, got, err)
		}
	}
	// Backends go, and nothing has an orphan: what was destroyed once is not found again.
	n.endpoints("other")
	n.endpoints("web", old, new)
	n.answers(a.ns, "udp", netip.AddrPortFrom(old.v4(), 8080), "old")
}

// TestOrphansOfRestart: an agent that starts destroys what became an orphan while none ran.
func TestOrphansOfRestart(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("old", "new")
	web := n.service("web", nil, pods[0])
	n.answers(0, "udp", web.v4, "old")
	k := start(t, 0, "connected", "udp4", true, 0, web.v4)
	n.stop()
	n.endpoints("web", pods[1])
	n.start()
	if _, err := k.read(); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("waiting for an answer ended with %v, want %v", err, syscall.ECONNABORTED)
	}
}
