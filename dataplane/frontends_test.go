// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/services"
)

var lbV4, lbV6 = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:5::7")

// balanced makes a Service one of type LoadBalancer with an address of each family.
func balanced(s *corev1.Service) {
	s.Spec.Type = corev1.ServiceTypeLoadBalancer
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lbV4.String()}, {IP: lbV6.String()}}
}

// routeOutside sends addresses from the outside to the node: as its neighbours do once the node has
// announced them, or to pods, so that nothing but a policy keeps the outside from them.
func (n *testNode) routeOutside(addrs ...netip.Addr) {
	n.t.Helper()
	n.outside.do(n.t, func() error {
		var errs []error
		for _, a := range addrs {
			gateway := nodeV6
			if a.Is4() {
				gateway = nodeV4
			}
			errs = append(errs, routeVia("eth0", a, gateway, netip.Addr{}))
		}
		return errors.Join(errs...)
	})
}

// TestLoadBalancer: its addresses lead to the pods from inside and from outside, only for clients of its
// source ranges if there are some.
func TestLoadBalancer(t *testing.T) {
	n := newNode(t)
	a, b, other := n.pod("a"), n.pod("b"), n.pod("other")
	serve(t, b.ns, "b", 8080)
	n.routeOutside(lbV4, lbV6)
	n.service("web", balanced, b)
	lb := []netip.AddrPort{at(lbV4, 80), at(lbV6, 80)}
	for _, network := range []string{"tcp", "udp"} {
		for _, to := range lb {
			n.answers(a.ns, network, to, "b")
			n.answers(0, network, to, "b")
			for _, from := range []namespace{a.ns, n.outside} {
				if name, _, err := n.askAs(from, network, to); name != "b" {
					t.Errorf("%s %s: %q, %v", network, to, name, err)
				}
			}
		}
	}
	// Now for one pod and the outside's IPv6 address only.
	svc, err := n.client.CoreV1().Services("default").Get(context.Background(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	svc.Spec.LoadBalancerSourceRanges = []string{a.v4().String() + "/32", outsideV6.String() + "/128", a.v6().String() + "/128"}
	if _, err := n.client.CoreV1().Services("default").Update(context.Background(), svc, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, to := range lb {
		eventually(t, "forbidden", func() error {
			if _, _, err := ask(other.ns, "tcp", to); !errors.Is(err, syscall.EPERM) {
				return fmt.Errorf("%s from another pod: got %w, want operation not permitted", to, err)
			}
			return nil
		})
		n.answers(a.ns, "tcp", to, "b")
		if _, _, err := ask(0, "udp", to); !errors.Is(err, syscall.EPERM) {
			t.Errorf("%s from the node: %v", to, err)
		}
		if name, _, err := n.askAs(a.ns, "tcp", to); name != "b" {
			t.Errorf("%s from the pod, packet by packet: %q, %v", to, name, err)
		}
	}
	if name, _, err := n.askAs(n.outside, "tcp", lb[1]); name != "b" {
		t.Errorf("IPv6 from outside: %q, %v", name, err)
	}
}

// TestPacketSourceRanges: whom a frontend is for, packet by packet, and that a change is one.
func TestPacketSourceRanges(t *testing.T) {
	each(t, func(t *testing.T, r *rig, i int, s segment) {
		to := at([]netip.Addr{lbV4, lbV6}[i], 80)
		apply := func(ranges ...netip.Prefix) {
			t.Helper()
			set := services.Set{
				Name: "ranged", Proto: s.proto, Ranges: ranges, Backends: []netip.AddrPort{at(podB[i], 8080)},
				Frontends: []services.Frontend{{Addr: to.Addr(), Port: 80, Proto: s.proto, Scope: maps.ScopeExternal, Ranged: true}},
			}
			if err := errors.Join(r.reconciler.Apply("ranged", []services.Set{set}), r.reconciler.Collect()); err != nil {
				t.Fatal(err)
			}
		}
		port := uint16(4000)
		want := func(verdict uint32, from netip.Addr) {
			t.Helper()
			port++ // a flow that is known is not judged again
			s.from, s.to = at(from, port), to
			if v, _ := r.run(t, "from_outside", s.bytes()); v != verdict {
				t.Errorf("from %s: verdict %d, want %d", from, v, verdict)
			}
		}
		whole := client[i].BitLen()
		apply(netip.PrefixFrom(client[i], whole))
		want(redirect, client[i])
		want(drop, client[i].Next())
		apply(netip.PrefixFrom(client[i].Next(), whole))
		want(drop, client[i])
		want(redirect, client[i].Next())
		apply(netip.PrefixFrom(client[i], whole-8).Masked())
		want(redirect, client[i])
		want(drop, podC[i])
		apply()
		want(drop, client[i])
	})
}

// TestHostPort: a pod's port on its node answers at the node's addresses from everywhere, and goes with it.
func TestHostPort(t *testing.T) {
	n := newNode(t)
	a, b := n.pod("a"), n.pod("b")
	serve(t, b.ns, "b", 8080)
	serve(t, a.ns, "a", 7071)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "b"},
		Spec: corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{
			{HostPort: 7070, ContainerPort: 8080}, {HostPort: 7070, ContainerPort: 8080, Protocol: corev1.ProtocolUDP},
			{HostPort: 7071, ContainerPort: 8080, HostIP: "127.0.0.1"},
		}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: b.v4().String()}, {IP: b.v6().String()}}},
	}
	pods := n.client.CoreV1().Pods("default")
	if _, err := pods.Create(context.Background(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, node := range nodeIP {
		for _, network := range []string{"tcp", "udp"} {
			to := at(node, 7070)
			n.answers(0, network, to, "b")
			n.answers(a.ns, network, to, "b")
			for _, from := range []namespace{n.outside, a.ns, b.ns} {
				name, seen, err := n.askAs(from, network, to)
				if name != "b" {
					t.Errorf("%s %s: %q, %v", network, to, name, err)
				}
				if from == n.outside && seen.Addr() != client[i] {
					t.Errorf("%s %s: the pod sees %s, want the client", network, to, seen)
				}
			}
		}
	}
	n.answers(0, "tcp", netip.MustParseAddrPort("127.0.0.1:7070"), "b")
	n.answers(0, "tcp", netip.MustParseAddrPort("127.0.0.1:7071"), "b")
	n.answers(a.ns, "tcp", netip.MustParseAddrPort("127.0.0.1:7071"), "a") // its own
	if _, _, err := n.askAs(n.outside, "tcp", at(nodeV4, 7071)); err == nil {
		t.Error("a port on the node's loopback address answers the outside")
	}
	if err := pods.Delete(context.Background(), "b", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "gone", func() error {
		if _, _, err := ask(a.ns, "tcp", at(nodeV4, 7070)); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("got %w, want connection refused", err)
		}
		return nil
	})
}

// TestAffinityAgrees: a client has the same backend whether its socket or its packets are translated.
func TestAffinityAgrees(t *testing.T) {
	n := newNode(t)
	var pods []*testPod
	for _, name := range []string{"p", "q", "r", "s"} {
		p := n.pod(name)
		serve(t, p.ns, name, 8080)
		pods = append(pods, p)
	}
	web := n.service("web", func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }, pods...)
	for i := range 6 {
		c := n.pod(fmt.Sprint("client-", i))
		for _, to := range []netip.AddrPort{web.v4, web.v6} {
			var first string
			eventually(t, "service", func() (err error) { first, _, err = ask(c.ns, "tcp", to); return err })
			for _, network := range []string{"tcp", "udp"} { // each port has a backend of its own
				name, _, err := ask(c.ns, network, to)
				if err != nil {
					t.Fatal(err)
				}
				again, _, err := n.askAs(c.ns, network, to)
				if err != nil || again != name || network == "tcp" && name != first {
					t.Errorf("client %d, %s %s: %s from sockets, %s from packets, %v", i, network, to, name, again, err)
				}
			}
		}
	}
}
