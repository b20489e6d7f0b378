// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api"
)

// answers asks until name answers.
func (n *testNode) answers(from namespace, network string, to netip.AddrPort, name string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s %s", network, to), func() error {
		got, _, err := ask(from, network, to)
		if err == nil && got != name {
			err = fmt.Errorf("%s answered, want %s", got, name)
		}
		return err
	})
}

// TestRefused: a service without endpoints refuses at once, from sockets and per packet.
func TestRefused(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	empty := n.service("empty", nil)
	for _, from := range []namespace{a.ns, 0} {
		for _, to := range []netip.AddrPort{empty.v4, empty.v6, empty.at(nodeV4), empty.at(nodeV6)} {
			for _, network := range []string{"tcp", "udp"} {
				eventually(t, to.String(), func() error {
					_, _, err := ask(from, network, to)
					if !errors.Is(err, syscall.ECONNREFUSED) {
						return fmt.Errorf("%s %s: got %w, want connection refused", network, to, err)
					}
					return nil
				})
			}
		}
	}
	// An unconnected UDP socket learns it from sendmsg.
	a.ns.do(t, func() error {
		p, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer p.Close()
		_, err = p.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(empty.v4))
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("sendmsg: got %w, want connection refused", err)
		}
		return nil
	})
	// Sockets that the programs do not see get the stack's refusal.
	for _, to := range []netip.AddrPort{empty.at(nodeV4), empty.at(nodeV6)} {
		if _, _, err := n.askAs(n.outside, "tcp", to); err == nil {
			t.Errorf("%s answered a stranger", to)
		}
	}
}

// TestUnknownAddresses: what nobody has is unreachable at once and never leaves the node.
func TestUnknownAddresses(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	// The node has a way out, which an unknown address must not take.
	namespace(0).do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: outsideV4.AsSlice()}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: outsideV6.AsSlice(), Dst: mustCIDR("::/0")}))
	})
	seen := n.capture(t)
	for _, from := range []namespace{a.ns, 0} {
		for _, to := range []string{"10.142.0.250:80", "10.142.9.9:80", "10.143.7.7:80", "[fd73:6b65:a042::fa]:80", "[fd73:6b65:a042:9::9]:80", "[fd73:6b65:a043::7777]:80"} {
			_, _, err := ask(from, "tcp", netip.MustParseAddrPort(to))
			if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EACCES) {
				t.Errorf("%s: got %v, want unreachable", to, err)
			}
			if from == 0 {
				continue // the node's own routes say so at once
			}
			// Programs connect datagram sockets just to learn their own address; what they send comes to nothing.
			from.do(t, func() error {
				c, err := net.Dial("udp", to)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("x"))
				return err
			})
		}
	}
	for _, p := range seen() {
		for _, r := range append(append([]netip.Prefix{}, clusterCIDRs...), serviceCIDRs...) {
			if r.Contains(p) {
				t.Errorf("a packet to %s left the node", p)
			}
		}
	}
}

// capture collects destinations of what arrives outside.
func (n *testNode) capture(t *testing.T) func() []netip.Addr {
	t.Helper()
	var fd int
	n.outside.do(t, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		return err
	})
	t.Cleanup(func() { unix.Close(fd) })
	return func() []netip.Addr {
		var out []netip.Addr
		buf := make([]byte, 2048)
		for {
			k, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return out
			}
			switch {
			case k >= 20 && buf[0]>>4 == 4:
				a, _ := netip.AddrFromSlice(buf[16:20])
				out = append(out, a)
			case k >= 40 && buf[0]>>4 == 6:
				a, _ := netip.AddrFromSlice(buf[24:40])
				out = append(out, a)
			}
		}
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func mustCIDR(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return n
}

// TestMasquerade: a pod that leaves the cluster is seen as its node.
func TestMasquerade(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	serve(t, n.outside, "outside", 9090)
	for _, c := range []struct{ to, want netip.Addr }{{outsideV4, nodeV4}, {outsideV6, nodeV6}} {
		for _, network := range []string{"tcp", "udp"} {
			name, client, err := ask(a.ns, network, netip.AddrPortFrom(c.to, 9090))
			if err != nil || name != "outside" || client.Addr() != c.want {
				t.Errorf("%s %s: %s sees %s (%v), want client %s", network, c.to, name, client, err, c.want)
			}
		}
	}
}

// TestStrangers: sockets that the socket programs do not see are served packet by packet.
func TestStrangers(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, a.ns, "a", 8080)
	serve(t, b.ns, "b", 8080)
	web := n.service("web", nil, b)
	n.answers(0, "tcp", web.v4, "b")
	n.answers(0, "tcp", web.v6, "b")
	for _, c := range []struct {
		name   string
		from   *testPod
		v4, v6 netip.AddrPort
	}{
		{"ClusterIP", a, web.v4, web.v6},
		{"NodePort", a, web.at(nodeV4), web.at(nodeV6)},
		{"hairpin", b, web.v4, web.v6},
	} {
		for _, network := range []string{"tcp", "udp"} {
			for _, to := range []netip.AddrPort{c.v4, c.v6} {
				name, client, err := n.askAs(c.from.ns, network, to)
				if err != nil || name != "b" {
					t.Errorf("%s %s %s: %q, %v", c.name, network, to, name, err)
				}
				if c.from == a && !isPod(a)(client.Addr()) {
					t.Errorf("%s %s %s: the pod sees %s", c.name, network, to, client)
				}
			}
		}
	}
}

// TestTrafficPolicyLocal: from outside only local backends, which see the client.
func TestTrafficPolicyLocal(t *testing.T) {
	n := newNode(t)
	b := n.pod("b")
	serve(t, b.ns, "b", 8080)
	web := n.service("web", func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }, b)
	n.answers(0, "tcp", web.v4, "b")
	for _, network := range []string{"tcp", "udp"} {
		for _, c := range []struct{ to, client netip.Addr }{{nodeV4, outsideV4}, {nodeV6, outsideV6}} {
			eventually(t, "outside", func() error {
				name, client, err := n.askAs(n.outside, network, web.at(c.to))
				if err == nil && (name != "b" || client.Addr() != c.client) {
					err = fmt.Errorf("%s %s: %s sees %s", network, c.to, name, client)
				}
				return err
			})
		}
	}
}

// TestHostNetworkBackend: a backend in the node's own namespace is reached from everywhere.
func TestHostNetworkBackend(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	serve(t, 0, "host", 8080)
	host := &testPod{Endpoint: Endpoint{Addrs: []netip.Addr{nodeV4, nodeV6}}}
	web := n.service("web", nil, host)
	for _, to := range []netip.AddrPort{web.v4, web.v6, web.at(nodeV4), web.at(nodeV6)} {
		for _, network := range []string{"tcp", "udp"} {
			n.answers(a.ns, network, to, "host")
			n.answers(0, network, to, "host")
			if name, _, err := n.askAs(a.ns, network, to); name != "host" {
				t.Errorf("stranger in a pod, %s %s: %q, %v", network, to, name, err)
			}
		}
	}
	for _, to := range []netip.Addr{nodeV4, nodeV6} {
		for _, network := range []string{"tcp", "udp"} {
			if name, _, err := n.askAs(n.outside, network, web.at(to)); name != "host" {
				t.Errorf("outside, %s %s: %q, %v", network, to, name, err)
			}
		}
	}
}

// TestMapped: an IPv6 socket with a v4-mapped destination, TCP and both kinds of UDP.
func TestMapped(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, b.ns, "b", 8080)
	web := n.service("web", nil, b)
	n.answers(a.ns, "tcp", web.v4, "b")
	n.answers(a.ns, "udp", web.v4, "b")
	to := &unix.SockaddrInet6{Port: 80, Addr: web.v4.Addr().As16()}
	a.ns.do(t, func() error {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
			if kind == unix.SOCK_STREAM {
				if err := unix.Connect(fd, to); err != nil {
					return fmt.Errorf("connect: %w", err)
				}
				peer, err := unix.Getpeername(fd)
				if err != nil {
					return err
				}
				if p := peer.(*unix.SockaddrInet6); p.Addr != to.Addr || p.Port != 80 {
					return fmt.Errorf("getpeername says %v", p)
				}
				continue
			}
			// Unconnected: the answer must come from where the question went.
			if err := unix.Sendto(fd, []byte("x"), 0, to); err != nil {
				return fmt.Errorf("sendto: %w", err)
			}
			buf := make([]byte, 100)
			_, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return fmt.Errorf("recvfrom: %w", err)
			}
			if p := from.(*unix.SockaddrInet6); p.Addr != to.Addr || p.Port != 80 {
				return fmt.Errorf("the answer comes from %v", p)
			}
		}
		return nil
	})
}

// TestUDPSticksAndMoves: one socket keeps its backend until that is gone.
func TestUDPSticksAndMoves(t *testing.T) {
	n := newNode(t)
	a, b, c := n.pod("a"), n.pod("b"), n.pod("c")
	serve(t, b.ns, "b", 8080)
	serve(t, c.ns, "c", 8080)
	web := n.service("web", nil, b, c)
	eventually(t, "service", func() error { _, _, err := ask(a.ns, "udp", web.v4); return err })
	a.ns.do(t, func() error {
		p, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer p.Close()
		send := func() (string, error) {
			_ = p.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := p.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(web.v4)); err != nil {
				return "", err
			}
			buf := make([]byte, 100)
			k, from, err := p.ReadFrom(buf)
			if err != nil {
				return "", err
			}
			if from.String() != web.v4.String() {
				return "", fmt.Errorf("the answer comes from %s", from)
			}
			return string(buf[:1:k]), nil
		}
		first, err := send()
		if err != nil {
			return err
		}
		for range 50 {
			if again, err := send(); err != nil || again != first {
				return fmt.Errorf("went from %s to %s (%w)", first, again, err)
			}
		}
		other := map[string]*testPod{"b": c, "c": b}[first]
		n.endpoints("web", other)
		eventually(t, "move", func() error {
			now, err := send()
			if err == nil && now == first {
				err = fmt.Errorf("still %s", now)
			}
			return err
		})
		return nil
	})
}

// TestAffinity: a client namespace keeps its backend over connections; without affinity all get some.
func TestAffinity(t *testing.T) {
	n := newNode(t)
	a, b, c := n.pod("a"), n.pod("b"), n.pod("c")
	serve(t, b.ns, "b", 8080)
	serve(t, c.ns, "c", 8080)
	sticky := n.service("sticky", func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }, b, c)
	free := n.service("free", nil, b, c)
	count := func(to netip.AddrPort) map[string]int {
		eventually(t, "service", func() error { _, _, err := ask(a.ns, "tcp", to); return err })
		got := map[string]int{}
		for range 60 {
			name, _, err := ask(a.ns, "tcp", to)
			if err != nil {
				t.Fatal(err)
			}
			got[name]++
		}
		return got
	}
	if got := count(free.v4); len(got) != 2 {
		t.Errorf("without affinity: %v", got)
	}
	for _, to := range []netip.AddrPort{sticky.v4, sticky.v6} {
		if got := count(to); len(got) != 1 {
			t.Errorf("with affinity: %v", got)
		}
	}
}

// TestSpoof: a pod cannot send in another's name.
func TestSpoof(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, b.ns, "b", 8080)
	fake := netip.MustParseAddr("10.142.0.77")
	a.ns.do(t, func() error { return addr("eth0", netip.PrefixFrom(fake, 32)) })
	a.ns.do(t, func() error {
		c, err := net.DialUDP("udp", &net.UDPAddr{IP: fake.AsSlice()}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.v4(), 8080)))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})
	families, err := n.cfg.Metrics.(*prometheus.Registry).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if l.GetValue() == "spoofed-source" && m.Counter.GetValue() != 1 {
					t.Errorf("%v spoofed packets were counted", m.Counter.GetValue())
				}
			}
		}
	}
}

// TestNodeLocalDNS: the DNS service's address is the node's own.
func TestNodeLocalDNS(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	for _, ip := range []netip.Addr{dnsV4, dnsV6} {
		l, err := net.ListenPacket("udp", netip.AddrPortFrom(ip, 53).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				k, from, err := l.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = l.WriteTo(append([]byte("dns "+from.String()+" "), buf[:k]...), from)
			}
		}()
		n.answers(a.ns, "udp", netip.AddrPortFrom(ip, 53), "dns")
		n.answers(0, "udp", netip.AddrPortFrom(ip, 53), "dns")
	}
	// And a Service object with the annotation gets no frontend.
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: api.DNSServiceName, Annotations: map[string]string{api.NodeLocalAnnotation: "true"}},
		Spec: corev1.ServiceSpec{ClusterIP: dnsV4.String(), ClusterIPs: []string{dnsV4.String()}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 53}}},
	}
	if _, err := n.client.CoreV1().Services("kube-system").Create(context.Background(), svc, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "table", func() error {
		if _, ok := n.dp.Services().Lookup("kube-system", api.DNSServiceName, networkingv1.ServiceBackendPort{Number: 53}); !ok {
			return errors.New("not there")
		}
		return nil
	})
	n.answers(a.ns, "udp", netip.AddrPortFrom(dnsV4, 53), "dns")
}

// TestIngress: ports of the node's addresses go to the listener, and fall through when it is closed.
func TestIngress(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	var config net.ListenConfig
	config.SetMultipathTCP(false) // a sockmap takes no MPTCP sockets
	l, err := config.Listen(context.Background(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "ingress %s\n", c.RemoteAddr())
			c.Close()
		}
	}()
	if err := n.dp.SteerIngress(context.Background(), 80, l.(*net.TCPListener)); err != nil {
		t.Fatal(err)
	}
	for _, ip := range []string{nodeV4.String(), nodeV6.String()} {
		to := netip.AddrPortFrom(netip.MustParseAddr(ip), 80)
		for from, ask := range map[string]func() (string, netip.AddrPort, error){
			"node":    func() (string, netip.AddrPort, error) { return ask(0, "tcp", to) },
			"pod":     func() (string, netip.AddrPort, error) { return ask(a.ns, "tcp", to) },
			"outside": func() (string, netip.AddrPort, error) { return n.askAs(n.outside, "tcp", to) },
		} {
			if name, _, err := ask(); name != "ingress" {
				t.Errorf("from %s to %s: %q, %v", from, to, name, err)
			}
		}
	}
	if name, _, err := ask(0, "tcp", netip.MustParseAddrPort("127.0.0.1:80")); name != "ingress" {
		t.Errorf("loopback: %q, %v", name, err)
	}
	l.Close()
	eventually(t, "after close", func() error {
		if _, _, err := ask(0, "tcp", netip.AddrPortFrom(nodeV4, 80)); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("got %w, want connection refused", err)
		}
		return nil
	})
}
