// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/controllers"
	"skep.io/skep/controlplane/scheduler"
)

// Times of the lease under which one of several servers runs controllers and scheduler: upstream's own. A
// server that dies is succeeded within leaseLife; one that is stopped hands over at once.
const (
	leaseLife   = 15 * time.Second
	leaseRenew  = 10 * time.Second
	leaseRetry  = 2 * time.Second
	handOverMax = 5 * time.Second
)

// leaderLease, in kube-system, names the server that runs controllers and scheduler.
const leaderLease = "skep-leader"

// lead runs controllers and scheduler whenever this server holds the lease, until ctx ends and both have
// ended and the lease is given back. The API must serve that long.
func (p *process) lead(ctx context.Context) error {
	defer close(p.handedOver)
	select {
	case <-p.server.Ready():
	case <-ctx.Done():
		return nil
	}
	for ctx.Err() == nil {
		if err := p.term(ctx); err != nil {
			return err
		}
	}
	return nil
}

// term waits for the lease, and returns when it is over.
func (p *process) term(ctx context.Context) error {
	client, err := p.client(api.BootstrapUser)
	if err != nil {
		return err
	}
	// Not ended by ctx: the lease is held until what it allows has ended.
	election, resign := context.WithCancel(context.WithoutCancel(ctx))
	defer resign()
	var began atomic.Bool
	ended := make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: leaderLease,
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: leaderLease}, Client: client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: fmt.Sprintf("%s_%d_%d", p.settings.nodeName, os.Getpid(), time.Now().UnixNano())},
		},
		LeaseDuration: leaseLife, RenewDeadline: leaseRenew, RetryPeriod: leaseRetry, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(term context.Context) {
				began.Store(true)
				work, end := context.WithCancel(term)
				defer end()
				defer context.AfterFunc(ctx, end)()
				ended <- p.rule(work)
				resign()
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("election: %w", err)
	}
	defer context.AfterFunc(ctx, func() {
		if !elector.IsLeader() {
			resign() // from the candidacy
		}
	})()
	elector.Run(election)
	if !began.Load() {
		return nil
	}
	err = <-ended
	p.log.Info("controllers and scheduler have ended on this server")
	return err
}

// rule runs controllers and scheduler until ctx ends, on caches of their own: a later term begins anew.
func (p *process) rule(ctx context.Context) error {
	if ctx.Err() != nil {
		return nil
	}
	p.log.Info("this server holds the lease: it runs controllers and scheduler")
	shared, err := p.client(api.InformersUser)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(shared, 0, informers.WithTransform(dropManagedFields))
	metrics := &termMetrics{Registerer: p.metrics}
	defer metrics.unregister()
	parts, err := p.leaderParts(factory, make(chan struct{}), metrics)
	if err != nil {
		return err
	}
	parts = append(parts, part{"authorities", p.tellAuthorities})
	return runParts(ctx, p.log, parts)
}

// tellAuthorities tells nodes whom to trust: the server that signs for them does, in each term. While servers take a step
// of `skep ca` one after the other, so the list names first who signs at the time, and in the end who all let sign.
func (p *process) tellAuthorities(ctx context.Context) error {
	bootstrap, err := p.client(api.BootstrapUser)
	if err != nil {
		return err
	}
	for {
		if err = publishAuthorities(ctx, bootstrap, p.authority.CAPEM()); err == nil || ctx.Err() != nil {
			return nil
		}
		p.log.Warn("tell nodes whom to trust, trying again", "error", err)
		select {
		case <-time.After(leaseRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// leaderParts are what one server of the cluster runs. registered is closed when all have their handlers.
func (p *process) leaderParts(factory informers.SharedInformerFactory, registered chan struct{}, metrics prometheus.Registerer) ([]part, error) {
	client, err := p.client("system:kube-scheduler")
	if err != nil {
		return nil, err
	}
	config, err := p.controllersConfig()
	if err != nil {
		return nil, err
	}
	config.Informers, config.Registered, config.Metrics = factory, registered, metrics
	if p.member == nil { // whoever leads for a while would leave its handlers there
		config.ServersInformers = p.server.Informers()
	}
	return []part{
		once(p.server.Ready(), "controllers", func(ctx context.Context) error { return controllers.Run(ctx, config) }),
		once(registered, "scheduler", func(ctx context.Context) error {
			return scheduler.Run(ctx, scheduler.Config{Client: client, Informers: factory, Log: p.log.With("part", "scheduler"), Metrics: metrics, Profiles: p.settings.profiles})
		}),
	}, nil
}

// termMetrics remembers what was registered, so that the next term can do so again.
type termMetrics struct {
	prometheus.Registerer
	of []prometheus.Collector
}

func (t *termMetrics) Register(c prometheus.Collector) error {
	err := t.Registerer.Register(c)
	if err == nil {
		t.of = append(t.of, c)
	}
	return err
}

func (t *termMetrics) MustRegister(all ...prometheus.Collector) {
	t.Registerer.MustRegister(all...)
	t.of = append(t.of, all...)
}

func (t *termMetrics) unregister() {
	for _, c := range t.of {
		t.Unregister(c)
	}
}

// followInformers fills the caches of a server that may lead or not: the node wants them in any case.
func (p *process) followInformers(ctx context.Context) error {
	close(p.registered)
	p.informers.StartWithContext(ctx)
	<-ctx.Done()
	return nil
}

// serve serves the API until ctx ends, and as long as this server still holds the lease after that.
func (p *process) serve(ctx context.Context) error {
	if p.handedOver == nil {
		return p.server.Run(ctx)
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() {
		select {
		case <-p.handedOver:
		case <-time.After(handOverMax):
		}
		stop()
	})()
	return p.server.Run(serving)
}
