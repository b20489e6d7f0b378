// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"skep.io/skep/dataplane/loader"
)

var (
	nodeV4, nodeV6       = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	outsideV4, outsideV6 = netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	dnsV4, dnsV6         = netip.MustParseAddr("10.143.0.10"), netip.MustParseAddr("fd73:6b65:a043::a")
	podCIDRs             = []netip.Prefix{netip.MustParsePrefix("10.142.0.0/24"), netip.MustParsePrefix("fd73:6b65:a042::/64")}
	clusterCIDRs         = []netip.Prefix{netip.MustParsePrefix("10.142.0.0/16"), netip.MustParsePrefix("fd73:6b65:a042::/48")}
	serviceCIDRs         = []netip.Prefix{netip.MustParsePrefix("10.143.0.0/16"), netip.MustParsePrefix("fd73:6b65:a043::/112")}
)

// namespace is a network namespace; 0 is the node's.
type namespace int

func newNamespace(t testing.TB) namespace {
	t.Helper()
	var ns int
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread dies with its goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(ns) })
	n := namespace(ns)
	n.do(t, func() error { return up("lo") })
	return n
}

// do runs f in the namespace.
func (n namespace) do(t testing.TB, f func() error) {
	t.Helper()
	if err := n.try(f); err != nil {
		t.Fatal(err)
	}
}

func (n namespace) try(f func() error) error {
	if n == 0 {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(n), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func addr(name string, p netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, a)
}

type testNode struct {
	t        testing.TB
	dp       *Dataplane
	cfg      Config
	client   *fake.Clientset
	outside  namespace
	stop     func()
	nextPod  int
	nextPort atomic.Int32
	synced   time.Duration // from when the informers were started until all was in the kernel
}

// newNode makes the node: this process' namespace with eth0, and the outside at eth0's other end.
func newNode(t testing.TB) *testNode { return newNodeOf(t, func(*Config) {}) }

func newNodeOf(t testing.TB, change func(*Config)) *testNode {
	t.Helper()
	n := &testNode{t: t, client: fake.NewClientset(), outside: newNamespace(t)}
	namespace(0).do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.outside)}
		return errors.Join(up("lo"), netlink.LinkAdd(v), up("eth0"),
			addr("eth0", netip.PrefixFrom(nodeV4, 24)), addr("eth0", netip.PrefixFrom(nodeV6, 64)))
	})
	t.Cleanup(func() {
		if l, err := netlink.LinkByName("eth0"); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	n.outside.do(t, func() error {
		return errors.Join(up("eth0"), addr("eth0", netip.PrefixFrom(outsideV4, 24)), addr("eth0", netip.PrefixFrom(outsideV6, 64)))
	})
	n.cfg = Config{
		NodeName: "node-1", NodeIPs: []netip.Addr{nodeV4, nodeV6}, ClusterCIDRs: clusterCIDRs, ServiceCIDRs: serviceCIDRs,
		ClusterDNS: []netip.Addr{dnsV4, dnsV6}, CgroupPath: os.Getenv(inside),
		BPFDir:  filepath.Join("/sys/fs/bpf", fmt.Sprintf("skep-%d", time.Now().UnixNano())),
		Metrics: prometheus.NewRegistry(),
		Log:     slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	change(&n.cfg)
	n.start()
	t.Cleanup(func() {
		n.stop()
		if err := Cleanup(context.Background(), n.cfg.BPFDir); err != nil {
			t.Error(err)
		}
	})
	return n
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

// start runs a data plane, as an agent that starts does.
func (n *testNode) start() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	n.cfg.Informers = informers.NewSharedInformerFactory(n.client, 0)
	began := time.Now()
	dp, err := New(ctx, n.cfg)
	n.t.Log("New:", time.Since(began))
	if err != nil {
		cancel()
		n.t.Fatal(err)
	}
	n.dp = dp
	done := make(chan error, 1)
	go func() { done <- dp.Run(ctx) }()
	started := time.Now()
	n.cfg.Informers.Start(ctx.Done())
	began = time.Now()
	if err := dp.ConfigureNode(ctx, podCIDRs); err != nil {
		n.t.Fatal(err)
	}
	n.t.Log("ConfigureNode:", time.Since(began))
	select {
	case <-dp.Synced():
		n.synced = time.Since(started)
	case err := <-done:
		n.t.Fatal("data plane ended: ", err)
	case <-time.After(30 * time.Second):
		n.t.Fatal("services did not sync")
	}
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
		n.cfg.Informers.Shutdown()
		n.stop = func() {}
	}
}

type testPod struct {
	Endpoint
	ns namespace
}

func (p *testPod) v4() netip.Addr { return p.Addrs[0] }
func (p *testPod) v6() netip.Addr { return p.Addrs[1] }

// pod makes a pod as node/sandbox does, and attaches it.
func (n *testNode) pod(name string) *testPod {
	n.t.Helper()
	n.nextPod++
	p := &testPod{ns: newNamespace(n.t)}
	v4, v6 := podCIDRs[0].Addr(), podCIDRs[1].Addr()
	for range n.nextPod + 10 {
		v4, v6 = v4.Next(), v6.Next()
	}
	hostName := fmt.Sprintf("skep%d", n.nextPod)
	p.Endpoint = Endpoint{PodUID: types.UID(name), Namespace: "default", Name: name, Addrs: []netip.Addr{v4, v6}}
	namespace(0).do(n.t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = hostName
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.ns)}
		if err := errors.Join(netlink.LinkAdd(v), up(hostName)); err != nil {
			return err
		}
		l, err := netlink.LinkByName(hostName)
		if err != nil {
			return err
		}
		p.Ifindex, p.HostMAC = l.Attrs().Index, l.Attrs().HardwareAddr
		p.NetNS = fmt.Sprintf("/proc/self/fd/%d", p.ns)
		return nil
	})
	n.t.Cleanup(func() {
		_ = n.dp.DetachEndpoint(context.Background(), p.Endpoint)
		if l, err := netlink.LinkByName(hostName); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	p.ns.do(n.t, func() error {
		if err := errors.Join(up("eth0"), addr("eth0", netip.PrefixFrom(v4, 32)), addr("eth0", netip.PrefixFrom(v6, 128))); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		p.PodMAC = l.Attrs().HardwareAddr
		if p.NetnsCookie, err = loader.ThisNetnsCookie(); err != nil {
			return err
		}
		return podRoutes(l, p.HostMAC)
	})
	namespace(0).do(n.t, func() error {
		var errs []error
		for _, a := range p.Addrs {
			dst := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			neigh := &netlink.Neigh{LinkIndex: p.Ifindex, IP: a.AsSlice(), HardwareAddr: p.PodMAC, State: netlink.NUD_PERMANENT}
			errs = append(errs, netlink.RouteAdd(&netlink.Route{LinkIndex: p.Ifindex, Dst: dst, Scope: netlink.SCOPE_LINK}), netlink.NeighAdd(neigh))
		}
		return errors.Join(errs...)
	})
	if err := n.dp.AttachEndpoint(context.Background(), p.Endpoint); err != nil {
		n.t.Fatal(err)
	}
	return p
}

// podRoutes sends all that leaves a pod to the node's end of its veth.
func podRoutes(device netlink.Link, hostMAC net.HardwareAddr) error {
	for gateway, any := range map[string]string{"169.254.1.1": "0.0.0.0/0", "fe80::1": "::/0"} {
		ip := net.ParseIP(gateway)
		neigh := &netlink.Neigh{LinkIndex: device.Attrs().Index, IP: ip, HardwareAddr: hostMAC, State: netlink.NUD_PERMANENT}
		_, dst, _ := net.ParseCIDR(any)
		route := &netlink.Route{LinkIndex: device.Attrs().Index, Gw: ip, Dst: dst, Flags: int(netlink.FLAG_ONLINK)}
		if err := errors.Join(netlink.NeighAdd(neigh), netlink.RouteAdd(route)); err != nil {
			return fmt.Errorf("%s: %w", gateway, err)
		}
	}
	return nil
}

// serve answers each TCP connection and UDP packet on port with its name and the client it sees; a TCP
// connection stays open and echoes.
func serve(t testing.TB, ns namespace, name string, port uint16) {
	t.Helper()
	ns.do(t, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		p, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { p.Close() })
		go func() {
			buf := make([]byte, 2048)
			for {
				_, from, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = p.WriteTo([]byte(fmt.Sprintf("%s %s\n", name, from)), from)
			}
		}()
		return nil
	})
}

// ask connects and returns who answered and which client they saw.
func ask(ns namespace, network string, to netip.AddrPort) (name string, client netip.AddrPort, err error) {
	err = ns.try(func() error {
		d := net.Dialer{Timeout: 5 * time.Second, Control: nil}
		c, err := d.Dial(network, to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if network == "udp" {
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
		}
		buf := make([]byte, 256)
		k, err := c.Read(buf)
		if err != nil {
			return err
		}
		if got := c.RemoteAddr().String(); got != to.String() {
			return fmt.Errorf("remote address is %s, want %s", got, to)
		}
		var from string
		if _, err := fmt.Sscan(string(buf[:k]), &name, &from); err != nil {
			return err
		}
		client, err = netip.ParseAddrPort(from)
		client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		return err
	})
	return name, client, err
}

// askAs asks in a namespace from a process that the socket programs do not see, as a client on another
// machine is.
func (n *testNode) askAs(from namespace, network string, to netip.AddrPort) (name string, client netip.AddrPort, err error) {
	out, err := n.stranger(from, network+" "+to.String())
	if err != nil {
		return "", netip.AddrPort{}, err
	}
	var seen string
	if _, err := fmt.Sscan(out, &name, &seen); err != nil {
		return "", netip.AddrPort{}, err
	}
	client, err = netip.ParseAddrPort(seen)
	return name, client, err
}

// stranger runs a question in a namespace, in a process that the socket programs do not see.
func (n *testNode) stranger(from namespace, question string) (answer string, err error) {
	out := &strings.Builder{}
	err = n.asStranger(from, question, func(cmd *exec.Cmd) error {
		cmd.Stdout, cmd.Stderr = out, out
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		return cmd.Run()
	})
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return out.String(), nil
}

// asStranger runs or starts such a process; its parent is a thread that ends.
func (n *testNode) asStranger(from namespace, question string, run func(*exec.Cmd) error) error {
	return from.try(func() error {
		dir, err := os.Open(filepath.Dir(os.Getenv(inside)))
		if err != nil {
			return err
		}
		defer dir.Close()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), stranger+"="+question)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		return run(cmd)
	})
}

func askAsStranger(question string) int {
	network, where, _ := strings.Cut(question, " ")
	to := netip.MustParseAddrPort(where)
	if f, ok := strangers[network]; ok {
		answer, err := f(to)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(answer)
		return 0
	}
	name, client, err := ask(0, network, to)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(name, client)
	return 0
}

func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func ptr[T any](v T) *T { return &v }

type testService struct {
	svc    *corev1.Service
	v4, v6 netip.AddrPort
	node   uint16
}

func (s testService) at(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, s.node) }

// service creates a dual-stack NodePort Service on port 80, TCP and UDP, with these pods' port 8080.
func (n *testNode) service(name string, change func(*corev1.Service), pods ...*testPod) testService {
	n.t.Helper()
	k := n.nextPort.Add(1)
	v4 := netip.AddrFrom4([4]byte{10, 143, 1, byte(k)})
	a6 := serviceCIDRs[1].Addr().As16()
	a6[15] = byte(k) + 100
	v6 := netip.AddrFrom16(a6)
	nodePort := int32(30000 + k)
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, ClusterIP: v4.String(), ClusterIPs: []string{v4.String(), v6.String()},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			Ports: []corev1.ServicePort{
				{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: nodePort},
				{Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80, NodePort: nodePort},
			},
		},
	}
	if change != nil {
		change(svc)
	}
	n.endpoints(name, pods...)
	if _, err := n.client.CoreV1().Services("default").Create(context.Background(), svc, metav1.CreateOptions{}); err != nil {
		n.t.Fatal(err)
	}
	return testService{svc, netip.AddrPortFrom(v4, 80), netip.AddrPortFrom(v6, 80), uint16(nodePort)}
}

// endpoints makes exactly these pods the endpoints of a service.
func (n *testNode) endpoints(name string, pods ...*testPod) {
	n.t.Helper()
	for i, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		s := slice(name, i, family, 8080)
		for _, p := range pods {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{p.Addrs[i].String()}, NodeName: ptr("node-1")})
		}
		n.putSlice(s)
	}
}

func slice(name string, i int, family discoveryv1.AddressType, port int32) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: fmt.Sprintf("%s-%d", name, i), Labels: map[string]string{discoveryv1.LabelServiceName: name},
		},
		AddressType: family,
		Ports: []discoveryv1.EndpointPort{
			{Name: ptr("tcp"), Protocol: ptr(corev1.ProtocolTCP), Port: &port},
			{Name: ptr("udp"), Protocol: ptr(corev1.ProtocolUDP), Port: &port},
		},
	}
}

func (n *testNode) putSlice(s *discoveryv1.EndpointSlice) {
	n.t.Helper()
	api := n.client.DiscoveryV1().EndpointSlices("default")
	_, err := api.Update(context.Background(), s, metav1.UpdateOptions{})
	if err != nil {
		_, err = api.Create(context.Background(), s, metav1.CreateOptions{})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// routeVia sends what is for an address through a gateway, from the address src if that is valid.
func routeVia(device string, to, gateway, src netip.Addr) error {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	dst := &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: gateway.AsSlice(), Src: src.AsSlice()})
}
