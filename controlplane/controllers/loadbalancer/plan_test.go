// SPDX-License-Identifier: Apache-2.0

package loadbalancer

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"skep.io/skep/api"
	"skep.io/skep/api/v1alpha1"
)

func ptr[T any](v T) *T { return &v }

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

type option func(*corev1.Service)

// service makes one of type LoadBalancer on port 80, IPv4, made the n-th.
func service(name string, n int, options ...option) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(start.Add(time.Duration(n) * time.Hour))},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}},
		},
	}
	for _, o := range options {
		o(s)
	}
	return s
}

func has4(addrs ...string) option {
	return func(s *corev1.Service) {
		for _, a := range addrs {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a, IPMode: ptr(corev1.LoadBalancerIPModeVIP)})
		}
	}
}

func by(node string) option {
	return func(s *corev1.Service) {
		s.Status.Conditions = []metav1.Condition{{Type: api.AnnouncedCondition, Status: metav1.ConditionTrue, Message: node}}
	}
}

func dual(policy corev1.IPFamilyPolicy) option {
	return func(s *corev1.Service) {
		s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
		s.Spec.IPFamilyPolicy = &policy
	}
}

func annotated(key, value string) option {
	return func(s *corev1.Service) { s.Annotations = map[string]string{key: value} }
}

func port(n int32, proto corev1.Protocol) option {
	return func(s *corev1.Service) { s.Spec.Ports = []corev1.ServicePort{{Port: n, Protocol: proto}} }
}

func class(c string) option { return func(s *corev1.Service) { s.Spec.LoadBalancerClass = &c } }

func addressPool(name string, addresses ...string) *v1alpha1.AddressPool {
	return &v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.AddressPoolSpec{Addresses: addresses}}
}

func node(name string, isReady bool, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	status := corev1.ConditionFalse
	if isReady {
		status = corev1.ConditionTrue
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

// describe writes "name: addresses by node (reason)" of each Service that is to be written or has a problem.
func describe(changes []Change) []string {
	var out []string
	for _, c := range changes {
		if !c.Write && c.Problem == "" {
			continue
		}
		text := c.Service.Name + ":"
		for _, in := range c.Status.LoadBalancer.Ingress {
			text += " " + in.IP
		}
		after := &corev1.Service{Status: c.Status}
		if by := announcer(after); by != "" {
			text += " by " + by
		}
		if c.Reason != "" {
			text += " (" + c.Reason + ")"
		}
		out = append(out, text)
	}
	return out
}

func TestPlan(t *testing.T) {
	nodes := []*corev1.Node{node("n1", true, "192.0.2.1", "2001:db8::1")}
	pool := []*v1alpha1.AddressPool{addressPool("p", "198.51.100.4/31")}
	localPolicy := func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }
	kept := addressPool("kept", "203.0.113.9-203.0.113.9")
	kept.Spec.AutoAssign = ptr(false)
	chosen := addressPool("chosen", "203.0.113.20/32")
	chosen.Spec.ServiceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"tier": "web"}}
	for _, c := range []struct {
		name     string
		services []*corev1.Service
		pools    []*v1alpha1.AddressPool
		nodes    []*corev1.Node
		want     []string
	}{
		{"without pools, the nodes' addresses", []*corev1.Service{service("a", 1, dual(corev1.IPFamilyPolicyPreferDualStack))}, nil, nodes,
			[]string{"a: 192.0.2.1 2001:db8::1"}},
		{"only of nodes that are ready and not excluded", []*corev1.Service{service("a", 1)}, nil,
			[]*corev1.Node{node("n1", false, "192.0.2.1"), node("n2", true, "192.0.2.2"), func() *corev1.Node {
				n := node("n3", true, "192.0.2.3")
				n.Labels = map[string]string{corev1.LabelNodeExcludeBalancers: ""}
				return n
			}()}, []string{"a: 192.0.2.2"}},
		{"a node's port is one Service's, the oldest's", []*corev1.Service{service("b", 2), service("a", 1), service("udp", 3, port(80, corev1.ProtocolUDP))}, nil, nodes,
			[]string{"a: 192.0.2.1", "b: (NodePortTaken)", "udp: 192.0.2.1"}},
		{"and never the ingress's", []*corev1.Service{service("a", 1, port(443, corev1.ProtocolTCP))}, nil, nodes, []string{"a: (NodePortTaken)"}},
		{"policy Local: nodes with pods", []*corev1.Service{service("a", 1, localPolicy)}, nil,
			[]*corev1.Node{node("n1", true, "192.0.2.1"), node("local", true, "192.0.2.2")}, []string{"a: 192.0.2.2"}},
		{"from a pool, the lowest first", []*corev1.Service{service("b", 2), service("a", 1)}, pool, nodes,
			[]string{"a: 198.51.100.4 by n1", "b: 198.51.100.5 by n1"}},
		{"what is given stays, whoever is older", []*corev1.Service{service("a", 1), service("b", 2, has4("198.51.100.4"), by("n1"))}, pool, nodes,
			[]string{"a: 198.51.100.5 by n1"}},
		{"no more than there are", []*corev1.Service{service("a", 1), service("b", 2), service("c", 3)}, pool, nodes,
			[]string{"a: 198.51.100.4 by n1", "b: 198.51.100.5 by n1", "c: (AddressPoolExhausted)"}},
		{"a deleted one's is free", []*corev1.Service{
			service("a", 1, has4("198.51.100.4"), by("n1"), func(s *corev1.Service) { s.DeletionTimestamp = ptr(metav1.NewTime(start)) }),
			service("b", 2, has4("198.51.100.5"), by("n1")), service("c", 3)}, pool, nodes,
			[]string{"c: 198.51.100.4 by n1"}},
		{"a pool that comes takes over from the nodes", []*corev1.Service{service("a", 1, has4("192.0.2.1"))}, pool, nodes, []string{"a: 198.51.100.4 by n1"}},
		{"addresses that left the pool are replaced", []*corev1.Service{service("a", 1, has4("198.51.100.77"), by("n1"))}, pool, nodes, []string{"a: 198.51.100.4 by n1"}},
		{"loadBalancerIP", []*corev1.Service{service("a", 1), service("b", 2, func(s *corev1.Service) { s.Spec.LoadBalancerIP = "198.51.100.5" })}, pool, nodes,
			[]string{"a: 198.51.100.4 by n1", "b: 198.51.100.5 by n1"}},
		{"loadBalancerIP that another has", []*corev1.Service{service("a", 1, has4("198.51.100.5"), by("n1")), service("b", 2, func(s *corev1.Service) { s.Spec.LoadBalancerIP = "198.51.100.5" })}, pool, nodes,
			[]string{"b: (AddressUnavailable)"}},
		{"loadBalancerIP of no pool", []*corev1.Service{service("a", 1, func(s *corev1.Service) { s.Spec.LoadBalancerIP = "8.8.8.8" })}, pool, nodes, []string{"a: (AddressUnavailable)"}},
		{"loadBalancerIP that changes", []*corev1.Service{service("a", 1, has4("198.51.100.4"), by("n1"), func(s *corev1.Service) { s.Spec.LoadBalancerIP = "198.51.100.5" })}, pool, nodes,
			[]string{"a: 198.51.100.5 by n1"}},
		{"both families by annotation", []*corev1.Service{service("a", 1, dual(corev1.IPFamilyPolicyRequireDualStack), annotated(api.AddressesAnnotation, "2001:db8:1::7, 198.51.100.5"))},
			[]*v1alpha1.AddressPool{addressPool("p", "198.51.100.4/31", "2001:db8:1::/64")}, nodes, []string{"a: 198.51.100.5 2001:db8:1::7 by n1"}},
		{"dual-stack if it can", []*corev1.Service{service("a", 1, dual(corev1.IPFamilyPolicyPreferDualStack))}, pool, nodes, []string{"a: 198.51.100.4 by n1"}},
		{"dual-stack or a word about it", []*corev1.Service{service("a", 1, dual(corev1.IPFamilyPolicyRequireDualStack))}, pool, nodes, []string{"a: 198.51.100.4 by n1 (NoAddressPool)"}},
		{"a pool for those who name it", []*corev1.Service{service("a", 1), service("b", 2, annotated(api.AddressPoolAnnotation, "kept"))}, []*v1alpha1.AddressPool{kept}, nodes,
			[]string{"a: (NoAddressPool)", "b: 203.0.113.9 by n1"}},
		{"a pool that selects", []*corev1.Service{service("a", 1), service("b", 2, func(s *corev1.Service) { s.Labels = map[string]string{"tier": "web"} })}, []*v1alpha1.AddressPool{chosen}, nodes,
			[]string{"a: (NoAddressPool)", "b: 203.0.113.20 by n1"}},
		{"a class asks for nodes although there is a pool", []*corev1.Service{service("a", 1, class(api.LoadBalancerClassNode))}, pool, nodes, []string{"a: 192.0.2.1"}},
		{"a class asks for a pool", []*corev1.Service{service("a", 1, class(api.LoadBalancerClassPool))}, nil, nodes, []string{"a: (NoAddressPool)"}},
		{"foreign classes are left alone", []*corev1.Service{service("a", 1, class("example.com/lb"), has4("1.2.3.4"))}, pool, nodes, nil},
		{"no load balancer any more", []*corev1.Service{service("a", 1, has4("198.51.100.4"), by("n1"), func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP })}, pool, nodes, []string{"a:"}},
		{"whoever announces goes on", []*corev1.Service{service("a", 1, has4("198.51.100.4"), by("n2"))}, pool, []*corev1.Node{nodes[0], node("n2", true)}, nil},
		{"another takes over", []*corev1.Service{service("a", 1, has4("198.51.100.4"), by("n2"))}, pool, []*corev1.Node{nodes[0], node("n2", false)}, []string{"a: 198.51.100.4 by n1"}},
		{"nobody can", []*corev1.Service{service("a", 1, has4("198.51.100.4"), by("n2"))}, pool, []*corev1.Node{node("n2", false)}, []string{"a: 198.51.100.4"}},
		{"a pool that makes no sense", []*corev1.Service{service("a", 1)}, []*v1alpha1.AddressPool{addressPool("p", "198.51.100.9-198.51.100.1")}, nodes, []string{"a: (InvalidAddressPool)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Snapshot{
				Services: c.services, Pools: c.pools, Nodes: c.nodes, Reserved: map[int32]string{443: "ingress"},
				LocalTo: func(*corev1.Service) map[string]bool { return map[string]bool{"local": true} },
			}
			if diff := cmp.Diff(c.want, describe(Plan(s).Services)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestPlanProperty: over any changes of Services, pools and nodes, no two Services have one address, each is of a
// pool, nothing moves that may stay, and a second look changes nothing.
func TestPlanProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		services := map[string]*corev1.Service{}
		pools := map[string]*v1alpha1.AddressPool{"p": addressPool("p", "198.51.100.0/30")}
		isReady := map[string]bool{"n1": true, "n2": true}
		for step := range rapid.IntRange(1, 25).Draw(t, "steps") {
			name := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}).Draw(t, "service")
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0:
				delete(services, name)
			case 1:
				pools["p"] = addressPool("p", rapid.SampledFrom([]string{"198.51.100.0/30", "198.51.100.2-198.51.100.6", "198.51.100.1/32"}).Draw(t, "addresses"))
			case 2:
				n := rapid.SampledFrom([]string{"n1", "n2"}).Draw(t, "node")
				isReady[n] = !isReady[n]
			default:
				if services[name] == nil {
					services[name] = service(name, rapid.IntRange(0, step).Draw(t, "age"))
				}
			}
			look := func() (writes int) {
				s := Snapshot{LocalTo: func(*corev1.Service) map[string]bool { return nil }}
				for _, p := range pools {
					s.Pools = append(s.Pools, p)
				}
				for n, r := range isReady {
					s.Nodes = append(s.Nodes, node(n, r))
				}
				for _, svc := range services {
					s.Services = append(s.Services, svc)
				}
				r, _ := v1alpha1.ParseRange(pools["p"].Spec.Addresses[0])
				seen := map[string]string{}
				decisions := Plan(s)
				for _, c := range decisions.Services {
					before := c.Service.Status.LoadBalancer.Ingress
					after := c.Status.LoadBalancer.Ingress
					if len(before) == 1 && r.Contains(netip.MustParseAddr(before[0].IP)) && (len(after) != 1 || after[0].IP != before[0].IP) {
						t.Fatalf("%s moved from %s to %v", c.Service.Name, before[0].IP, after)
					}
					for _, in := range after {
						if other, ok := seen[in.IP]; ok {
							t.Fatalf("%s and %s have %s", other, c.Service.Name, in.IP)
						}
						seen[in.IP] = c.Service.Name
						if !r.Contains(netip.MustParseAddr(in.IP)) {
							t.Fatalf("%s is of no pool", in.IP)
						}
					}
					if by := announcer(&corev1.Service{Status: c.Status}); by != "" && !isReady[by] {
						t.Fatalf("%s is announced by %s, which is not ready", c.Service.Name, by)
					}
					if (len(after) == 0) != (c.Problem != "") {
						t.Fatalf("%s has %v, problem %q", c.Service.Name, after, c.Problem)
					}
					if c.Write {
						writes++
						services[c.Service.Name] = c.Service.DeepCopy()
						services[c.Service.Name].Status = c.Status
					}
				}
				for _, c := range decisions.Pools {
					if a := c.Status.Addresses; a.Used != int64(len(seen)) || a.Used+a.Free != a.Total || a != *c.Status.IPv4 {
						t.Fatalf("%d Services have addresses, the pool counts %+v", len(seen), a)
					}
					if c.Write {
						writes++
						changed := *c.Pool
						changed.Status = c.Status
						pools[c.Pool.Name] = &changed
					}
				}
				return writes
			}
			look()
			if n := look(); n != 0 {
				t.Fatalf("%d writes at the second look", n)
			}
		}
	})
}

// TestAnnouncersSpread: with many Services no node of four has more than twice its share.
func TestAnnouncersSpread(t *testing.T) {
	s := Snapshot{Pools: []*v1alpha1.AddressPool{addressPool("p", "10.9.0.0/16")}}
	for i := range 4 {
		s.Nodes = append(s.Nodes, node(fmt.Sprint("n", i), true))
	}
	for i := range 200 {
		s.Services = append(s.Services, service(fmt.Sprint("s", i), i))
	}
	count := map[string]int{}
	for _, c := range Plan(s).Services {
		count[announcer(&corev1.Service{Status: c.Status})]++
	}
	for n, k := range count {
		if k > 100 || k < 25 {
			t.Errorf("%s announces %d of 200", n, k)
		}
	}
	if len(count) != 4 {
		t.Errorf("announcers: %s", strings.Join(strings.Fields(fmt.Sprint(count)), " "))
	}
}
