// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
	"skep.io/skep/dataplane/maps"
)

// TestTraceAgreesWithTheKernel: what trace says of random connections under random policies is what happens to them.
func TestTraceAgreesWithTheKernel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	n := newNode(t)
	names := []string{"a", "b", "c"}
	pods := map[string]*testPod{}
	for _, name := range names {
		pods[name] = n.pod(name)
		n.announce(pods[name])
		serve(t, pods[name].ns, name, 8080)
		serve(t, pods[name].ns, name, 9090)
	}
	web, none := n.service("web", nil, pods["b"]), n.service("none", nil)
	n.service("ranged", func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.LoadBalancerSourceRanges = []string{pods["a"].v4().String() + "/32", pods["a"].v6().String() + "/128"}
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lbV4.String()}, {IP: lbV6.String()}}
	}, pods["c"])
	n.answers(0, "tcp", web.v4, "b")
	nobody := serviceCIDRs[0].Addr().As4()
	nobody[2], nobody[3] = 98, 98
	var targets []netip.AddrPort
	for i := range 2 {
		for _, p := range pods {
			targets = append(targets, at(p.Addrs[i], 8080), at(p.Addrs[i], 9090))
		}
		targets = append(targets, web.at(nodeIP[i]), none.at(nodeIP[i]))
	}
	targets = append(targets, at(lbV4, 80), at(lbV6, 80), web.v4, web.v6, none.v4, none.v6, at(netip.AddrFrom4(nobody), 80), at(podCIDRs[0].Addr().Next().Next(), 8080))

	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		for range rng.IntN(3) {
			p := pods[names[rng.IntN(3)]]
			switch rng.IntN(3) {
			case 0:
				out = append(out, blockPeer(netip.PrefixFrom(p.Addrs[rng.IntN(2)], 30).Masked().String()))
			default:
				out = append(out, podPeer(p.Name))
			}
		}
		return out
	}
	seen := map[flows.Verdict]int{}
	for range 12 {
		for _, name := range names {
			for direction, make := range map[string]func(string, ...networkingv1.NetworkPolicyPeer) *networkingv1.NetworkPolicy{"in-": in, "out-": out} {
				if rng.IntN(2) == 0 {
					_ = n.client.NetworkingV1().NetworkPolicies("default").Delete(context.Background(), direction+name, metav1.DeleteOptions{})
				} else {
					n.policy(make(name, peers()...))
				}
			}
		}
		for range 20 {
			from, q := namespace(0), inspect.Question{To: targets[rng.IntN(len(targets))], Protocol: maps.TCP}
			who := "the node"
			if i := rng.IntN(4); i < 3 {
				who, from = names[i], pods[names[i]].ns
				q.From = pods[names[i]].v4()
				if q.To.Addr().Is6() {
					q.From = pods[names[i]].v6()
				}
			}
			network := "tcp"
			if rng.IntN(3) == 0 {
				network, q.Protocol = "udp", maps.UDP
			}
			var verdict flows.Verdict
			eventually(t, fmt.Sprintf("%s from %s to %s", network, who, q.To), func() error {
				// Policies may be on their way to the kernel still, so that a trace and a connection see different ones.
				trace, err := n.dp.Trace(q)
				if err != nil {
					return err
				}
				verdict = trace.Verdict
				return agrees(verdict, from, network, q.To)
			})
			seen[verdict]++
		}
	}
	for _, v := range flows.Verdicts {
		if seen[v] < 10 {
			t.Errorf("only %d connections were %s: the test has lost its point", seen[v], v)
		}
	}
}

// agrees tries a connection and compares.
func agrees(verdict flows.Verdict, from namespace, network string, to netip.AddrPort) error {
	var reached bool
	switch {
	case verdict == flows.Forwarded:
		_, _, err := ask(from, network, to)
		if err != nil {
			return fmt.Errorf("trace says %s: %w", verdict, err)
		}
		return nil
	case network == "udp":
		reached = reaches(from, to)
	default:
		reached = from.try(func() error { return knock(to) }) == nil
	}
	if reached {
		return fmt.Errorf("trace says %s, but it was forwarded", verdict)
	}
	return nil
}

// TestTraceExplains: service, candidates, policies, route, and what to change.
func TestTraceExplains(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b", "c")
	a, b, c := pods[0], pods[1], pods[2]
	web := n.service("web", nil, b, c)
	eventually(t, "the service", func() error {
		if err := knock(web.v4); err != nil {
			return err
		}
		_, _, err := ask(a.ns, "tcp", web.v6)
		return err
	})
	n.policy(in("b", podPeer("c")))
	var trace inspect.Trace
	eventually(t, "the policy", func() (err error) {
		if trace, err = n.dp.Trace(inspect.Question{From: a.v4(), To: web.v4, Protocol: maps.TCP}); err == nil && trace.Verdict != "" {
			err = fmt.Errorf("%+v", trace)
		}
		return err
	})
	if trace.Service == nil || trace.Service.Service != "web" || len(trace.Paths) != 2 || trace.From.Pod != "a" || trace.Reason != "depends on the backend" {
		t.Fatalf("%+v", trace)
	}
	toB, toC := trace.Paths[0], trace.Paths[1]
	if toB.To.Pod != "b" || toB.Verdict != flows.Dropped || toB.Reason != "policy-ingress" || toB.Ingress == nil || fmt.Sprint(toB.Ingress.Policies) != "[default/in-b]" {
		t.Errorf("%+v", toB)
	}
	if toC.To.Pod != "c" || toC.Verdict != flows.Forwarded || toC.Egress.State != inspect.Open || toC.Ingress.State != inspect.Open {
		t.Errorf("%+v", toC)
	}
	want := "Policies isolate pod default/b, and none of them lets default/a in to port 8080/TCP: add an ingress rule to one of default/in-b."
	if len(trace.Advice) != 1 || trace.Advice[0] != want {
		t.Errorf("advice %q", trace.Advice)
	}
	trace, err := n.dp.Trace(inspect.Question{From: outsideV4, To: web.at(nodeV4), Protocol: maps.TCP})
	if err != nil || trace.Service == nil || trace.Service.Scope != "external" || trace.Paths[0].Verdict != flows.Dropped {
		t.Errorf("%+v, %v", trace, err)
	}
	trace, err = n.dp.Trace(inspect.Question{To: at(outsideV4, 80), Protocol: maps.TCP})
	if err != nil || trace.Verdict != flows.Forwarded || trace.Paths[0].Route != "routed to eth0" {
		t.Errorf("%+v, %v", trace, err)
	}
}
