// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"

	"k8s.io/client-go/dynamic"
	"slices"

	"skep.io/skep/controlplane/controllers/bootstrap"
	"skep.io/skep/controlplane/controllers/clusterpolicy"
	"skep.io/skep/controlplane/controllers/cronjob"
	"skep.io/skep/controlplane/controllers/csrapproval"
	"skep.io/skep/controlplane/controllers/daemonset"
	"skep.io/skep/controlplane/controllers/deployment"
	"skep.io/skep/controlplane/controllers/endpointslice"
	"skep.io/skep/controlplane/controllers/job"
	"skep.io/skep/controlplane/controllers/loadbalancer"
	"skep.io/skep/controlplane/controllers/localpath"
	"skep.io/skep/controlplane/controllers/nodeipam"
	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/controllers/podgc"
	"skep.io/skep/controlplane/controllers/podpreset"
	"skep.io/skep/controlplane/controllers/replicaset"
	"skep.io/skep/controlplane/controllers/statefulset"
)

// account is the user that upstream's bootstrap policy knows a controller by.
func account(name string) string { return "system:serviceaccount:kube-system:" + name }

// registry lists every controller: first skep's own, then upstream's.
func registry() []entry {
	return append(own(), []entry{
		{"namespace", account("namespace-controller"), makeNamespace},
		{"garbagecollector", account("generic-garbage-collector"), makeGarbageCollector},
		{"serviceaccount", account("service-account-controller"), makeServiceAccount},
		{"serviceaccounttoken", "system:kube-controller-manager", makeServiceAccountToken},
		{"rootcacertpublisher", account("root-ca-cert-publisher"), makeRootCAPublisher},
		{"clusterroleaggregation", account("clusterrole-aggregation-controller"), makeClusterRoleAggregation},
		{"tainteviction", account("node-controller"), makeTaintEviction},
		{"resourcequota", account("resourcequota-controller"), makeResourceQuota},
		{"disruption", account("disruption-controller"), makeDisruption},
		// These two keep 1.2 MB of heap in an idle cluster.
		{"autoscaling", account("horizontal-pod-autoscaler"), makeAutoscaling},
		{"policystatus", account("validatingadmissionpolicy-status-controller"), makePolicyStatus},
		{"ttlafterfinished", account("ttl-after-finished-controller"), makeTTLAfterFinished},
		{"endpoints", account("endpoint-controller"), makeEndpoints},
		{"endpointslicemirroring", account("endpointslicemirroring-controller"), makeEndpointSliceMirroring},
		{"csrsigning", account("certificate-controller"), makeCSRSigning},
		{"csrcleaner", account("certificate-controller"), makeCSRCleaner},
		{"tokencleaner", account("token-cleaner"), makeTokenCleaner},
		// Volumes: these five keep 0.7 MB of heap and 70 goroutines in an idle cluster.
		{"volumebinder", account("persistent-volume-binder"), makeVolumeBinder},
		{"claimprotection", account("pvc-protection-controller"), makeClaimProtection},
		{"volumeprotection", account("pv-protection-controller"), makeVolumeProtection},
		{"attributesprotection", account("volumeattributesclass-protection-controller"), makeAttributesProtection},
		{"ephemeralvolumes", account("ephemeral-volume-controller"), makeEphemeralVolumes},
	}...)
}

// own are the controllers of this repository.
func own() []entry {
	return []entry{
		{"bootstrap", "", func(_ context.Context, e env) (run, error) {
			return started(bootstrap.New(e.deps, e.cfg.ServiceCIDRs))
		}},
		{"nodeipam", account("node-controller"), func(_ context.Context, e env) (run, error) {
			return started(nodeipam.New(e.deps, e.cfg.ClusterCIDRs, e.cfg.NodeMaskIPv4, e.cfg.NodeMaskIPv6))
		}},
		{"nodelifecycle", account("node-controller"), func(_ context.Context, e env) (run, error) {
			return started(nodelifecycle.New(e.deps, e.cfg.NodeTiming))
		}},
		{"deployment", account("deployment-controller"), func(_ context.Context, e env) (run, error) {
			return started(deployment.New(e.deps))
		}},
		{"replicaset", account("replicaset-controller"), func(_ context.Context, e env) (run, error) {
			return started(replicaset.New(e.deps))
		}},
		{"replicationcontroller", account("replication-controller"), func(_ context.Context, e env) (run, error) {
			return started(replicaset.NewForControllers(e.deps))
		}},
		{"statefulset", account("statefulset-controller"), func(_ context.Context, e env) (run, error) {
			return started(statefulset.New(e.deps))
		}},
		{"daemonset", account("daemon-set-controller"), func(_ context.Context, e env) (run, error) {
			return started(daemonset.New(e.deps))
		}},
		{"job", account("job-controller"), func(_ context.Context, e env) (run, error) {
			return started(job.New(e.deps))
		}},
		{"cronjob", account("cronjob-controller"), func(_ context.Context, e env) (run, error) {
			return started(cronjob.New(e.deps))
		}},
		{"endpointslice", account("endpointslice-controller"), func(_ context.Context, e env) (run, error) {
			return started(endpointslice.New(e.deps))
		}},
		{"csrapproval", account("certificate-controller"), func(_ context.Context, e env) (run, error) {
			return started(csrapproval.New(e.deps, slices.Concat(e.cfg.ClusterCIDRs, e.cfg.ServiceCIDRs)))
		}},
		{"loadbalancer", account("service-controller"), func(_ context.Context, e env) (run, error) {
			pools, err := reader(e.cfg, "address-pool-controller")
			if err != nil {
				return nil, err
			}
			return started(loadbalancer.New(e.deps, e.cfg.Client, pools, e.cfg.ReservedPorts))
		}},
		{"clusterpolicy", account("cluster-policy-controller"), func(_ context.Context, e env) (run, error) {
			client, err := reader(e.cfg, "cluster-policy-controller")
			if err != nil {
				return nil, err
			}
			return started(clusterpolicy.New(e.deps, e.cfg.Client, client))
		}},
		{"podpreset", account("generic-garbage-collector"), func(_ context.Context, e env) (run, error) {
			client, err := reader(e.cfg, "generic-garbage-collector")
			if err != nil {
				return nil, err
			}
			return started(podpreset.New(e.deps, e.cfg.Client, client))
		}},
		{"localpath", account("local-path-provisioner"), func(_ context.Context, e env) (run, error) {
			return started(localpath.New(e.deps, localpath.NodeDirectories(e.deps.Client)))
		}},
		{"podgc", account("pod-garbage-collector"), func(_ context.Context, e env) (run, error) {
			return started(podgc.New(e.deps, e.cfg.TerminatedPods, podgc.Quarantine))
		}},
	}
}

// reader is a client for resources that are no Go types of client-go; nil where there is no API server.
func reader(cfg Config, name string) (dynamic.Interface, error) {
	if cfg.RESTConfig == nil {
		return nil, nil
	}
	client, err := dynamic.NewForConfig(cfg.RESTConfig(account(name)))
	if err != nil {
		return nil, fmt.Errorf("client of %s: %w", name, err)
	}
	return client, nil
}

func started(c interface{ Run(context.Context) error }, err error) (run, error) {
	if err != nil {
		return nil, err
	}
	return c.Run, nil
}
