// SPDX-License-Identifier: Apache-2.0

package services

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api"
)

func ptr[T any](v T) *T { return &v }

func service(change ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
		Spec: corev1.ServiceSpec{
			ClusterIP: "10.43.0.1", ClusterIPs: []string{"10.43.0.1"}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// slice makes an IPv4 EndpointSlice of "address", "address@node", with "!" not ready, "~" terminating
// but serving, "#" terminating, and after ">" hints such as "zone:a,node:b".
func slice(endpoints ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr("http"), Protocol: ptr(corev1.ProtocolTCP), Port: ptr(int32(8080))}},
	}
	for _, text := range endpoints {
		e := discoveryv1.Endpoint{}
		text, hints, _ := strings.Cut(text, ">")
		for _, h := range strings.FieldsFunc(hints, func(r rune) bool { return r == ',' }) {
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			if zone, ok := strings.CutPrefix(h, "zone:"); ok {
				e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: zone})
			} else {
				e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: strings.TrimPrefix(h, "node:")})
			}
		}
		mark := strings.TrimRight(text, "!~#")
		switch text[len(mark):] {
		case "!":
			e.Conditions = discoveryv1.EndpointConditions{Ready: ptr(false), Serving: ptr(false)}
		case "~":
			e.Conditions = discoveryv1.EndpointConditions{Ready: ptr(false), Serving: ptr(true), Terminating: ptr(true)}
		case "#":
			e.Conditions = discoveryv1.EndpointConditions{Ready: ptr(false), Serving: ptr(false), Terminating: ptr(true)}
		}
		address, node, _ := strings.Cut(mark, "@")
		e.Addresses = []string{address}
		if node != "" {
			e.NodeName = &node
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// describe writes sets as lines "flags frontends -> backends".
func describe(sets []Set) []string {
	var out []string
	for _, s := range sets {
		var f, b []string
		for _, x := range s.Frontends {
			mark := ""
			if x.Ranged {
				mark = fmt.Sprint(s.Ranges)
			}
			f = append(f, fmt.Sprintf("%s/%d%s", netip.AddrPortFrom(x.Addr, x.Port), x.Scope, mark))
		}
		for _, x := range s.Backends {
			b = append(b, x.String())
		}
		out = append(out, fmt.Sprintf("%s flags=%d affinity=%d: %s -> %s", strings.TrimPrefix(s.Name, "ns/web:"), s.Flags, s.AffinitySeconds,
			strings.Join(f, " "), strings.Join(b, " ")))
	}
	return out
}

func TestBuild(t *testing.T) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	nodePort := func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort; s.Spec.Ports[0].NodePort = 30080 }
	for _, c := range []struct {
		name string
		svc  *corev1.Service
		eps  []string
		want []string
	}{
		{"ready, sorted, once", service(), []string{"10.42.0.2", "10.42.0.1", "10.42.0.2"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080 10.42.0.2:8080"}},
		{"not ready are left out", service(), []string{"10.42.0.1", "10.42.0.2!", "10.42.0.3~"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080"}},
		{"terminating but serving, if none is ready", service(), []string{"10.42.0.2!", "10.42.0.3~", "10.42.0.4#"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.3:8080"}},
		{"none", service(), nil,
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> "}},
		{"NodePort", service(nodePort), []string{"10.42.0.1@here", "10.42.0.2@there"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 0.0.0.0:30080/0 0.0.0.0:30080/1 10.43.0.1:80/0 -> 10.42.0.1:8080 10.42.0.2:8080"}},
		{"NodePort, external policy Local", service(nodePort, func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}), []string{"10.42.0.1@here~", "10.42.0.2@there"},
			[]string{
				"http/TCP/IPv4 flags=0 affinity=0: 0.0.0.0:30080/0 10.43.0.1:80/0 -> 10.42.0.2:8080",
				"http/TCP/IPv4/local flags=2 affinity=0: 0.0.0.0:30080/1 -> 10.42.0.1:8080",
			}},
		{"internal policy Local", service(func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &local }), []string{"10.42.0.1@there"},
			[]string{"http/TCP/IPv4/local flags=2 affinity=0: 10.43.0.1:80/0 -> "}},
		{"affinity", service(func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }), []string{"10.42.0.1"},
			[]string{"http/TCP/IPv4 flags=1 affinity=10800: 10.43.0.1:80/0 -> 10.42.0.1:8080"}},
		{"external and load balancer addresses", service(func(s *corev1.Service) {
			s.Spec.ExternalIPs = []string{"198.51.100.1", "2001:db8::9"}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.2"}, {Hostname: "lb"},
				{IP: "198.51.100.3", IPMode: ptr(corev1.LoadBalancerIPModeProxy)}}
		}), []string{"10.42.0.1"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 198.51.100.1:80/0 198.51.100.1:80/1 198.51.100.2:80/0 198.51.100.2:80/1 -> 10.42.0.1:8080"}},
		{"source ranges, for the load balancer's address only", service(nodePort, func(s *corev1.Service) {
			s.Spec.LoadBalancerSourceRanges = []string{" 198.51.100.7/24", "2001:db8::/32"}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.2"}}
		}), []string{"10.42.0.1"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 0.0.0.0:30080/0 0.0.0.0:30080/1 10.43.0.1:80/0 198.51.100.2:80/0[198.51.100.0/24] 198.51.100.2:80/1[198.51.100.0/24] -> 10.42.0.1:8080"}},
		{"an address that is external and the load balancer's is for the few", service(func(s *corev1.Service) {
			s.Spec.ExternalIPs = []string{"198.51.100.2"}
			s.Spec.LoadBalancerSourceRanges = []string{"2001:db8::/32"}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.2"}}
		}), []string{"10.42.0.1"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 198.51.100.2:80/0[] 198.51.100.2:80/1[] -> 10.42.0.1:8080"}},
		{"source ranges and policy Local", service(func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			s.Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.2"}}
		}), []string{"10.42.0.1@here"},
			[]string{
				"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 198.51.100.2:80/0[198.51.100.0/24] -> 10.42.0.1:8080",
				"http/TCP/IPv4/local flags=2 affinity=0: 198.51.100.2:80/1[198.51.100.0/24] -> 10.42.0.1:8080",
			}},
		{"meant for this zone", service(), []string{"10.42.0.1>zone:z1", "10.42.0.2>zone:z2", "10.42.0.3!>zone:z1"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080"}},
		{"meant for this node before its zone", service(), []string{"10.42.0.1>zone:z1,node:there", "10.42.0.2>zone:z1,node:here"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.2:8080"}},
		{"nobody is meant for this node, some for its zone", service(), []string{"10.42.0.1>zone:z1,node:there", "10.42.0.2>zone:z2,node:there"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080"}},
		{"nobody is meant for this zone", service(), []string{"10.42.0.1>zone:z2", "10.42.0.2>zone:z3"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080 10.42.0.2:8080"}},
		{"one without a hint voids all", service(), []string{"10.42.0.1>zone:z1", "10.42.0.2"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080 10.42.0.2:8080"}},
		{"terminating ones need no hint", service(), []string{"10.42.0.1>zone:z1", "10.42.0.2>zone:z2", "10.42.0.3~"},
			[]string{"http/TCP/IPv4 flags=0 affinity=0: 10.43.0.1:80/0 -> 10.42.0.1:8080"}},
		{"hints do not rule policy Local", service(nodePort, func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}), []string{"10.42.0.1@here>zone:z2", "10.42.0.2@there>zone:z1"},
			[]string{
				"http/TCP/IPv4 flags=0 affinity=0: 0.0.0.0:30080/0 10.43.0.1:80/0 -> 10.42.0.2:8080",
				"http/TCP/IPv4/local flags=2 affinity=0: 0.0.0.0:30080/1 -> 10.42.0.1:8080",
			}},
		{"headless", service(func(s *corev1.Service) { s.Spec.ClusterIP = "None"; s.Spec.ClusterIPs = []string{"None"} }), []string{"10.42.0.1"}, nil},
		{"external name", service(func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }), nil, nil},
		{"node-local", service(func(s *corev1.Service) { s.Annotations = map[string]string{api.NodeLocalAnnotation: "true"} }), []string{"10.42.0.1"}, nil},
		{"SCTP", service(func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolSCTP }), []string{"10.42.0.1"}, nil},
		{"other family", service(func(s *corev1.Service) {
			s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol}
			s.Spec.ClusterIPs = []string{"fd73::1"}
		}), []string{"10.42.0.1"},
			[]string{"http/TCP/IPv6 flags=0 affinity=0: [fd73::1]:80/0 -> "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Build(c.svc, []*discoveryv1.EndpointSlice{slice(c.eps...)}, Place{Node: "here", Zone: "z1"})
			if diff := cmp.Diff(c.want, describe(got.Sets)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
