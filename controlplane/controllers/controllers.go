// SPDX-License-Identifier: Apache-2.0

// Package controllers runs everything that turns desired state into actual state inside the control plane:
// skep's own controllers, one sub-package each, and housekeeping controllers that come from Kubernetes
// unchanged. The list in registry is the table of contents.
package controllers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/controllers/podgc"
	"skep.io/skep/controlplane/controllers/runner"
)

// Config is what Run needs. Client, RESTConfig, Informers, ClusterCIDRs and ServiceCIDRs are required.
type Config struct {
	// Client acts as api.BootstrapUser: it records events and creates the bootstrap objects.
	Client kubernetes.Interface
	// Registered, if set, is closed once every controller has its handlers. Nobody may start Informers before.
	Registered chan<- struct{}
	// RESTConfig gives the configuration of a client that acts as the named user. Each controller has its own,
	// named like upstream's service accounts, so that the bootstrap policy grants it just what it needs.
	RESTConfig func(user string) *rest.Config
	// Informers are shared with the rest of the process. Run starts those that it uses; they end with Run's
	// context.
	Informers informers.SharedInformerFactory
	// ServersInformers, if set, are the API server's, which run: the collectors of every kind use them, for what the server
	// follows anyway. They are apart from Informers because upstream's controllers are called by theirs as soon as these
	// run, and then may not be complete yet.
	ServersInformers informers.SharedInformerFactory

	// ClusterCIDRs are the pods' ranges, one a family; NodeMaskIPv4 and NodeMaskIPv6 the prefix lengths of a
	// node's share, by default 24 and 64.
	ClusterCIDRs               []netip.Prefix
	NodeMaskIPv4, NodeMaskIPv6 int
	// ServiceCIDRs are the Services' ranges, one a family.
	ServiceCIDRs []netip.Prefix

	// RootCA is published to every namespace, in PEM. ServiceAccountKey signs the tokens of Secrets of type
	// kubernetes.io/service-account-token, in PEM; without it such Secrets stay empty.
	RootCA, ServiceAccountKey []byte

	// CAFile and CAKeyFile are the authority that signs certificate requests; without them none is signed.
	CAFile, CAKeyFile string

	// NodeTiming is how long a node may be silent; zero fields have the default.
	NodeTiming nodelifecycle.Timing
	// ReservedPorts are ports that the nodes use themselves, with for what: no Service gets them at a node's address.
	ReservedPorts map[int32]string
	// TerminatedPods is how many ended pods are kept; 0 is podgc.DefaultThreshold.
	TerminatedPods int

	Log     *slog.Logger
	Metrics prometheus.Registerer
	// Clock is the real one if nil.
	Clock clock.PassiveClock
}

// validate names every field that is missing.
func (cfg Config) validate() error {
	var errs []error
	if cfg.Client == nil {
		errs = append(errs, errors.New("Client is missing"))
	}
	if cfg.RESTConfig == nil {
		errs = append(errs, errors.New("RESTConfig is missing"))
	}
	if cfg.Informers == nil {
		errs = append(errs, errors.New("Informers are missing"))
	}
	if len(cfg.ClusterCIDRs) == 0 {
		errs = append(errs, errors.New("ClusterCIDRs are missing: pods need a range"))
	}
	if len(cfg.ServiceCIDRs) == 0 {
		errs = append(errs, errors.New("ServiceCIDRs are missing: services need a range"))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	return nil
}

func (cfg Config) withDefaults() Config {
	if cfg.NodeMaskIPv4 == 0 {
		cfg.NodeMaskIPv4 = 24
	}
	if cfg.NodeMaskIPv6 == 0 {
		cfg.NodeMaskIPv6 = 64
	}
	if cfg.NodeTiming.Grace == 0 {
		cfg.NodeTiming.Grace = nodelifecycle.DefaultTiming.Grace
	}
	if cfg.NodeTiming.StartupGrace == 0 {
		cfg.NodeTiming.StartupGrace = nodelifecycle.DefaultTiming.StartupGrace
	}
	if cfg.TerminatedPods == 0 {
		cfg.TerminatedPods = podgc.DefaultThreshold
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = clock.RealClock{}
	}
	return cfg
}

// run works until its context ends. Ending earlier is an error.
type run func(ctx context.Context) error

// entry is one controller: its name, whom it acts as, and how to make it. Making registers with informers
// and must not block.
type entry struct {
	name string
	user string
	make func(ctx context.Context, e env) (run, error)
}

// env is what entries are made from.
type env struct {
	cfg  Config
	deps runner.Deps // with the entry's own client
	rest *rest.Config
	// shared by upstream's controllers that follow objects of every kind
	kinds *kinds
}

// Run runs every controller until ctx ends, and returns nil then. It returns an error as soon as one cannot
// be made or dies.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.validate(); err != nil {
		return err
	}
	return runEntries(ctx, cfg.withDefaults(), registry())
}

func runEntries(ctx context.Context, cfg Config, entries []entry) error {
	metrics, err := runner.NewMetrics(cfg.Metrics)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	// Upstream's controllers find their logger here. What they call information is for debugging in skep; their
	// errors stay errors.
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(cfg.Log.Handler()).V(int(-slog.LevelDebug)))

	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: cfg.Client.CoreV1().Events("")})

	shared, err := newKinds(cfg)
	if err != nil {
		return err
	}
	// All are made before any informer runs: some of upstream's handlers (disruption's) use what only Run sets,
	// and an informer that runs already calls them as soon as they are registered.
	runs := make([]run, len(entries))
	for i, entry := range entries {
		if runs[i], err = entry.prepare(ctx, cfg, broadcaster, metrics, shared); err != nil {
			return err
		}
	}
	for i, entry := range entries {
		if runs[i] == nil {
			continue // has nothing to do with this configuration
		}
		group.Go(func() error {
			err := runs[i](ctx)
			switch {
			case err != nil:
				return fmt.Errorf("controller %s: %w", entry.name, err)
			case ctx.Err() == nil:
				return fmt.Errorf("controller %s ended although nobody stopped it", entry.name)
			}
			return nil
		})
	}
	if cfg.Registered != nil {
		close(cfg.Registered)
	}
	cfg.Informers.Start(ctx.Done())
	if shared != nil {
		shared.Start(ctx.Done())
		defer shared.metadata.Shutdown()
	}
	return group.Wait()
}

// prepare makes one controller.
func (e entry) prepare(ctx context.Context, cfg Config, broadcaster record.EventBroadcaster, metrics *runner.Metrics, shared *kinds) (run, error) {
	client, config, err := clientFor(cfg, e.user)
	if err != nil {
		return nil, fmt.Errorf("controller %s: %w", e.name, err)
	}
	made, err := e.make(ctx, env{cfg: cfg, rest: config, kinds: shared, deps: runner.Deps{
		Client:    client,
		Informers: cfg.Informers,
		Recorder: func(component string) record.EventRecorder {
			return broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component})
		},
		Log: cfg.Log, Metrics: metrics, Clock: cfg.Clock,
	}})
	if err != nil {
		return nil, fmt.Errorf("controller %s: %w", e.name, err)
	}
	return made, nil
}

// clientFor makes a client that acts as user, or gives the bootstrap client if user is empty. In-process
// clients need no limit of their own: the API server's priority and fairness knows better.
func clientFor(cfg Config, user string) (kubernetes.Interface, *rest.Config, error) {
	if user == "" || cfg.RESTConfig == nil {
		return cfg.Client, nil, nil
	}
	config := rest.CopyConfig(cfg.RESTConfig(user))
	config.QPS = -1
	config.UserAgent = "skep/" + user
	// Endpoints are deprecated but still served; nobody reads that in a log once a call.
	config.WarningHandler = rest.NoWarnings{}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("client of %s: %w", user, err)
	}
	return client, config, nil
}
