// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// BenchmarkPolicyRules has four servers whose ingress 0, 100, 1,000 and 10,000 rules limit, of which the last admits the
// client, and measures requests on a kept connection and new connections. Rounds alternate; -benchtime=5x or more.
func BenchmarkPolicyRules(b *testing.B) {
	n := newNode(b)
	client := n.pod("client")
	n.announce(client)
	var lines []line
	for _, rules := range []int{0, 100, 1_000, 10_000} {
		name := fmt.Sprint("rules-", rules)
		const perPolicy = 100
		for first := 0; first < rules; first += perPolicy {
			n.policy(limit(name, first, perPolicy, first+perPolicy == rules))
		}
		p := n.pod(name)
		n.announce(p)
		serve(b, p.ns, name, 8081)
		acceptAll(b, p.ns)
		lines = append(lines, line{fmt.Sprint(rules, "-rules"), client.ns, at(p.v4(), 8080)})
	}
	// Nobody but the client may: the rules are in force.
	last := lines[len(lines)-1]
	eventually(b, "policies", func() error {
		if p := n.dp.PolicyProblems(); len(p) > 0 {
			return fmt.Errorf("%v", p)
		}
		other := lines[len(lines)-2]
		if err := last.from.try(func() error { return connectTimes(last.to, 1) }); err != nil {
			return err
		}
		return other.from.try(func() error { return connectTimes(other.to, 1) })
	})
	connectInTurn(b, "connections-", lines)

	took := make([][]float64, len(lines))
	const requests = 5000
	for round := range b.N {
		for i := range lines {
			k := (i + round) % len(lines)
			l := lines[k]
			l.from.do(b, func() error {
				seconds, err := exchange(netip.AddrPortFrom(l.to.Addr(), 8081), requests)
				took[k] = append(took[k], seconds)
				return err
			})
		}
	}
	b.ReportMetric(0, "ns/op")
	for k, l := range lines {
		ratios := make([]float64, b.N)
		for r := range b.N {
			ratios[r] = took[0][r] / took[k][r]
		}
		b.ReportMetric(requests/median(took[k]), "requests-"+l.name+"/s")
		if k > 0 {
			b.ReportMetric(median(ratios), "requests-"+l.name+":"+lines[0].name)
		}
	}
}

// limit is a policy of so many rules for a pod; if it is the last, its last rule admits the pod "client".
func limit(pod string, first, rules int, last bool) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(pod, "-", first)}, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": pod}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
	}}
	ports := []networkingv1.NetworkPolicyPort{{Protocol: ptr(corev1.ProtocolTCP), Port: ptr(intstr.FromInt32(8080)), EndPort: ptr(int32(8081))}}
	for i := first; i < first+rules; i++ {
		peer := networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.77.%d.%d/32", i>>8, i&255)}}
		if last && i == first+rules-1 {
			peer = networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "client"}}}
		}
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{peer}, Ports: ports})
	}
	return p
}

// exchange sends requests of one byte on one connection to a server that serve made, and waits for each echo.
func exchange(to netip.AddrPort, requests int) (seconds float64, err error) {
	c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return 0, err
	}
	buf := make([]byte, 1)
	for buf[0] != '\n' { // the end of its greeting
		if _, err := io.ReadFull(c, buf); err != nil {
			return 0, err
		}
	}
	begin := time.Now()
	for range requests {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return 0, err
		}
	}
	return time.Since(begin).Seconds(), nil
}
