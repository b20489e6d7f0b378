// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	netlisters "k8s.io/client-go/listers/networking/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

// component is the source of this package's events.
const component = "skep-ingress"

// Config is what a Server needs. Client, Informers, Backends and one listener are required.
type Config struct {
	Client    kubernetes.Interface
	Informers informers.SharedInformerFactory // start it after New
	Backends  Backends
	// NodeIPs are put into the fallback certificate.
	NodeIPs []netip.Addr
	// ListenHTTP and ListenHTTPS are where clients arrive; either may be nil. Run closes them.
	ListenHTTP, ListenHTTPS net.Listener
	// StatusAddresses are written to the Ingresses' status. Nil leaves status and events to
	// another server: in a cluster one writes.
	StatusAddresses func() []netip.Addr
	// TrustedProxies may say who their clients are (X-Forwarded-*); from others that is replaced.
	TrustedProxies []netip.Prefix
	// HTTPSPort is where redirects lead; 443 when zero.
	HTTPSPort uint16
	Limits    Limits
	Log       *slog.Logger
	AccessLog *slog.Logger // nil for none
	Metrics   prometheus.Registerer
}

// Server is the ingress endpoint of one node.
type Server struct {
	cfg      Config
	proxy    *proxy
	certs    *certificates
	fallback *tls.Certificate

	ingresses netlisters.IngressLister
	classes   netlisters.IngressClassLister
	services  corelisters.ServiceLister
	synced    []cache.DoneChecker

	rebuild chan struct{}
	publish chan struct{}
	ready   chan struct{}
}

// New prepares a server and registers its informers with the factory, which the caller starts
// afterwards.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Client == nil || cfg.Informers == nil || cfg.Backends == nil:
		return nil, errors.New("ingress: Client, Informers and Backends are required")
	case cfg.ListenHTTP == nil && cfg.ListenHTTPS == nil:
		return nil, errors.New("ingress: at least one listener is required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.HTTPSPort == 0 {
		cfg.HTTPSPort = 443
	}
	cfg.Limits = cfg.Limits.withDefaults()
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("ingress: registering metrics: %w", err)
	}
	fallback, err := fallbackCertificate(cfg.NodeIPs)
	if err != nil {
		return nil, fmt.Errorf("ingress: %w", err)
	}
	s := &Server{
		cfg: cfg, fallback: fallback,
		rebuild: make(chan struct{}, 1), publish: make(chan struct{}, 1), ready: make(chan struct{}),
	}
	s.certs = &certificates{
		client: cfg.Client, changed: func() { signal(s.rebuild) },
		watches: map[types.NamespacedName]context.CancelFunc{}, loaded: map[types.NamespacedName]loadedSecret{},
	}
	dialer := &net.Dialer{Timeout: cfg.Limits.Connect, KeepAlive: 15 * time.Second}
	s.proxy = &proxy{
		connector: &connector{
			dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", a.String())
			},
			maxIdle: cfg.Limits.IdleConns, idleTimeout: time.Minute, backends: map[netip.AddrPort]*backend{},
		},
		backends: cfg.Backends, limits: cfg.Limits, trusted: cfg.TrustedProxies, httpsPort: cfg.HTTPSPort,
		metrics: m, access: cfg.AccessLog,
	}
	s.proxy.install(Build(Input{}))
	return s, s.register()
}

// register says which changes lead to a new table, and which only to a look at status and events.
func (s *Server) register() error {
	networking := s.cfg.Informers.Networking().V1()
	core := s.cfg.Informers.Core().V1()
	s.ingresses, s.classes, s.services = networking.Ingresses().Lister(), networking.IngressClasses().Lister(), core.Services().Lister()

	on := func(target chan struct{}, matters func(before, after any) bool) cache.ResourceEventHandler {
		return cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { signal(target) },
			DeleteFunc: func(any) { signal(target) },
			UpdateFunc: func(before, after any) {
				if matters(before, after) {
					signal(target)
				}
			},
		}
	}
	always := func(_, _ any) bool { return true }
	type source struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}
	sources := []source{
		{networking.Ingresses().Informer(), on(s.rebuild, ingressChanged)},
		{networking.Ingresses().Informer(), on(s.publish, always)},
		{networking.IngressClasses().Informer(), on(s.rebuild, always)},
	}
	if s.cfg.StatusAddresses != nil {
		sources = append(sources,
			source{core.Services().Informer(), on(s.publish, generationChanged)},
			source{core.Nodes().Informer(), on(s.publish, nodeAddressesChanged)},
		)
	}
	for _, src := range sources {
		registration, err := src.informer.AddEventHandler(src.handler)
		if err != nil {
			return fmt.Errorf("ingress: watching objects: %w", err)
		}
		s.synced = append(s.synced, registration.HasSyncedChecker())
	}
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // already due
	}
}

// ingressChanged leaves out writes of status, our own among them.
func ingressChanged(before, after any) bool {
	a, b := before.(*networkingv1.Ingress), after.(*networkingv1.Ingress)
	return a.UID != b.UID || a.Generation != b.Generation || b.Generation == 0 || !maps.Equal(a.Annotations, b.Annotations) ||
		(a.DeletionTimestamp == nil) != (b.DeletionTimestamp == nil)
}

func generationChanged(before, after any) bool {
	a, b := before.(*corev1.Service), after.(*corev1.Service)
	return a.UID != b.UID || !slices.Equal(a.Spec.Ports, b.Spec.Ports)
}

func nodeAddressesChanged(before, after any) bool {
	a, b := before.(*corev1.Node), after.(*corev1.Node)
	return !slices.Equal(a.Status.Addresses, b.Status.Addresses) || isReady(a) != isReady(b)
}

func isReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// Ready is closed once the first table, with its certificates, is in use.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Run serves until ctx ends, then lets requests under way finish within Limits.Drain. Until Ready
// connections wait: answering 404 for routes not read yet would be a lie.
func (s *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer s.certs.wg.Wait() // after the reconciler, which starts them
	defer wg.Wait()
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop() // outlives ctx by the drain: routes and certificates still serve
	end := context.AfterFunc(ctx, func() {
		select {
		case <-s.ready:
		default:
			stop()
		}
	})
	defer end()
	defer s.closeListeners()

	if !cache.WaitFor(ctx, "", s.synced...) {
		return nil
	}
	changed, cancel := s.cfg.Backends.Subscribe()
	defer cancel()
	s.build(work)
	s.awaitCertificates(ctx)
	wg.Go(func() { s.reconcile(work, changed) })
	live, quit := context.WithCancel(ctx) // ends with ctx, or when serving fails
	defer quit()
	wg.Go(func() { s.publishLoop(live) })

	servers, failed := s.serve(&wg)
	close(s.ready)
	s.cfg.Log.Info("ingress is serving", "routes", len(s.proxy.state.Load().table.Routes))
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	return errors.Join(err, s.drain(servers))
}

func (s *Server) closeListeners() {
	for _, l := range []net.Listener{s.cfg.ListenHTTP, s.cfg.ListenHTTPS} {
		if l != nil {
			l.Close()
		}
	}
}

// serve starts a server on each listener.
func (s *Server) serve(wg *sync.WaitGroup) (servers []*http.Server, failed chan error) {
	failed = make(chan error, 2)
	room := newRoom(s.cfg.Limits.Connections, s.proxy.metrics)
	start := func(l net.Listener, run func(*http.Server, net.Listener) error) {
		if l == nil {
			return
		}
		srv := s.newHTTPServer()
		srv.ConnState = room.state
		servers = append(servers, srv)
		wg.Go(func() {
			if err := run(srv, newClientListener(l, s.cfg.Limits.ClientStall, room)); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("ingress: serving on %s: %w", l.Addr(), err)
			}
		})
	}
	start(s.cfg.ListenHTTP, (*http.Server).Serve)
	start(s.cfg.ListenHTTPS, func(srv *http.Server, l net.Listener) error { return srv.ServeTLS(l, "", "") })
	return servers, failed
}

func (s *Server) newHTTPServer() *http.Server {
	l := s.cfg.Limits
	return &http.Server{
		Handler:           s.proxy,
		ReadHeaderTimeout: l.ReadHeader,
		IdleTimeout:       l.ClientIdle,
		MaxHeaderBytes:    l.HeaderBytes,
		ErrorLog:          log.New(serverLog{s.cfg.Log}, "", 0),
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			NextProtos:     []string{"h2", "http/1.1"},
			GetCertificate: s.certificate,
		},
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: 250,
			SendPingTimeout:      30 * time.Second,
			PingTimeout:          15 * time.Second,
			WriteByteTimeout:     l.ClientStall,
		},
	}
}

func (s *Server) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := s.proxy.state.Load().table.Certificate(hello.ServerName); c != nil {
		return c, nil
	}
	return s.fallback, nil
}

// drain ends the servers: no new connection, requests under way finish, then what is left is cut.
func (s *Server) drain(servers []*http.Server) error {
	s.cfg.Log.Info("ingress is draining", "bound", s.cfg.Limits.Drain)
	bound, cancel := context.WithTimeout(context.Background(), s.cfg.Limits.Drain)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	cut := false
	for _, srv := range servers {
		wg.Go(func() {
			if err := srv.Shutdown(bound); err != nil {
				srv.Close()
				mu.Lock()
				cut = true
				mu.Unlock()
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		s.proxy.tunnels.wg.Wait()
		close(ended)
	}()
	wg.Wait()
	select {
	case <-ended:
	case <-bound.Done():
		s.proxy.tunnels.closeAll()
		<-ended
		cut = true
	}
	s.proxy.connector.close()
	if cut {
		s.cfg.Log.Warn("ingress cut connections that did not finish in time", "bound", s.cfg.Limits.Drain)
	}
	return nil
}

// build makes a table from what the informers hold and puts it to use.
func (s *Server) build(ctx context.Context) {
	ingresses, classes, err := s.objects()
	if err != nil {
		s.cfg.Log.Error("cannot list Ingresses, keeping the routes there are", "err", err)
		return
	}
	s.certs.watch(ctx, References(Ours(ingresses, classes)))
	certs, _ := s.certs.snapshot()
	t := Build(Input{Ingresses: ingresses, Classes: classes, Certificates: certs})
	s.proxy.install(t)
	s.proxy.prune()
	s.cfg.Log.Debug("routing table built", "routes", len(t.Routes), "certificates", t.certificates)
}

func (s *Server) objects() ([]*networkingv1.Ingress, []*networkingv1.IngressClass, error) {
	ingresses, err := s.ingresses.List(labels.Everything())
	if err != nil {
		return nil, nil, err
	}
	classes, err := s.classes.List(labels.Everything())
	return ingresses, classes, err
}

// awaitCertificates lets the Secrets of the first table arrive. One that cannot be read must not
// keep everybody else waiting.
func (s *Server) awaitCertificates(ctx context.Context) {
	bound := time.NewTimer(3 * time.Second)
	defer bound.Stop()
	for s.certs.pending() {
		select {
		case <-s.rebuild:
			continue
		case <-bound.C:
		case <-ctx.Done():
		}
		break
	}
	s.build(ctx)
}

func (s *Server) reconcile(ctx context.Context, backendsChanged <-chan struct{}) {
	expire := time.NewTicker(30 * time.Second) // of idle connections to backends
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.rebuild:
			s.build(ctx)
			signal(s.publish)
		case <-backendsChanged:
			s.proxy.prune()
		case <-expire.C:
			s.proxy.prune()
		}
	}
}

// publishLoop writes status and events, apart from the table so that a slow API server does not
// delay a route.
func (s *Server) publishLoop(ctx context.Context) {
	if s.cfg.StatusAddresses == nil {
		return
	}
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: s.cfg.Client.CoreV1().Events("")})
	r := &reporter{recorder: broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component})}
	retry := time.NewTimer(0)
	defer retry.Stop()
	for delay := time.Second; ; {
		select {
		case <-ctx.Done():
			return
		case <-s.publish:
		case <-retry.C:
		}
		if err := s.publishOnce(ctx, r); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("ingress status, trying again", "err", err, "in", delay)
			retry.Reset(delay)
			delay = min(2*delay, time.Minute)
			continue
		}
		delay = time.Second
	}
}

func (s *Server) publishOnce(ctx context.Context, r *reporter) error {
	ingresses, classes, err := s.objects()
	if err != nil {
		return err
	}
	ours := Ours(ingresses, classes)
	_, failed := s.certs.snapshot()
	r.report(ours, planProblems(ours, s.proxy.state.Load().table, func(namespace, name string) *corev1.Service {
		svc, err := s.services.Services(namespace).Get(name)
		if err != nil {
			return nil // a lister knows no other error than "not found"
		}
		return svc
	}, failed))
	return writeStatus(ctx, s.cfg.Client, planStatus(ours, s.cfg.StatusAddresses()))
}
