// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"
)

// announce makes the pod known to the API, with a label app of its name.
func (n *testNode) announce(p *testPod) {
	n.t.Helper()
	o := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: p.Name, UID: p.PodUID, Labels: map[string]string{"app": p.Name}}}
	for _, a := range p.Addrs {
		o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if _, err := n.client.CoreV1().Pods("default").Create(context.Background(), o, metav1.CreateOptions{}); err != nil {
		n.t.Fatal(err)
	}
}

// policy makes one so, as in and out of the packet tests name it.
func (n *testNode) policy(p *networkingv1.NetworkPolicy) {
	n.t.Helper()
	p.Namespace = "default"
	api := n.client.NetworkingV1().NetworkPolicies("default")
	_, err := api.Update(context.Background(), p, metav1.UpdateOptions{})
	if err != nil {
		_, err = api.Create(context.Background(), p, metav1.CreateOptions{})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// reaches says whether a datagram to the address is answered.
func reaches(from namespace, to netip.AddrPort) bool {
	err := from.try(func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return err
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 64))
		return err
	})
	return err == nil
}

// servingPods makes pods that policies know, and that answer on port 8080.
func (n *testNode) servingPods(names ...string) (pods []*testPod) {
	n.t.Helper()
	for _, name := range names {
		p := n.pod(name)
		n.announce(p)
		serve(n.t, p.ns, p.Name, 8080)
		pods = append(pods, p)
	}
	return pods
}

// TestNetworkPolicy: sockets see what policies say, established connections follow, and an agent that
// starts anew neither opens nor closes anything.
func TestNetworkPolicy(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b", "c")
	a, b, c := pods[0], pods[1], pods[2]
	web := n.service("web", nil, b)
	n.routeOutside(b.Addrs...)
	for i := range 2 {
		n.answers(a.ns, "tcp", at(b.Addrs[i], 8080), "b")
		n.answers(n.outside, "tcp", at(b.Addrs[i], 8080), "b")
	}
	n.answers(a.ns, "tcp", web.v4, "b")

	established := func(from *testPod) *bufio.ReadWriter {
		t.Helper()
		var rw *bufio.ReadWriter
		from.ns.do(t, func() error {
			conn, err := net.DialTimeout("tcp", at(b.v6(), 8080).String(), 5*time.Second)
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			rw = bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(&deadlined{conn}))
			_, err = rw.ReadString('\n')
			return err
		})
		return rw
	}
	ofA, ofC := established(a), established(c)
	echo := func(rw *bufio.ReadWriter) error {
		if _, err := rw.WriteString("still there\n"); err != nil {
			return err
		}
		if err := rw.Flush(); err != nil {
			return err
		}
		_, err := rw.ReadString('\n')
		return err
	}

	n.policy(in("b", podPeer("a")))
	eventually(t, "c is denied", func() error {
		if reaches(c.ns, at(b.v4(), 8080)) {
			return errors.New("it reaches b")
		}
		return nil
	})
	for i := range 2 {
		if reaches(c.ns, at(b.Addrs[i], 8080)) || reaches(n.outside, at(b.Addrs[i], 8080)) {
			t.Error("a denied peer reaches b")
		}
		for _, network := range []string{"tcp", "udp"} {
			n.answers(a.ns, network, at(b.Addrs[i], 8080), "b")
			n.answers(0, network, at(b.Addrs[i], 8080), "b") // as a health probe
			n.answers(b.ns, network, at(a.Addrs[i], 8080), "a")
		}
	}
	n.answers(a.ns, "tcp", web.v4, "b")
	if reaches(c.ns, web.v4) {
		t.Error("a denied peer reaches b by a service")
	}
	if err := echo(ofA); err != nil {
		t.Errorf("an allowed connection that was established before: %v", err)
	}
	if err := echo(ofC); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a denied connection that was established before: %v", err)
	}

	// Changes beside it, and an agent's restart, under the connection and under attack.
	stop := make(chan struct{})
	broken := make(chan error, 1)
	go func() {
		defer close(broken)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, err := ask(a.ns, "tcp", at(b.Addrs[i%2], 8080)); err != nil {
				broken <- fmt.Errorf("an allowed connection: %w", err)
				return
			}
			if c.ns.try(func() error { return knock(at(b.Addrs[i%2], 8080)) }) == nil {
				broken <- errors.New("a denied connection was made")
				return
			}
		}
	}()
	for i := range 20 {
		n.policy(in("b", podPeer("a"), podPeer([]string{"x", "y"}[i%2])))
		n.policy(in("c", podPeer([]string{"x", "y"}[i%2])))
	}
	n.stop()
	n.start()
	close(stop)
	for err := range broken {
		t.Error(err)
	}
	if err := echo(ofA); err != nil {
		t.Errorf("the connection after all that: %v", err)
	}
	// Nothing of the earlier agent is left once its pods are claimed.
	if err := n.dp.PruneEndpoints(context.Background(), []Endpoint{a.Endpoint, b.Endpoint, c.Endpoint}); err != nil {
		t.Fatal(err)
	}
	n.answers(a.ns, "tcp", at(b.v4(), 8080), "b")
	if reaches(c.ns, at(b.v4(), 8080)) {
		t.Error("c reaches b")
	}
	for _, name := range []string{"in-b", "in-c"} {
		if err := n.client.NetworkingV1().NetworkPolicies("default").Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	n.answers(c.ns, "udp", at(b.v4(), 8080), "b")
	eventually(t, "all is gone", func() error {
		state, err := n.dp.maps.PolicyState()
		if err == nil && state.Version != 0 {
			err = fmt.Errorf("state %+v", state)
		}
		return err
	})
}

// deadlined bounds an echo that never comes.
type deadlined struct{ net.Conn }

func (d *deadlined) Write(b []byte) (int, error) {
	if err := d.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return 0, err
	}
	return d.Conn.Write(b)
}

// knock fails unless a connection is made soon.
func knock(to netip.AddrPort) error {
	c, err := net.DialTimeout("tcp", to.String(), 50*time.Millisecond)
	if err != nil {
		return err
	}
	return c.Close()
}

// TestPolicyProblem: a policy that cannot be put into force closes the pod, and says so where people look.
func TestPolicyProblem(t *testing.T) {
	n := newNode(t)
	n.stop()
	events := record.NewFakeRecorder(10)
	n.cfg.Events = events
	n.start()
	b := n.pod("b")
	n.announce(b)
	serve(t, b.ns, "b", 8080)
	n.routeOutside(b.Addrs...)
	n.answers(n.outside, "tcp", at(b.v4(), 8080), "b")
	bad := in("b", blockPeer("10.0.0.0/33"))
	n.policy(bad)
	select {
	case e := <-events.Events:
		if !strings.Contains(e, "NotInForce") || !strings.Contains(e, "10.0.0.0/33") {
			t.Errorf("event %q", e)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("no event")
	}
	if len(n.dp.PolicyProblems()) != 1 {
		t.Errorf("problems: %v", n.dp.PolicyProblems())
	}
	n.answers(0, "tcp", at(b.v4(), 8080), "b")
	if reaches(n.outside, at(b.v4(), 8080)) {
		t.Error("the pod is open")
	}
}
