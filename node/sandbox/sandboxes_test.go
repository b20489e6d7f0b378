// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/sandbox/isolate"
)

func TestMain(m *testing.M) { os.Exit(isolate.Run(m)) }

// fakeNetwork remembers who is attached.
type fakeNetwork struct {
	mu       sync.Mutex
	attached map[types.UID]dataplane.Endpoint
	fail     error
}

func (f *fakeNetwork) AttachEndpoint(_ context.Context, e dataplane.Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	if f.attached == nil {
		f.attached = map[types.UID]dataplane.Endpoint{}
	}
	f.attached[e.PodUID] = e
	return nil
}

func (f *fakeNetwork) DetachEndpoint(_ context.Context, e dataplane.Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.attached, e.PodUID)
	return nil
}

func (f *fakeNetwork) PruneEndpoints(_ context.Context, keep []dataplane.Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attached = map[types.UID]dataplane.Endpoint{}
	for _, e := range keep {
		f.attached[e.PodUID] = e
	}
	return nil
}

const testCgroup = "skep-test-sandbox"

func open(t *testing.T, dir string, n Network) *Sandboxes {
	t.Helper()
	s, err := New(Config{
		RunDir: dir, Network: n, MTU: 1450, Log: slog.New(slog.DiscardHandler),
		PodCIDRs: func() []netip.Prefix {
			return []netip.Prefix{netip.MustParsePrefix("10.42.7.0/24"), netip.MustParsePrefix("fd73:6b65:7042:7::/64")}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func spec(name string) Spec {
	return Spec{PodUID: types.UID("uid-" + name), Namespace: "default", Name: name, Hostname: name,
		CgroupParent: fmt.Sprintf("%s-%d/pod%s", testCgroup, os.Getpid(), name)}
}

// checkClean fails when the kernel or the directory still holds anything of a sandbox.
func checkClean(t *testing.T, dir string) {
	t.Helper()
	links, err := podLinks()
	if err != nil || len(links) != 0 {
		t.Errorf("links left: %v, %v", links, err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil || len(mounts) != 0 {
		t.Errorf("mounts left: %v, %v", mounts, err)
	}
	for _, sub := range []string{"ns", "sandboxes"} {
		if entries, _ := os.ReadDir(filepath.Join(dir, sub)); len(entries) != 0 {
			t.Errorf("%s left: %v", sub, entries)
		}
	}
	all, err := cgroup.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		entries, _ := filepath.Glob(filepath.Join(h.Mount, fmt.Sprintf("%s-%d", testCgroup, os.Getpid()), "*", "cgroup.procs"))
		if len(entries) != 0 {
			t.Errorf("cgroups left: %v", entries)
		}
		os.Remove(filepath.Join(h.Mount, fmt.Sprintf("%s-%d", testCgroup, os.Getpid())))
	}
}

// echo sends a datagram from one pod to another and back. It sends again while there is no answer: the kernel
// activates the queue of a new link from its link watch, a little later, and drops what comes before.
func echo(t *testing.T, from, to *Sandbox, addr netip.Addr) {
	t.Helper()
	var server *net.UDPConn
	err := inNamespace(to.NetNS, unix.CLONE_NEWNET, func() (err error) {
		server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 7)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		buf := make([]byte, 100)
		for {
			n, peer, err := server.ReadFromUDP(buf)
			if err != nil {
				return
			}
			_, _ = server.WriteToUDP(buf[:n], peer)
		}
	}()
	err = inNamespace(from.NetNS, unix.CLONE_NEWNET, func() error {
		conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 7)))
		if err != nil {
			return err
		}
		defer conn.Close()
		buf := make([]byte, 100)
		for range 100 {
			if _, err := conn.Write([]byte("hello")); err != nil {
				return err
			}
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := conn.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
			if err == nil && string(buf[:n]) != "hello" {
				err = fmt.Errorf("got %q", buf[:n])
			}
			return err
		}
		return errors.New("no answer to 100 datagrams")
	})
	if err != nil {
		t.Errorf("%s to %s at %s: %v", from.Name, to.Name, addr, err)
	}
}

func TestPodsReachOneAnotherAndAreAdopted(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	network := &fakeNetwork{}
	s := open(t, dir, network)
	var pods []*Sandbox
	for _, name := range []string{"a", "b"} {
		p, err := s.Create(ctx, spec(name))
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Addrs) != 2 || !p.Addrs[0].Is4() || p.Endpoint.Ifindex == 0 {
			t.Fatalf("sandbox %+v", p)
		}
		if err := s.Attached(ctx, p.PodUID); err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	again, err := s.Create(ctx, spec("a"))
	if err != nil || again.Addrs[0] != pods[0].Addrs[0] {
		t.Fatalf("second Create: %v, %v", again, err)
	}
	if len(network.attached) != 2 {
		t.Errorf("attached: %v", network.attached)
	}
	for i, a := range pods[1].Addrs {
		echo(t, pods[0], pods[1], a)
		echo(t, pods[1], pods[0], pods[0].Addrs[i])
	}
	err = inNamespace(pods[0].UTSNS, unix.CLONE_NEWUTS, func() error {
		if h, err := os.Hostname(); err != nil || h != "a" {
			return fmt.Errorf("hostname %q, %w", h, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	// A second process finds the same, and a third one removes what broke.
	network2 := &fakeNetwork{}
	s = open(t, dir, network2)
	list, err := s.List(ctx)
	if err != nil || len(list) != 2 {
		t.Fatalf("adopted %v, %v", list, err)
	}
	if got, want := list[0].Endpoint.PodMAC.String(), pods[0].Endpoint.PodMAC.String(); got != want {
		t.Errorf("adopted MAC %s, was %s", got, want)
	}
	if len(network2.attached) != 2 {
		t.Errorf("kept: %v", network2.attached)
	}
	echo(t, list[0], list[1], list[1].Addrs[0])
	if err := unplug(hostLinkName(pods[1].PodUID)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, network2)
	if list, err = s.List(ctx); err != nil || len(list) != 1 || list[0].Name != "a" {
		t.Fatalf("after a link went: %v, %v", list, err)
	}
	c, err := s.Create(ctx, spec("c"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Addrs[0] == pods[1].Addrs[0] {
		t.Errorf("address %s is used again at once", c.Addrs[0])
	}
	for _, uid := range []types.UID{"uid-a", "uid-c", "uid-never"} {
		if err := s.Remove(ctx, uid); err != nil {
			t.Error(err)
		}
	}
	if len(network2.attached) != 0 {
		t.Errorf("still attached: %v", network2.attached)
	}
	checkClean(t, dir)
}

func TestFailureLeavesNothing(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	network := &fakeNetwork{fail: errors.New("verifier says no")}
	s := open(t, dir, network)
	refused, err := s.Create(ctx, spec("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Attached(ctx, refused.PodUID); err == nil || !strings.Contains(err.Error(), "verifier says no") {
		t.Fatalf("Attached: %v", err)
	}
	bad := spec("b")
	bad.Sysctls = map[string]string{"net.ipv4.tcp_nonsense": "1"}
	if _, err := s.Create(ctx, bad); err == nil {
		t.Fatal("unknown sysctl accepted")
	}
	checkClean(t, dir)
	network.fail = nil
	good := spec("c")
	good.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.tcp_syncookies": "0"}
	if _, err := s.Create(ctx, good); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(ctx, dir, fmt.Sprintf("%s-%d", testCgroup, os.Getpid())); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(ctx, dir, fmt.Sprintf("%s-%d", testCgroup, os.Getpid())); err != nil {
		t.Fatal(err)
	}
	checkClean(t, dir)
}

func TestHostNetwork(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	s := open(t, dir, &fakeNetwork{})
	sp := spec("h")
	sp.HostNetwork = true
	p, err := s.Create(ctx, sp)
	if err != nil {
		t.Fatal(err)
	}
	if p.NetNS != "" || p.UTSNS != "" || p.IPCNS == "" || len(p.Addrs) != 0 {
		t.Errorf("sandbox %+v", p)
	}
	if err := s.Attached(ctx, p.PodUID); err != nil {
		t.Fatal(err)
	}
	if list, err := open(t, dir, nil).List(ctx); err != nil || len(list) != 1 {
		t.Errorf("adopted %v, %v", list, err)
	}
	if err := s.Remove(ctx, p.PodUID); err != nil {
		t.Fatal(err)
	}
	checkClean(t, dir)
}

func TestManyAtOnce(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	s := open(t, dir, &fakeNetwork{})
	var wg sync.WaitGroup
	addrs := make([]netip.Addr, 30)
	for i := range addrs {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p, err := s.Create(ctx, spec(fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
				return
			}
			addrs[i] = p.Addrs[0]
		}()
	}
	wg.Wait()
	seen := map[netip.Addr]bool{}
	for i, a := range addrs {
		if seen[a] {
			t.Errorf("address %s twice", a)
		}
		seen[a] = true
		if err := s.Remove(ctx, types.UID(fmt.Sprintf("uid-%d", i))); err != nil {
			t.Error(err)
		}
	}
	checkClean(t, dir)
}

func BenchmarkCreateRemove(b *testing.B) {
	ctx := context.Background()
	s, err := New(Config{RunDir: b.TempDir(), Log: slog.New(slog.DiscardHandler), PodCIDRs: func() []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix("10.42.7.0/24"), netip.MustParsePrefix("fd73:6b65:7042:7::/64")}
	}})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Create(ctx, spec("bench")); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Remove(ctx, "uid-bench"); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	_ = Cleanup(ctx, s.cfg.RunDir, fmt.Sprintf("%s-%d", testCgroup, os.Getpid()))
}
