// SPDX-License-Identifier: Apache-2.0

package services

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	utilsets "k8s.io/apimachinery/pkg/util/sets"
)

// Health is what a load balancer in front of the nodes may ask at a Service's health check node port.
type Health struct {
	Port  uint16 // 0 if it has none
	Local int    // pods of this node that are ready
}

func health(svc *corev1.Service, eps []*discoveryv1.EndpointSlice, node string) Health {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || svc.Spec.HealthCheckNodePort == 0 ||
		svc.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return Health{}
	}
	h := Health{Port: uint16(svc.Spec.HealthCheckNodePort)}
	family := discoveryv1.AddressTypeIPv4
	if f := families(svc); len(f) > 0 {
		family = discoveryv1.AddressType(f[0])
	}
	seen := utilsets.New[string]()
	for _, s := range eps {
		if s.AddressType != family {
			continue
		}
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			if e.NodeName != nil && *e.NodeName == node && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				seen.Insert(e.Addresses...)
			}
		}
	}
	h.Local = len(seen)
	return h
}

// healthServer answers at the health check node ports, in kube-proxy's words: 200 if this node has a
// ready pod of the Service, else 503, with the number in the body and in a header.
type healthServer struct {
	log    *slog.Logger
	listen func(ctx context.Context, port uint16) (net.Listener, error)

	mu    sync.Mutex
	ports map[string]*healthPort // by Service
}

// What one port takes at most: connections at a time, and the time for a question and for its answer.
const (
	healthConnections = 256
	healthTimeout     = 10 * time.Second
)

type healthPort struct {
	port   uint16
	server *http.Server

	mu    sync.Mutex
	local int
}

func newHealthServer(log *slog.Logger) *healthServer {
	return &healthServer{
		log: log, ports: map[string]*healthPort{},
		listen: func(ctx context.Context, port uint16) (net.Listener, error) {
			var config net.ListenConfig
			return config.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(int(port))))
		},
	}
}

// set makes the answers for one Service so. It may be repeated after an error.
func (s *healthServer) set(ctx context.Context, service types.NamespacedName, want Health) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := service.String()
	have := s.ports[key]
	if have != nil && have.port != want.Port {
		_ = have.server.Close()
		delete(s.ports, key)
		have = nil
	}
	if want.Port == 0 {
		return nil
	}
	if have == nil {
		l, err := s.listen(ctx, want.Port)
		if err != nil {
			return fmt.Errorf("health check node port %d: %w", want.Port, err)
		}
		have = &healthPort{port: want.Port, local: want.Local}
		// Strangers ask: whoever is slow, or stays without asking, is not waited for.
		have.server = &http.Server{Handler: have.handler(service), ReadTimeout: healthTimeout, WriteTimeout: healthTimeout,
			IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10}
		s.ports[key] = have
		l = netutil.LimitListener(l, healthConnections)
		go func() {
			if err := have.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				s.log.Error("health check node port ended", "service", key, "port", want.Port, "err", err)
			}
		}()
	}
	have.mu.Lock()
	have.local = want.Local
	have.mu.Unlock()
	return nil
}

// close ends all of them.
func (s *healthServer) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, p := range s.ports {
		_ = p.server.Close()
		delete(s.ports, key)
	}
}

func (p *healthPort) handler(service types.NamespacedName) http.HandlerFunc {
	type name struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	}
	type answer struct {
		Service             name `json:"service"`
		LocalEndpoints      int  `json:"localEndpoints"`
		ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		p.mu.Lock()
		local := p.local
		p.mu.Unlock()
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(local))
		if local == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(answer{name{service.Namespace, service.Name}, local, true})
	}
}
