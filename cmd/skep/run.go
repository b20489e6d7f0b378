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
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/controllers"
	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/pki"
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
	// member and agreed are nil if this server is the only one. If not, handedOver is closed when it leads no more.
	member     *membership
	handedOver chan struct{}
	// informers keeps the cluster-wide objects that several parts want, once for all of them.
	informers informers.SharedInformerFactory
	agreed    *agreement
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

	if err := checkFormat(s.dataDir); err != nil {
		return err
	}
	if isAgentsDir(s.dataDir) {
		return fmt.Errorf("%s is an agent's: this machine has joined another server's cluster; `skep reset` takes it out", s.dataDir)
	}
	started := time.Now()
	collectAt(gcPercent)
	member, err := findMembership(ctx, s, log)
	if err != nil {
		return untilStopped(ctx, err)
	}
	if member != nil && member.Settings != nil {
		if s.clusterSettings, err = clusterFrom(member.Settings, s.hasIPv6); err != nil {
			return err
		}
	}
	if err := s.conflicts(s.networks); err != nil {
		return err
	}
	// The host is claimed: nobody else makes an authority here.
	authority, err := pki.Open(filepath.Join(s.dataDir, "server", "tls"))
	if err != nil {
		return err
	}
	if member != nil {
		if err := prepareEncryption(s, member); err != nil {
			return err
		}
	}
	etcd, err := openStore(ctx, s, member, authority, log)
	if err != nil {
		return err
	}
	if err := writeFormat(s.dataDir); err != nil {
		return errors.Join(err, etcd.Close())
	}
	agreed, authority, err := agree(ctx, s, member, authority, etcd, log.With("part", "servers"))
	if err != nil {
		return errors.Join(err, etcd.Close())
	}
	if member == nil { // its keys may have been in the store
		if err := prepareEncryption(s, nil); err != nil {
			return errors.Join(err, etcd.Close())
		}
	}
	pace := newPacer(log)
	server, err := apiserver.New(ctx, apiserver.Config{
		Store: etcd, PKI: authority,
		BindAddress: s.bindAddress, Port: s.securePort, AdvertiseAddress: s.advertiseAddress, ExtraSANs: s.tlsSANs,
		ServiceCIDRs: s.serviceCIDRs, NodePortRange: s.nodePortRange.String(), ClusterDomain: s.clusterDomain,
		Clustered: member != nil, Join: joinHandler(etcd, authority, s.clusterSettings.data(), log.With("part", "join")),
		Access: s.access, OnWrite: pace.busy, Log: log.With("part", "apiserver"),
	})
	if err != nil {
		return errors.Join(err, etcd.Close())
	}

	registry := prometheus.NewRegistry()
	p := &process{settings: s, log: log, metrics: registry, gatherer: registry, authority: authority, server: server, member: member, agreed: agreed, registered: make(chan struct{})}
	if member != nil {
		p.handedOver = make(chan struct{})
	}
	parts, err := p.parts(ctx)
	if err != nil {
		ended, cancel := context.WithCancel(ctx)
		cancel()
		return errors.Join(err, server.Run(ended), etcd.Close()) // Run gives the port back
	}
	parts = append(parts, p.localParts(etcd)...)
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
	agent, err := p.newAgent()
	if err != nil {
		return nil, err
	}
	if err := agent.start(ctx); err != nil {
		return nil, err
	}
	parts := []part{{"apiserver", p.serve}}
	if p.member != nil {
		parts = append(parts, part{"leader", p.lead}, once(p.server.Ready(), "informers", p.followInformers))
	} else {
		always, err := p.leaderParts(p.informers, p.registered, p.metrics)
		if err != nil {
			return nil, err
		}
		parts = append(parts, always...)
	}
	return append(parts, agent.parts()...), nil
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
	resources, err := dynamic.NewForConfig(p.config(api.InformersUser))
	if err != nil {
		return nil, err
	}
	return &agent{
		nodeSettings: p.settings.nodeSettings, cluster: p.settings.clusterSettings,
		access: access{
			node: client, ingress: ingressClient, informers: p.informers, dynamic: resources, ready: p.server.Ready(), registered: p.registered,
			serving: func() (*tls.Certificate, error) { return &serving, nil }, clientCA: p.authority.CAPool,
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
		Client: client,
		RESTConfig: func(user string) *rest.Config {
			return p.config(user, accountGroups(user)...)
		},
		ClusterCIDRs: p.settings.clusterCIDRs, ServiceCIDRs: p.settings.serviceCIDRs,
		ReservedPorts: map[int32]string{
			int32(p.settings.ingressHTTPPort): "ingress", int32(p.settings.ingressHTTPSPort): "ingress",
			int32(p.settings.securePort): "API", api.DefaultNodeAPIPort: "nodes' API",
		},
		NodeTiming: nodelifecycle.Timing{Grace: p.settings.nodeGrace},
		RootCA:     p.authority.CAPEM(), CAFile: p.authority.CAFile(), CAKeyFile: p.authority.CAKeyFile(), ServiceAccountKey: key,
		Log: p.log.With("part", "controllers"),
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
// ending takes a while.
func runParts(ctx context.Context, log *slog.Logger, parts []part) error {
	group, ctx := errgroup.WithContext(ctx)
	klog.OsExit = upstreamExit(ctx)
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

// upstreamExit is how upstream's libraries end the process where they know no other way. Some do when they are
// interrupted while they start: then only their goroutine ends, as everything is about to, for a reason that is still to be told.
func upstreamExit(ctx context.Context) func(code int) {
	return func(code int) {
		if ctx.Err() != nil {
			runtime.Goexit()
		}
		os.Exit(code)
	}
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
	// Who was told the settings does not tell them. The authorities are told by the server that signs.
	if p.member == nil || p.member.Settings == nil {
		if err := publishCluster(ctx, bootstrap, p.settings.data()); err != nil {
			return err
		}
	}
	if p.member == nil {
		if err := publishAuthorities(ctx, bootstrap, p.authority.CAPEM()); err != nil {
			return err
		}
	}
	p.log.Info("the API is ready", "url", url, "kubeconfig", p.settings.kubeconfigPath, "after", time.Since(started).Round(time.Millisecond))
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
