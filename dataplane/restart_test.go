// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// load makes connections to an address without pause until stopped, and reports the first failure.
type load struct {
	made  atomic.Int64
	fails chan error
	stop  func()
}

func startLoad(ns namespace, to netip.AddrPort) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{fails: make(chan error, 16)}
	var wg sync.WaitGroup
	l.stop = func() { cancel(); wg.Wait(); close(l.fails) }
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				_, _, err := ask(ns, "tcp", to)
				if err != nil {
					select {
					case l.fails <- fmt.Errorf("connection %d: %w", l.made.Load(), err):
					default:
					}
				}
				l.made.Add(1)
			}
		})
	}
	return l
}

// TestChurn: connections to a service whose endpoints change without pause never fail.
func TestChurn(t *testing.T) {
	n := newNode(t)
	client := n.pod("client")
	var pods []*testPod
	for _, name := range []string{"a", "b", "c"} {
		p := n.pod(name)
		serve(t, p.ns, name, 8080)
		pods = append(pods, p)
	}
	web := n.service("web", nil, pods...)
	n.answers(client.ns, "tcp", web.v4, "a")
	l := startLoad(client.ns, web.v4)
	for i := range 400 {
		// Never the same size twice in a row, so that slots of an old generation would be missed.
		n.endpoints("web", pods[i%3:][:1+i%2*min(1, 2-i%3)]...)
	}
	l.stop()
	for err := range l.fails {
		t.Error(err)
	}
	t.Log(l.made.Load(), "connections")
	// What was thrown away is gone from the kernel.
	n.endpoints("web", pods...)
	eventually(t, "garbage", func() error {
		s, err := n.dp.maps.ReadServices()
		if err != nil {
			return err
		}
		// Two families and two protocols with three backends each.
		if len(s.Slots) != 12 || len(s.Backends) != 12 {
			return fmt.Errorf("%d slots and %d backends, want 12 of each", len(s.Slots), len(s.Backends))
		}
		return nil
	})
}

// TestRestart: an agent that starts anew changes nothing that runs, and then what changed meanwhile.
func TestRestart(t *testing.T) {
	n := newNode(t)
	a, b, c := n.pod("a"), n.pod("b"), n.pod("c")
	serve(t, b.ns, "b", 8080)
	serve(t, c.ns, "c", 8080)
	web, old := n.service("web", nil, b), n.service("old", nil, b)
	n.answers(a.ns, "tcp", web.v4, "b")
	n.answers(a.ns, "tcp", old.v4, "b")

	// Kept connections: through a socket, and from outside through translated packets.
	var kept []net.Conn
	a.ns.do(t, func() error {
		c, err := net.Dial("tcp", web.v4.String())
		kept = append(kept, c)
		return err
	})
	before, err := n.dp.maps.ReadServices()
	if err != nil {
		t.Fatal(err)
	}
	l := startLoad(a.ns, web.v4)
	for range 3 {
		n.stop()
		// While nobody runs, connections go on, a service goes and another comes.
		_ = n.client.CoreV1().Services("default").Delete(context.Background(), "old", metav1.DeleteOptions{})
		made := l.made.Load()
		eventually(t, "load", func() error {
			if l.made.Load() < made+20 {
				return fmt.Errorf("%d connections", l.made.Load()-made)
			}
			return nil
		})
		n.start()
		if err := n.dp.PruneEndpoints(context.Background(), []Endpoint{a.Endpoint, b.Endpoint, c.Endpoint}); err != nil {
			t.Fatal(err)
		}
	}
	l.stop()
	for err := range l.fails {
		t.Error(err)
	}
	after, err := n.dp.maps.ReadServices()
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range after.Services {
		if before.Services[k] != v {
			t.Errorf("frontend %s:%d was %+v, is %+v", k.Addr.Addr(), k.Port.Number(), before.Services[k], v)
		}
	}
	if len(after.Services) != len(before.Services)/2 {
		t.Errorf("%d frontends, of %d before", len(after.Services), len(before.Services))
	}
	for _, c := range kept {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 64)
		if _, err := c.Read(buf); err != nil { // its greeting
			t.Error(err)
		}
		if _, err := c.Write([]byte("still there?")); err != nil {
			t.Error(err)
		}
		if k, err := c.Read(buf); err != nil || string(buf[:k]) != "still there?" {
			t.Errorf("kept connection: %q, %v", buf[:k], err)
		}
		c.Close()
	}
	// It works on: an endpoint that changes now is noticed.
	n.endpoints("web", c)
	n.answers(a.ns, "tcp", web.v4, "c")
	if _, _, err := ask(a.ns, "tcp", old.v4); err == nil {
		t.Error("the deleted service still answers")
	}
}

// TestPrune: pods that went while no agent ran are forgotten.
func TestPrune(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	n.stop()
	n.start()
	if err := n.dp.PruneEndpoints(context.Background(), []Endpoint{a.Endpoint}); err != nil {
		t.Fatal(err)
	}
	eps, err := n.dp.maps.Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range b.Addrs {
		if _, ok := eps[addr]; ok {
			t.Errorf("%s is still known", addr)
		}
	}
	if len(eps) != 2 {
		t.Errorf("%d addresses are known, want 2", len(eps))
	}
	if pods, _ := n.dp.loader.Pods(); slices.Contains(pods, b.Ifindex) || !slices.Contains(pods, a.Ifindex) {
		t.Errorf("programs are on %v", pods)
	}
}

// TestCleanup: reset leaves nothing, and may be repeated.
func TestCleanup(t *testing.T) {
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close() // the runtime's own descriptors exist from here on
	}
	fds := openFDs(t)
	t.Run("node", func(t *testing.T) {
		n := newNode(t)
		a := n.pod("a")
		serve(t, a.ns, "a", 8080)
		web := n.service("web", nil, a)
		n.answers(0, "tcp", web.v4, "a")
		n.stop()
		for range 2 {
			if err := Cleanup(context.Background(), n.cfg.BPFDir); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(n.cfg.BPFDir); !os.IsNotExist(err) {
			t.Errorf("%s: %v", n.cfg.BPFDir, err)
		}
		if _, err := netlink.LinkByName("skep0"); err == nil {
			t.Error("skep0 is still there")
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteList(nil, family)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range routes {
				if r.Dst != nil && strings.HasPrefix(r.Dst.String(), "10.4") && r.Type == 7 {
					t.Errorf("route %s is still there", r)
				}
			}
		}
		for _, command := range []string{"iptables-save", "ip6tables-save"} {
			if out := output(t, command); strings.Contains(out, "SKEP") {
				t.Errorf("%s:\n%s", command, out)
			}
		}
	})
	eventually(t, "file descriptors", func() error {
		if now := openFDs(t); len(now) > len(fds) {
			return fmt.Errorf("before %v, after %v", fds, now)
		}
		return nil
	})
}

func output(t *testing.T, command string) string {
	t.Helper()
	out, err := exec.Command(command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

func openFDs(t *testing.T) []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, target)
		}
	}
	return out
}

// TestRepair: what somebody removes comes back.
func TestRepair(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, b.ns, "b", 8080)
	namespace(0).do(t, func() error {
		l, err := netlink.LinkByName("skep0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	eventually(t, "skep0", func() error { _, err := netlink.LinkByName("skep0"); return err })
	// So does a route, without which unknown addresses would leave by the default route.
	namespace(0).do(t, func() error {
		return netlink.RouteDel(&netlink.Route{Dst: mustCIDR("10.143.0.0/16"), Type: unix.RTN_UNREACHABLE, Priority: 1 << 24})
	})
	eventually(t, "unreachable route", func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: mustCIDR("10.143.0.0/16")}, netlink.RT_FILTER_DST)
		if err == nil && len(routes) == 0 {
			err = errors.New("not there")
		}
		return err
	})
	for range 2 { // configuring again changes nothing
		if err := n.dp.ConfigureNode(context.Background(), podCIDRs); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Count(output(t, "iptables-save"), "-j SKEP-FORWARD"); got != 1 {
		t.Errorf("%d jumps to SKEP-FORWARD", got)
	}
	n.answers(a.ns, "tcp", netip.AddrPortFrom(b.v4(), 8080), "b")
	if m, _ := filepath.Glob(filepath.Join(n.cfg.BPFDir, "maps-*")); len(m) != 1 {
		t.Errorf("map directories: %v", m)
	}
}
