// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// seen waits for an event that match takes.
func (n *testNode) seen(what string, match func(flows.Flow) bool) (found flows.Flow) {
	n.t.Helper()
	eventually(n.t, what, func() error {
		var all []flows.Flow
		err := n.dp.Flows(context.Background(), false, func(f flows.Flow) error {
			all = append(all, f)
			if match(f) {
				found = f
			}
			return nil
		})
		if err == nil && found.Verdict == "" {
			err = fmt.Errorf("not among %d events, the last of which is %+v", len(all), all[max(0, len(all)-1):])
		}
		return err
	})
	return found
}

// TestFlows: connections with the service that was asked for, drops with their policies or reasons, refusals.
func TestFlows(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b", "c")
	a, b, c := pods[0], pods[1], pods[2]
	web, none := n.service("web", nil, b), n.service("none", nil)
	for i, vip := range []netip.AddrPort{web.v4, web.v6} {
		for _, network := range []string{"tcp", "udp"} {
			n.answers(a.ns, network, vip, "b")
			f := n.seen(network+" through a ClusterIP", func(f flows.Flow) bool {
				return f.Destination.Address == b.Addrs[i] && f.Source.Pod == "a" && (f.Protocol == "TCP") == (network == "tcp") && f.Service != nil
			})
			if f.Verdict != flows.Forwarded || f.Service.Name != "web" || f.Service.Namespace != "default" || f.Service.Address != vip ||
				f.Destination.Pod != "b" || f.Destination.Port != 8080 || f.Source.Address != a.Addrs[i] || f.Node != "node-1" {
				t.Errorf("%+v, service %+v", f, f.Service)
			}
		}
		eventually(t, "NodePort", func() error {
			_, _, err := n.askAs(n.outside, "tcp", web.at(nodeIP[i]))
			return err
		})
		f := n.seen("NodePort", func(f flows.Flow) bool { return f.Source.Address == client[i] && f.Service != nil })
		if f.Verdict != flows.Forwarded || f.Service.Name != "web" || f.Service.Address != netip.AddrPortFrom(nodeIP[i], web.node) || f.Destination.Pod != "b" {
			t.Errorf("%+v, service %+v", f, f.Service)
		}
	}
	n.answers(0, "tcp", at(b.v4(), 8080), "b")
	f := n.seen("from the node", func(f flows.Flow) bool { return f.Source.Node == "node-1" })
	if f.Destination.Pod != "b" || f.Verdict != flows.Forwarded {
		t.Errorf("%+v", f)
	}

	if err := a.ns.try(func() error { return knock(none.v4) }); err == nil {
		t.Error("a service without endpoints was reached")
	}
	f = n.seen("no backend", func(f flows.Flow) bool { return f.Reason == "no-backend" })
	if f.Verdict != flows.Refused || f.Service == nil || f.Service.Name != "none" || f.Source.Pod != "a" || f.Destination.Address != none.v4.Addr() {
		t.Errorf("%+v, service %+v", f, f.Service)
	}
	nobody := netip.AddrFrom4([4]byte{serviceCIDRs[0].Addr().As4()[0], serviceCIDRs[0].Addr().As4()[1], 99, 99})
	if err := knock(at(nobody, 80)); err == nil {
		t.Error("an unknown address was reached")
	}
	f = n.seen("nobody's address", func(f flows.Flow) bool { return f.Reason == "no-such-address" })
	if f.Verdict != flows.Refused || f.Source.Node != "node-1" || f.Destination.Port != 80 {
		t.Errorf("%+v", f)
	}

	n.policy(in("b"))
	n.policy(out("a", podPeer("x")))
	eventually(t, "a is denied", func() error {
		if reaches(a.ns, at(b.v4(), 8080)) {
			return errors.New("it reaches b")
		}
		return nil
	})
	for i := range 2 {
		if reaches(a.ns, at(b.Addrs[i], 8080)) || reaches(c.ns, at(b.Addrs[i], 8080)) {
			t.Error("it reaches b")
		}
		f := n.seen("egress", func(f flows.Flow) bool {
			return f.Verdict == flows.Dropped && f.Source.Pod == "a" && f.Destination.Address == b.Addrs[i]
		})
		if f.Reason != "policy-egress" || f.Direction != "egress" || !slices.Equal(f.Policies, []string{"default/out-a"}) || f.Protocol != "UDP" || f.Destination.Port != 8080 {
			t.Errorf("%+v", f)
		}
		f = n.seen("ingress", func(f flows.Flow) bool { return f.Verdict == flows.Dropped && f.Source.Address == c.Addrs[i] })
		if f.Reason != "policy-ingress" || f.Direction != "ingress" || !slices.Equal(f.Policies, []string{"default/in-b"}) || f.Destination.Pod != "b" {
			t.Errorf("%+v", f)
		}
	}
	bad := in("b", blockPeer("10.0.0.0/33"))
	n.policy(bad)
	eventually(t, "b is closed", func() error {
		if len(n.dp.PolicyProblems()) == 0 {
			return errors.New("no problem")
		}
		return nil
	})
	reaches(c.ns, at(b.v4(), 8080))
	f = n.seen("closed", func(f flows.Flow) bool { return f.Reason == "policy-not-in-force" })
	if !slices.Equal(f.Policies, []string{"default/in-b"}) || f.Destination.Pod != "b" {
		t.Errorf("%+v", f)
	}

	another := podCIDRs[0].Addr().Next().Next()
	a.ns.do(t, func() error { return addr("eth0", netip.PrefixFrom(another, 32)) })
	a.ns.do(t, func() error {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(at(another, 7)), net.UDPAddrFromAddrPort(at(b.v4(), 8080)))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		return err
	})
	f = n.seen("spoofed", func(f flows.Flow) bool { return f.Reason == "spoofed-source" })
	if f.Source.Pod != "a" || f.Source.Address != another || f.Verdict != flows.Dropped {
		t.Errorf("%+v", f)
	}
	if age := time.Since(f.Time); age < 0 || age > time.Minute {
		t.Errorf("it was %s ago", age)
	}
}

// TestFlowsFollow: who follows is woken by each event.
func TestFlowsFollow(t *testing.T) {
	n := newNode(t)
	a := n.pod("a")
	serve(t, a.ns, "a", 8080)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	got, ended := make(chan flows.Flow, 100), make(chan error, 1)
	go func() {
		ended <- n.dp.Flows(ctx, true, func(f flows.Flow) error {
			got <- f
			return nil
		})
	}()
	for range 3 {
		n.answers(0, "tcp", at(a.v4(), 8080), "a")
		select {
		case f := <-got:
			if f.Destination.Pod != "a" {
				t.Errorf("%+v", f)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("no event")
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	followers, err := n.dp.maps.Followers()
	if err != nil || followers != 0 {
		t.Errorf("%d followers are left: %v", followers, err)
	}
}

// TestFlowBudget: a flood of drops and a flood of connections are told of at a bounded rate, what is left out
// is counted, and neither takes the other's budget.
func TestFlowBudget(t *testing.T) {
	r := newPolicyRig(t)
	events, err := r.Maps().OpenEvents()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	r.set(t, in("b"))
	read := func() (drops, opened, suppressed int) {
		t.Helper()
		if err := events.Flush(); err != nil {
			t.Fatal(err)
		}
		for {
			e, err := events.Next()
			if errors.Is(err, maps.ErrFlushed) {
				return drops, opened, suppressed
			}
			if err != nil {
				t.Fatal(err)
			}
			suppressed += int(e.Suppressed)
			if e.Reason == 0 {
				opened++
			} else {
				drops++
			}
		}
	}
	const flood = 5000
	s := segment{proto: maps.UDP, payload: []byte("x")}
	began := time.Now()
	for range flood {
		r.wants(t, "denied", "from_pod", r.between(s, podA[0], podB[0], 8080).bytes(), drop)
	}
	r.wants(t, "allowed", "from_pod", r.between(s, podB[0], podA[0], 8080).bytes(), redirect)
	took := time.Since(began)
	drops, opened, _ := read()
	// A CPU may tell of a second's worth at once, and of the rate after that; the test may have moved between CPUs.
	limit := (int(200*(took.Seconds()+1)) + 1) * runtime.NumCPU()
	if drops == 0 || drops > limit || drops >= flood {
		t.Errorf("%d drops of %d were told of in %s, at most %d should be", drops, flood, took, limit)
	}
	if opened != 1 {
		t.Errorf("%d connections were told of, after a flood of drops", opened)
	}
	values, err := r.Maps().Counters()
	if err != nil {
		t.Fatal(err)
	}
	results := map[string]uint64{}
	for i, c := range flows.Counters {
		if c.Labels["result"] != "" && c.Labels["hook"] == "" {
			results[c.Labels["result"]] = values[i]
		}
	}
	if results["told"] != uint64(drops+opened) || results["told"]+results["over-budget"] != flood+1 {
		t.Errorf("counted: %v", results)
	}
}
