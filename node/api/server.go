// SPDX-License-Identifier: Apache-2.0

// Package api is the node's HTTPS server on port 10250 with the paths of kubelet's: logs, exec,
// attach, port-forward, pods, statistics, metrics, health.
package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/csi"
	"skep.io/skep/node/eviction"
	"skep.io/skep/node/runtime"
)

const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 90 * time.Second
	// sessionIdle ends a session of exec, attach or port-forward in which nothing moves; kubelet's value.
	sessionIdle = 4 * time.Hour
	// sessionCreation bounds the opening of a session's streams.
	sessionCreation = 30 * time.Second
	maxHeader       = 64 << 10
	// maxSessions bounds what one node serves at once: each costs goroutines and buffers.
	maxSessions = 500
)

// PodSource knows the pods of this node.
type PodSource interface {
	// Pod finds a pod with its current status.
	Pod(namespace, name string) (*corev1.Pod, bool)
	// Pods lists all, for /pods and /stats/summary.
	Pods() []*corev1.Pod
}

// Containers is what the API needs to know of containers; runtime.Containers has it.
type Containers interface {
	ListPod(ctx context.Context, pod types.UID) ([]runtime.Container, error)
}

// Config of a Server.
type Config struct {
	NodeName    string
	Sessions    runtime.Sessions
	Containers  Containers
	Pods        PodSource
	ServingCert tls.Certificate
	// Certificate, when set, is asked at each handshake, so that a rotated one needs no restart.
	Certificate func() (*tls.Certificate, error)
	ClientCA    func() *x509.CertPool // asked at every handshake
	// AllowedUsers may do everything, besides the group system:masters; nil: the API server's own identities.
	AllowedUsers []string
	// Authenticate resolves a bearer token (a TokenReview); nil: only certificates count.
	Authenticate func(ctx context.Context, token string) (user string, groups []string, err error)
	// Authorize decides about everybody else (a SubjectAccessReview on nodes/SUBRESOURCE); nil: refused.
	Authorize func(ctx context.Context, user string, groups []string, verb, subresource string) (bool, error)
	Gatherer  prometheus.Gatherer // what /metrics shows; nil: nothing
	Network   http.Handler        // what /net/ shows of the data plane; nil: nothing
	// LocalVolumes makes and removes the directories of local-path volumes, below /localVolumes/; nil: nothing
	LocalVolumes http.Handler
	// DataDir is where pods' files and images are: the file system that /stats/summary shows. Empty: none.
	DataDir string
	// Disk measures what a pod has on disk; nil: nothing does. One request at a time measures.
	Disk func(ctx context.Context, pod *corev1.Pod) (eviction.PodDisk, error)
	// VolumeUsage asks the driver of a volume how full it is; nil if it does not tell, or nobody asks.
	VolumeUsage func(ctx context.Context, pod types.UID, volume string) (*csi.Usage, error)
	Metrics     prometheus.Registerer // may be nil
	Log         *slog.Logger
}

// Server serves the node's API.
type Server struct {
	cfg      Config
	sessions chan struct{}
	measures sync.Mutex // held while trees of files are walked
	requests *prometheus.CounterVec
}

// New checks the configuration.
func New(cfg Config) (*Server, error) {
	if cfg.Sessions == nil || cfg.Containers == nil || cfg.Pods == nil {
		return nil, errors.New("node API: Sessions, Containers and Pods are needed")
	}
	if cfg.ClientCA == nil {
		return nil, errors.New("node API: without a client CA nobody could be authenticated")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.AllowedUsers == nil {
		cfg.AllowedUsers = []string{"kube-apiserver-kubelet-client", "system:kube-apiserver", "system:apiserver"}
	}
	s := &Server{cfg: cfg, sessions: make(chan struct{}, maxSessions), requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "skep_node_api_requests_total", Help: "Requests to the node's API, by handler and HTTP status.",
	}, []string{"handler", "code"})}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{s.requests, claimCollector{s}} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("node API: metrics: %w", err)
			}
		}
	}
	return s, nil
}

// Run serves on l until ctx ends; sessions then end too.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	srv.TLSConfig = &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if s.cfg.Certificate != nil {
				return s.cfg.Certificate()
			}
			return &s.cfg.ServingCert, nil
		},
		// Not required: /healthz needs none, and a token may come instead.
		ClientAuth: tls.VerifyClientCertIfGiven,
	}
	srv.TLSConfig.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		config := srv.TLSConfig.Clone()
		config.ClientCAs = s.cfg.ClientCA()
		return config, nil
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("node API on %s: %w", l.Addr(), err)
	}
	return nil
}

// Handler is every route with the subresource of nodes that grants it; this list is the whole API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, route := range []struct {
		pattern, subresource string
		serve                http.HandlerFunc
	}{
		{"GET /containerLogs/{namespace}/{pod}/{container}", "proxy", s.logs},
		{"/exec/{namespace}/{pod}/{container}", "proxy", s.session(s.exec)},
		{"/exec/{namespace}/{pod}/{uid}/{container}", "proxy", s.session(s.exec)},
		{"/attach/{namespace}/{pod}/{container}", "proxy", s.session(s.attach)},
		{"/attach/{namespace}/{pod}/{uid}/{container}", "proxy", s.session(s.attach)},
		{"/portForward/{namespace}/{pod}", "proxy", s.session(s.portForward)},
		{"/portForward/{namespace}/{pod}/{uid}", "proxy", s.session(s.portForward)},
		{"GET /pods", "proxy", s.pods},
		{"GET /pods/", "proxy", s.pods},
		{"GET /runningpods/", "proxy", s.pods},
		{"/localVolumes/{name}", "proxy", s.localVolumes},
		{"GET /stats/summary", "stats", s.summary},
		{"GET /metrics", "metrics", s.metrics},
		{"GET /metrics/resource", "metrics", s.resourceMetrics},
		{"GET /net/", "proxy", s.network},
	} {
		mux.Handle(route.pattern, s.count(route.pattern, s.guard(route.subresource, route.serve)))
	}
	// Health says nothing that a stranger could use.
	mux.Handle("GET /healthz", s.count("GET /healthz", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok"))
	})))
	return mux
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Gatherer == nil {
		http.NotFound(w, r)
		return
	}
	promhttp.HandlerFor(s.cfg.Gatherer, promhttp.HandlerOpts{}).ServeHTTP(w, r)
}

func (s *Server) localVolumes(w http.ResponseWriter, r *http.Request) {
	if s.cfg.LocalVolumes == nil {
		http.NotFound(w, r)
		return
	}
	s.cfg.LocalVolumes.ServeHTTP(w, r)
}

func (s *Server) network(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Network == nil {
		http.NotFound(w, r)
		return
	}
	s.cfg.Network.ServeHTTP(w, r)
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	list := corev1.PodList{}
	list.Kind, list.APIVersion = "PodList", "v1"
	list.Items = []corev1.Pod{}
	for _, p := range s.cfg.Pods.Pods() {
		list.Items = append(list.Items, *p)
	}
	writeJSON(w, list)
}

func writeJSON(w http.ResponseWriter, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(data)
}

// session bounds how many run at once.
func (s *Server) session(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.sessions <- struct{}{}:
			defer func() { <-s.sessions }()
			serve(w, r)
		default:
			http.Error(w, fmt.Sprintf("this node serves %d sessions already", maxSessions), http.StatusTooManyRequests)
		}
	}
}

// count counts responses. An upgraded connection is counted by its first status.
func (s *Server) count(pattern string, next http.Handler) http.Handler {
	return promhttp.InstrumentHandlerCounter(s.requests.MustCurryWith(prometheus.Labels{"handler": pattern}), next)
}
