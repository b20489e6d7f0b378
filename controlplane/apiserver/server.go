// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	aggregatorapiserver "k8s.io/kube-aggregator/pkg/apiserver"
	"k8s.io/kube-openapi/pkg/common"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver/inprocess"
	"skep.io/skep/controlplane/apiserver/podpreset"
)

// Server is one API server.
type Server struct {
	cfg        Config
	etcd       string // the store's name among in-process stores
	aggregator *aggregatorapiserver.APIAggregator
	openAPI    *common.OpenAPIV3Config
	authorizer authorizer.Authorizer
	transport  *inprocess.Transport
	identities *identities
	presets    *podpreset.Plugin
	loopback   *rest.Config // acts as the server itself
	informers  informers.SharedInformerFactory
	encryption *atRest // nil if nothing is encrypted
	host       string
	listener   net.Listener
	ready      chan struct{}
	started    bool
}

// New assembles a server and opens its port, so that a port already taken is an error here. Run
// must be called, even if only with a context that has ended, to close it again.
func New(ctx context.Context, cfg Config) (*Server, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	if err := setProcessWide(); err != nil {
		return nil, fmt.Errorf("apiserver: %w", err)
	}
	certs, err := cfg.certificates()
	if err != nil {
		return nil, err
	}
	listener := cfg.Listener
	if listener == nil {
		if listener, err = listen(ctx, cfg); err != nil {
			return nil, err
		}
	}
	s := &Server{
		cfg:        cfg,
		etcd:       registerStore(cfg.Store),
		transport:  inprocess.New(cfg.Log),
		identities: newIdentities(),
		presets:    podpreset.New(cfg.Log),
		host:       "https://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)),
		listener:   listener,
		ready:      make(chan struct{}),
	}
	if err := s.assemble(ctx, certs, listener); err != nil {
		listener.Close()
		unregisterStore(s.etcd)
		return nil, fmt.Errorf("apiserver: %w", err)
	}
	return s, nil
}

func listen(ctx context.Context, cfg Config) (net.Listener, error) {
	addr := net.JoinHostPort(cfg.BindAddress.String(), strconv.Itoa(cfg.Port))
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("apiserver: %w; stop what uses the port, or choose another", err)
	}
	return l, nil
}

func (s *Server) assemble(ctx context.Context, certs certificates, listener net.Listener) error {
	o, err := upstreamOptions(ctx, s.cfg, certs, listener, s.etcd, s.presets)
	if err != nil {
		return err
	}
	announceProgress(ctx, s.etcd, s.cfg.Store.Client())
	loopback := inProcessConfig(s.transport, s.host, s.identities.token(user.APIServerUser, []string{user.SystemPrivilegedGroup}))
	// While it ends, a server answers everybody but itself "try again later", and knows itself by this.
	loopback.UserAgent = "kube-apiserver/" + kubernetesVersion
	g, err := buildGeneric(ctx, o, s.cfg.Access, loopback, s.identities)
	if err != nil {
		return err
	}
	reportWrites(g.config, s.cfg.OnWrite)
	s.loopback, s.encryption, s.informers = loopback, g.encryption, g.informers
	s.openAPI, s.authorizer = g.config.OpenAPIV3Config, g.config.Authorization.Authorizer
	if s.aggregator, err = buildChain(o, g, s.cfg.Log); err != nil {
		return err
	}
	if s.cfg.Join != nil {
		s.aggregator.GenericAPIServer.Handler.NonGoRestfulMux.Handle(api.JoinPath, s.cfg.Join)
	}
	return nil
}

// ClientConfig returns a configuration for a client in this process that acts as userName in
// groups (system:authenticated is added). Its requests never leave the process. It may be used
// before the server runs: requests are refused until then. The caller may change it.
func (s *Server) ClientConfig(userName string, groups ...string) *rest.Config {
	return inProcessConfig(s.transport, s.host, s.identities.token(userName, groups))
}

// Informers are those that the server itself follows kinds by; they start with it. Others in this process may add handlers
// that can do with being called at once. Objects come without managed fields, and are not to be changed.
func (s *Server) Informers() informers.SharedInformerFactory { return s.informers }

// Ready is closed once /readyz has answered ok and skep's own parts may do what their roles say.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Run serves until ctx ends, then refuses new requests, ends watches, and returns when what was in
// progress is answered. It returns earlier if the store fails. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	if s.started {
		return errors.New("apiserver: Run was called before")
	}
	s.started = true
	defer unregisterStore(s.etcd)
	if ctx.Err() != nil {
		return s.listener.Close() // nothing begins: upstream ends the process when it cannot
	}
	defer s.transport.Serve(nil)

	prepared, err := s.aggregator.PrepareRun()
	if err != nil {
		return fmt.Errorf("apiserver: %w", err)
	}
	// The descriptions of all types, some 8 MB, have served: what is asked for later makes its own.
	s.openAPI.Definitions = nil
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	handler := s.aggregator.GenericAPIServer.Handler
	s.transport.Serve(handler)
	go s.announceReady(ctx, handler)
	go s.renewCertificates(ctx)
	followed := make(chan struct{})
	go func() { defer close(followed); s.followPresets(ctx) }()
	defer func() { cancel(); <-followed }()
	ended := make(chan error, 1)
	go func() { ended <- prepared.Run(ctx) }()
	select {
	case err = <-ended:
	case <-s.cfg.Store.Failed():
		// Requests that wait for the store will never be answered: there is nothing to drain.
		return fmt.Errorf("apiserver: %w", s.cfg.Store.Err())
	}
	if err != nil {
		return fmt.Errorf("apiserver: %w", err)
	}
	return nil
}

// followPresets has pods get what PodPresets have, as the server itself, once the API answers.
func (s *Server) followPresets(ctx context.Context) {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return
	}
	config := s.aggregator.GenericAPIServer.LoopbackClientConfig
	presets, err := dynamic.NewForConfig(config)
	if err != nil {
		s.cfg.Log.Error("client for PodPresets", "error", err)
		return
	}
	events, err := kubernetes.NewForConfig(config)
	if err != nil {
		s.cfg.Log.Error("client for PodPresets", "error", err)
		return
	}
	if err := s.presets.Run(ctx, presets, events); err != nil {
		s.cfg.Log.Error("PodPresets are not known: no pod can be created", "error", err)
	}
}

// readyPoll is how often /readyz is asked at start. Upstream has no event for "ready": it is what
// some sixty checks say when asked.
const readyPoll = 5 * time.Millisecond

// grantLimit is how long readiness waits for roles: somebody may have taken a right away on purpose.
const grantLimit = 10 * time.Second

func (s *Server) announceReady(ctx context.Context, h http.Handler) {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	var answers time.Time // since when /readyz is ok
	for {
		w := httptest.NewRecorder()
		// Not anonymously: an administrator may have closed that.
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/readyz", nil)
		r.Header.Set("Authorization", "Bearer "+s.loopback.BearerToken)
		h.ServeHTTP(w, r)
		if w.Code == http.StatusOK {
			if answers.IsZero() {
				answers = time.Now()
			}
			late := time.Since(answers) > grantLimit
			if late {
				s.cfg.Log.Warn("roles of skep's own parts lack something: `skep get clusterroles,clusterrolebindings | grep skep:`")
			}
			if late || inForce(ctx, s.authorizer) {
				close(s.ready)
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
