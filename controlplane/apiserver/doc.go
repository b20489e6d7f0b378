// SPDX-License-Identifier: Apache-2.0

// Package apiserver assembles Kubernetes' API, version 1.36, from upstream's packages in this
// process, over the embedded etcd of package store.
//
// What happens in which order (file in brackets):
//
//	New
//	 ├ certificates on disk, port opened                        [certs.go, server.go]
//	 ├ upstream's options: Config in upstream's words           [options.go]
//	 ├ what all servers share                                   [generic.go]
//	 │   loopback client ── in-process transport ──┐            [inprocess/]
//	 │   storage ── in-process etcd client         │            [etcdclient.go]
//	 │   authentication: in-process tokens, client certificates, [identities.go]
//	 │     service accounts, bootstrap tokens, front proxy, anonymous
//	 │   authorization: Node, RBAC                 │
//	 │   hooks that fill an empty cluster          │            [bootstrap.go]
//	 └ the chain, each server the delegate of the one before    [chain.go]
//	     aggregator ─► built-in groups ─► custom resources ─► 404
//	                   ├ metrics.k8s.io: asks nodes           [metrics.go, metricsapi/]
//	                   └ OpenAPI v2 and v3, made on demand      [openapi.go]
//	Run
//	 ├ routes and health checks are fixed, then the transport gets its handler:
//	 │   until here an in-process client was told ECONNREFUSED, and tries again
//	 ├ TLS is served, hooks run, informers fill; /readyz says ok ── Ready() is closed
//	 └ ctx ends or the store fails: requests drain, watches end, the port closes
//
// Two things of upstream are replaced and not configured. Storage gets its etcd client from an
// unexported variable (etcdclient.go says why), and two post-start hooks that wait a second before
// they look are swapped for ones that do not (bootstrap.go).
//
// Upstream keeps feature gates, capabilities and metrics in process-wide variables. Servers may
// follow one another in one process, and run beside one another, as long as they want the same.
//
// Several servers may serve one cluster, each over its own member of the store (Config.Clustered): then the
// endpoints of the Service "kubernetes" are kept by leases. Identity leases of upstream's stay off: nothing asks
// for them while all servers know the same resources.
package apiserver
