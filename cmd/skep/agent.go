// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
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

// agent is what every node runs.
type agent struct {
	p         *process
	dataplane *dataplane.Dataplane
	node      *node.Agent
	ingress   *ingress.Server
}

func (p *process) newAgent(ctx context.Context) (*agent, error) {
	a := &agent{p: p}
	cgroup2, err := unifiedHierarchy()
	if err != nil {
		return nil, err
	}
	events, err := p.nodeEvents(ctx)
	if err != nil {
		return nil, err
	}
	a.dataplane, err = dataplane.New(ctx, dataplane.Config{
		NodeName: p.settings.nodeName, NodeIPs: p.settings.nodeIPs,
		ClusterCIDRs: p.settings.clusterCIDRs, ServiceCIDRs: p.settings.serviceCIDRs, ClusterDNS: p.settings.clusterDNS,
		NodePortRange: dataplane.PortRange{
			First: uint16(p.settings.nodePortRange.Base),
			Last:  uint16(p.settings.nodePortRange.Base + p.settings.nodePortRange.Size - 1),
		},
		CgroupPath: cgroup2, Informers: p.informers, Events: events, Log: p.log.With("part", "dataplane"), Metrics: p.metrics,
	})
	if err != nil {
		return nil, err
	}
	if a.ingress, err = a.newIngress(ctx); err != nil {
		a.dataplane.Close()
		return nil, err
	}
	if a.node, err = a.newNode(ctx); err != nil {
		a.dataplane.Close()
		return nil, err
	}
	return a, nil
}

// nodeEvents writes the data plane's events in the name of the node.
func (p *process) nodeEvents(ctx context.Context) (record.EventRecorder, error) {
	client, err := p.client("system:node:"+p.settings.nodeName, "system:nodes")
	if err != nil {
		return nil, err
	}
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	context.AfterFunc(ctx, broadcaster.Shutdown)
	return broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "skep-dataplane", Host: p.settings.nodeName}), nil
}

func (a *agent) parts() []part {
	s := a.p.settings
	return []part{
		a.p.withInformers("dataplane", a.dataplane.Run),
		a.p.withInformers("ingress", a.ingress.Run),
		a.p.withInformers("dns", func(ctx context.Context) error {
			return dns.Run(ctx, dns.Config{
				Addrs: s.clusterDNS, Domain: s.clusterDomain, Informers: a.p.informers, NodeName: s.nodeName,
				Prefixes: slices.Concat(s.clusterCIDRs, s.serviceCIDRs), Upstreams: s.upstreamDNS,
				Log: a.p.log.With("part", "dns"), Metrics: a.p.metrics,
			})
		}),
		a.p.onceReady("node", a.node.Run),
	}
}

// newNode starts the container runtime; the node registers itself when it runs.
func (a *agent) newNode(ctx context.Context) (*node.Agent, error) {
	s := a.p.settings
	client, err := a.p.client("system:node:"+s.nodeName, "system:nodes")
	if err != nil {
		return nil, err
	}
	hosts := []string{s.nodeName, "127.0.0.1", "::1"}
	for _, addr := range s.nodeIPs {
		hosts = append(hosts, addr.String())
	}
	certPEM, keyPEM, err := a.p.authority.IssueServer("system:node:"+s.nodeName, hosts)
	if err != nil {
		return nil, fmt.Errorf("certificate of the node's API: %w", err)
	}
	serving, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate of the node's API: %w", err)
	}
	config := node.Config{
		NodeName: s.nodeName, NodeIPs: s.nodeIPs, Client: client, Informers: a.p.informers,
		DataDir: s.dataDir, ImagesDir: s.imagesDir, ClusterDNS: s.clusterDNS, ClusterDomain: s.clusterDomain,
		Network: a.dataplane, RuntimeConfig: runtime.Config{ContainerdAddress: s.containerdAddress},
		ServingCert: serving, ClientCA: a.p.authority.CAPool(),
		Log: a.p.log.With("part", "node"), Metrics: a.p.metrics,
	}
	config.ServeAPI = func(ctx context.Context, n *node.Agent) error { return a.p.serveNodeAPI(ctx, n, config) }
	return node.New(ctx, config)
}

// newIngress makes the proxy with its listeners. They listen on loopback and a port that nobody
// knows; the kernel hands them what arrives for the ingress ports of the node's addresses.
func (a *agent) newIngress(ctx context.Context) (*ingress.Server, error) {
	client, err := a.p.client("system:skep", "system:masters")
	if err != nil {
		return nil, err
	}
	s := a.p.settings
	plain, err := a.steered(ctx, s.ingressHTTPPort)
	if err != nil {
		return nil, err
	}
	secure, err := a.steered(ctx, s.ingressHTTPSPort)
	if err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	server, err := ingress.New(ingress.Config{
		Client: client, Informers: a.p.informers, Backends: a.dataplane.Services(), NodeIPs: s.nodeIPs,
		ListenHTTP: plain, ListenHTTPS: secure, HTTPSPort: s.ingressHTTPSPort,
		StatusAddresses: func() []netip.Addr { return s.nodeIPs },
		Log:             a.p.log.With("part", "ingress"), Metrics: a.p.metrics,
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
