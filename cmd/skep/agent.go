// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/dataplane"
	"skep.io/skep/ingress"
	"skep.io/skep/node"
	"skep.io/skep/node/dns"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

// access is how a node reaches the API and shows who it is: within a server's process, or by TLS.
type access struct {
	node, ingress kubernetes.Interface
	informers     informers.SharedInformerFactory
	dynamic       dynamic.Interface // for resources that are no Go types of client-go; it only lists and watches
	ready         <-chan struct{}   // closed once the API answers
	registered    <-chan struct{}   // closed once the informers may be started
	// serving is the certificate of the node's API, asked at every handshake.
	serving  func() (*tls.Certificate, error)
	clientCA func() *x509.CertPool // asked as often
	// ingressAddresses go into the status of Ingresses; nil where another node writes them.
	ingressAddresses func() []netip.Addr
}

// agent is what every node runs.
type agent struct {
	nodeSettings
	cluster   clusterSettings
	access    access
	log       *slog.Logger
	metrics   prometheus.Registerer
	gatherer  prometheus.Gatherer
	dataplane *dataplane.Dataplane
	node      *node.Agent
	ingress   *ingress.Server
}

// start loads the data plane and starts the container runtime; parts run what it made.
func (a *agent) start(ctx context.Context) error {
	cgroup2, err := unifiedHierarchy()
	if err != nil {
		return err
	}
	a.dataplane, err = dataplane.New(ctx, dataplane.Config{
		NodeName: a.nodeName, NodeIPs: a.nodeIPs,
		ClusterCIDRs: a.cluster.clusterCIDRs, ServiceCIDRs: a.cluster.serviceCIDRs, ClusterDNS: a.cluster.clusterDNS,
		Routing: a.cluster.routing, NodePortMode: a.cluster.nodePortMode, XDP: a.xdp, ConntrackMax: a.conntrackMax,
		CgroupPath: cgroup2, Informers: a.access.informers, Dynamic: a.access.dynamic, Events: a.nodeEvents(ctx), Log: a.log.With("part", "dataplane"), Metrics: a.metrics,
	})
	if err != nil {
		return err
	}
	if a.ingress, err = a.newIngress(ctx); err != nil {
		a.dataplane.Close()
		return err
	}
	if a.node, err = a.newNode(ctx); err != nil {
		a.dataplane.Close()
		return err
	}
	return nil
}

// nodeEvents writes the data plane's events in the name of the node.
func (a *agent) nodeEvents(ctx context.Context) record.EventRecorder {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: a.access.node.CoreV1().Events("")})
	context.AfterFunc(ctx, broadcaster.Shutdown)
	return broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "skep-dataplane", Host: a.nodeName})
}

func (a *agent) parts() []part {
	return []part{
		once(a.access.registered, "dataplane", a.dataplane.Run),
		once(a.access.registered, "ingress", a.ingress.Run),
		once(a.access.registered, "dns", func(ctx context.Context) error {
			return dns.Run(ctx, dns.Config{
				Addrs: a.cluster.clusterDNS, Domain: a.cluster.clusterDomain, Informers: a.access.informers, NodeName: a.nodeName,
				Prefixes: slices.Concat(a.cluster.clusterCIDRs, a.cluster.serviceCIDRs), Upstreams: a.upstreamDNS,
				Log: a.log.With("part", "dns"), Metrics: a.metrics,
			})
		}),
		once(a.access.ready, "node", a.node.Run),
		{"node's control socket", func(ctx context.Context) error {
			return serveControl(ctx, nodeSocket, shutdownOrders(a.node), a.log.With("part", "control"))
		}},
	}
}

// newNode starts the container runtime; the node registers itself when it runs.
func (a *agent) newNode(ctx context.Context) (*node.Agent, error) {
	mtu, err := a.dataplane.PodMTU()
	if err != nil {
		return nil, err
	}
	return node.New(ctx, node.Config{
		NodeName: a.nodeName, NodeIPs: a.nodeIPs, Client: a.access.node, Informers: a.access.informers,
		DataDir: a.dataDir, ImagesDir: a.imagesDir, StaticPodDir: a.staticPodDir, ClusterDNS: a.cluster.clusterDNS, ClusterDomain: a.cluster.clusterDomain,
		Network: a.dataplane, MTU: mtu, RuntimeConfig: runtime.Config{ContainerdAddress: a.containerdAddress, RegistryConfigDir: a.registryConfigDir},
		UnsafeSysctls: a.unsafeSysctls, LeaseLife: a.cluster.nodeGrace, ImageGC: a.imageGC, Eviction: a.eviction, ServeAPI: a.serveNodeAPI, Log: a.log.With("part", "node"), Metrics: a.metrics,
		KubeReserved: a.kubeReserved, SystemReserved: a.systemReserved, PodMaxPids: a.podMaxPids, Shutdown: a.shutdown,
	})
}

// newIngress makes the proxy with its listeners. They listen on loopback and a port that nobody
// knows; the kernel hands them what arrives for the ingress ports of the node's addresses.
func (a *agent) newIngress(ctx context.Context) (*ingress.Server, error) {
	plain, err := a.steered(ctx, a.cluster.ingressHTTPPort)
	if err != nil {
		return nil, err
	}
	secure, err := a.steered(ctx, a.cluster.ingressHTTPSPort)
	if err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	server, err := ingress.New(ingress.Config{
		Client: a.access.ingress, Informers: a.access.informers, Backends: a.dataplane.Services(), NodeIPs: a.nodeIPs,
		ListenHTTP: plain, ListenHTTPS: secure, HTTPSPort: a.cluster.ingressHTTPSPort,
		StatusAddresses: a.access.ingressAddresses,
		Log:             a.log.With("part", "ingress"), Metrics: a.metrics,
	})
	if err != nil {
		return nil, errors.Join(err, plain.Close(), secure.Close())
	}
	return server, nil
}

// unifiedHierarchy is where the cgroup v2 hierarchy is mounted: the socket hooks attach to its root,
// so that they serve pods and the host's own processes.
func unifiedHierarchy() (string, error) {
	hierarchies, err := cgroup.Hierarchies()
	if err != nil {
		return "", err
	}
	for _, h := range hierarchies {
		if h.Unified {
			return h.Mount, nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted: `skep check` says how to mount it")
}
