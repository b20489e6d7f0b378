// SPDX-License-Identifier: Apache-2.0

package services

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestHealthCounts(t *testing.T) {
	balanced := func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.HealthCheckNodePort = 31000
	}
	for _, c := range []struct {
		name string
		svc  *corev1.Service
		eps  []string
		want Health
	}{
		{"ready ones here", service(balanced), []string{"10.42.0.1@here", "10.42.0.1@here", "10.42.0.2@here", "10.42.0.3@there", "10.42.0.4@here!", "10.42.0.5@here~"}, Health{31000, 2}},
		{"none here", service(balanced), []string{"10.42.0.3@there"}, Health{31000, 0}},
		{"policy Cluster", service(balanced, func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "" }), []string{"10.42.0.1@here"}, Health{}},
		{"no load balancer", service(balanced, func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }), []string{"10.42.0.1@here"}, Health{}},
	} {
		if got := Build(c.svc, []*discoveryv1.EndpointSlice{slice(c.eps...)}, Place{Node: "here"}).Health; got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestHealthServer(t *testing.T) {
	s := newHealthServer(slog.New(slog.DiscardHandler))
	defer s.close()
	at, taken := map[uint16]string{}, errors.New("address already in use")
	s.listen = func(_ context.Context, port uint16) (net.Listener, error) {
		if port == 1 {
			return nil, taken
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			at[port] = l.Addr().String()
		}
		return l, err
	}
	ask := func(port uint16) string {
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		r, err := c.Get("http://" + at[port] + "/")
		if err != nil {
			return "nobody"
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return fmt.Sprint(r.StatusCode, r.Header["X-Load-Balancing-Endpoint-Weight"], strings.TrimSpace(string(body)))
	}
	web := types.NamespacedName{Namespace: "ns", Name: "web"}
	for _, step := range []struct {
		set, ask Health
		want     string
	}{
		{Health{31000, 2}, Health{Port: 31000}, `200[2]{"service":{"namespace":"ns","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}`},
		{Health{31000, 0}, Health{Port: 31000}, `503[0]{"service":{"namespace":"ns","name":"web"},"localEndpoints":0,"serviceProxyHealthy":true}`},
		{Health{31001, 1}, Health{Port: 31001}, `200[1]{"service":{"namespace":"ns","name":"web"},"localEndpoints":1,"serviceProxyHealthy":true}`},
		{Health{31001, 1}, Health{Port: 31000}, "nobody"},
		{Health{}, Health{Port: 31001}, "nobody"},
	} {
		if err := s.set(t.Context(), web, step.set); err != nil {
			t.Fatal(err)
		}
		if got := ask(step.ask.Port); strings.ReplaceAll(got, " ", "") != step.want {
			t.Errorf("after %+v, port %d says %s, want %s", step.set, step.ask.Port, got, step.want)
		}
	}
	if err := s.set(t.Context(), web, Health{1, 1}); !errors.Is(err, taken) {
		t.Errorf("a port that is taken: %v", err)
	}
}
