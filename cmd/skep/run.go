// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/controllers"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/scheduler"
	"skep.io/skep/controlplane/store"
)

// A part runs until its context ends. When one fails, all end: a node without its data plane, or a
// control plane without controllers, would only look alive.
type part struct {
	name string
	run  func(context.Context) error
}

// lockWait is how long a start waits for the process that it replaces to let go of the store.
const lockWait = 5 * time.Second

// process is what the parts share.
type process struct {
	settings  serverSettings
	log       *slog.Logger
	metrics   prometheus.Registerer
	gatherer  prometheus.Gatherer
	authority *pki.Authority
	server    *apiserver.Server
	// informers keeps the cluster-wide objects that several parts want, once for all of them.
	informers informers.SharedInformerFactory
	// registered is closed when the informers may be started.
	registered chan struct{}
}

// runServer starts every part and returns when ctx ends or one of them fails.
func runServer(ctx context.Context, s serverSettings, log *slog.Logger) error {
	release, err := claimHost()
	if err != nil {
		return err
	}
	defer release()

	if _, err := os.Stat(filepath.Join(s.dataDir, "agent")); err == nil {
		return fmt.Errorf("%s is an agent's: this machine has joined another server's cluster; `skep reset` takes it out", s.dataDir)
	}
	started := time.Now()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	// The store first: its lock also keeps two processes from making two authorities.
	etcd, err := store.Open(ctx, store.Config{
		DataDir: filepath.Join(s.dataDir, "server"), LockWait: lockWait, Log: log.With("part", "store"),
	})
	if err != nil {
		return err
	}
	authority, err := pki.Open(filepath.Join(s.dataDir, "server", "tls"))
	if err != nil {
		return errors.Join(err, etcd.Close())
	}
	pace := newPacer(log)
	server, err := apiserver.New(ctx, apiserver.Config{
		Store: etcd, PKI: authority,
		BindAddress: s.bindAddress, Port: s.securePort, AdvertiseAddress: s.advertiseAddress, ExtraSANs: s.tlsSANs,
		ServiceCIDRs: s.serviceCIDRs, NodePortRange: s.nodePortRange.String(), ClusterDomain: s.clusterDomain,
		OnWrite: pace.busy, Log: log.With("part", "apiserver"),
	})
	if err != nil {
		return errors.Join(err, etcd.Close())
	}

	registry := prometheus.NewRegistry()
	p := &process{settings: s, log: log, metrics: registry, gatherer: registry, authority: authority, server: server, registered: make(chan struct{})}
	parts, err := p.parts(ctx)
	if err != nil {
		ended, cancel := context.WithCancel(ctx)
		cancel()
		return errors.Join(err, server.Run(ended), etcd.Close()) // Run gives the port back
	}
	log.Info("starting", "node", s.nodeName, "version", skepVersion, "data", s.dataDir)
	parts = append(parts, part{"announce", func(ctx context.Context) error { return p.announce(ctx, started) }}, part{"pacer", pace.run})
	return errors.Join(runParts(ctx, log, parts), etcd.Close())
}

// parts lists everything that runs in this process: the place to add a part.
func (p *process) parts(ctx context.Context) ([]part, error) {
	shared, err := p.client(api.InformersUser)
	if err != nil {
		return nil, err
	}
	p.informers = informers.NewSharedInformerFactoryWithOptions(shared, 0, informers.WithTransform(dropManagedFields))
	schedulerClient, err := p.client("system:kube-scheduler")
	if err != nil {
		return nil, err
	}
	controllersConfig, err := p.controllersConfig()
	if err != nil {
		return nil, err
	}
	agent, err := p.newAgent()
	if err != nil {
		return nil, err
	}
	if err := agent.start(ctx); err != nil {
		return nil, err
	}
	return append([]part{
		{"apiserver", p.server.Run},
		once(p.server.Ready(), "controllers", func(ctx context.Context) error { return controllers.Run(ctx, controllersConfig) }),
		once(p.registered, "scheduler", func(ctx context.Context) error {
			return scheduler.Run(ctx, scheduler.Config{Client: schedulerClient, Informers: p.informers,
				Log: p.log.With("part", "scheduler"), Metrics: p.metrics})
		}),
	}, agent.parts()...), nil
}

// newAgent is this server's own node, which reaches the API within the process.
func (p *process) newAgent() (*agent, error) {
	client, err := p.client("system:node:"+p.settings.nodeName, "system:nodes")
	if err != nil {
		return nil, err
	}
	ingressClient, err := p.client(api.IngressUser)
	if err != nil {
		return nil, err
	}
	hosts := []string{p.settings.nodeName, "127.0.0.1", "::1"}
	for _, addr := range p.settings.nodeIPs {
		hosts = append(hosts, addr.String())
	}
	certPEM, keyPEM, err := p.authority.IssueServer("system:node:"+p.settings.nodeName, hosts)
	if err != nil {
		return nil, fmt.Errorf("certificate of the node's API: %w", err)
	}
	serving, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate of the node's API: %w", err)
	}
	return &agent{
		nodeSettings: p.settings.nodeSettings, cluster: p.settings.clusterSettings,
		access: access{
			node: client, ingress: ingressClient, informers: p.informers, ready: p.server.Ready(), registered: p.registered,
			serving: func() (*tls.Certificate, error) { return &serving, nil }, clientCA: p.authority.CAPool(),
			ingressAddresses: readyAddresses(p.informers),
		},
		log: p.log, metrics: p.metrics, gatherer: p.gatherer,
	}, nil
}

// once starts a part when something has happened. What needs the API from its first moment on waits
// until it answers: an informer that is refused pauses for a second, and upstream's controllers end
// the process when discovery fails. What starts the shared informers waits until every controller
// has its handlers.
func once(happened <-chan struct{}, name string, run func(context.Context) error) part {
	return part{name, func(ctx context.Context) error {
		select {
		case <-happened:
			return run(ctx)
		case <-ctx.Done():
			return nil
		}
	}}
}

func (p *process) controllersConfig() (controllers.Config, error) {
	client, err := p.client(api.BootstrapUser)
	if err != nil {
		return controllers.Config{}, err
	}
	key, err := os.ReadFile(p.authority.ServiceAccountKeyFile())
	if err != nil {
		return controllers.Config{}, fmt.Errorf("service account key: %w", err)
	}
	return controllers.Config{
		Client: client, Informers: p.informers, Registered: p.registered,
		RESTConfig: func(user string) *rest.Config {
			return p.config(user, accountGroups(user)...)
		},
		ClusterCIDRs: p.settings.clusterCIDRs, ServiceCIDRs: p.settings.serviceCIDRs,
		ReservedPorts: map[int32]string{
			int32(p.settings.ingressHTTPPort): "ingress", int32(p.settings.ingressHTTPSPort): "ingress",
			int32(p.settings.securePort): "API", api.DefaultNodeAPIPort: "nodes' API",
		},
		RootCA: p.authority.CAPEM(), CAFile: p.authority.CAFile(), CAKeyFile: p.authority.CAKeyFile(), ServiceAccountKey: key,
		Log: p.log.With("part", "controllers"), Metrics: p.metrics,
	}, nil
}

// accountGroups are the groups that the API server gives to a service account's token.
func accountGroups(user string) []string {
	namespace, _, err := serviceaccount.SplitUsername(user)
	if err != nil {
		return nil // not a service account
	}
	return serviceaccount.MakeGroupNames(namespace)
}

// runParts runs all parts until ctx ends or the first of them returns an error. That is logged at once:
// some of upstream's controllers end the process when the API does not answer any more.
func runParts(ctx context.Context, log *slog.Logger, parts []part) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, part := range parts {
		group.Go(func() error {
			err := part.run(ctx)
			if err != nil && !(ctx.Err() != nil && errors.Is(err, context.Canceled)) {
				log.Error("a part failed, all end", "part", part.name, "error", err)
				return fmt.Errorf("%s: %w", part.name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// config is the in-process configuration of a client that acts as user.
func (p *process) config(user string, groups ...string) *rest.Config {
	c := p.server.ClientConfig(user, groups...)
	c.UserAgent = "skep/" + skepVersion
	return c
}

func (p *process) client(user string, groups ...string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(p.config(user, groups...))
}

// announce writes the administrator's kubeconfig once the API is ready, and gives memory back when
// starting is over.
func (p *process) announce(ctx context.Context, started time.Time) error {
	select {
	case <-p.server.Ready():
	case <-ctx.Done():
		return nil
	}
	cert, key, err := p.authority.IssueClient("kubernetes-admin", []string{"system:masters"})
	if err != nil {
		return err
	}
	url := "https://" + net.JoinHostPort(p.localAPIHost(), strconv.Itoa(p.settings.securePort))
	if err := pki.WriteKubeconfig(p.settings.kubeconfigPath, url, p.authority.CAPEM(), cert, key); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	bootstrap, err := p.client(api.BootstrapUser)
	if err != nil {
		return err
	}
	if err := publishCluster(ctx, bootstrap, p.settings.clusterSettings); err != nil {
		return err
	}
	p.log.Info("the API is ready", "url", url, "kubeconfig", p.settings.kubeconfigPath, "after", time.Since(started).Round(time.Millisecond))
	settle(ctx, p.log)
	return nil
}

// localAPIHost is the address by which programs on this host reach the API.
func (p *process) localAPIHost() string {
	switch ip := p.settings.bindAddress; {
	case !ip.IsUnspecified():
		return ip.String()
	default:
		return "127.0.0.1"
	}
}

// dropManagedFields frees the informers' objects of what no part reads. An update without managed
// fields leaves the stored ones alone.
func dropManagedFields(object any) (any, error) {
	if accessor, err := meta.Accessor(object); err == nil {
		accessor.SetManagedFields(nil)
	}
	return object, nil
}
