// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/apiserver/pkg/quota/v1/generic"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/scale"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/certificates/rootcacertpublisher"
	"k8s.io/kubernetes/pkg/controller/clusterroleaggregation"
	"k8s.io/kubernetes/pkg/controller/disruption"
	"k8s.io/kubernetes/pkg/controller/endpoint"
	"k8s.io/kubernetes/pkg/controller/endpointslicemirroring"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	"k8s.io/kubernetes/pkg/controller/namespace"
	"k8s.io/kubernetes/pkg/controller/resourcequota"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	"k8s.io/kubernetes/pkg/controller/tainteviction"
	"k8s.io/kubernetes/pkg/controller/ttlafterfinished"
	"k8s.io/kubernetes/pkg/controller/validatingadmissionpolicystatus"

	quotainstall "k8s.io/kubernetes/pkg/quota/v1/install"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// Upstream's defaults, as kube-controller-manager sets them.
const (
	namespaceSyncPeriod = 5 * time.Minute
	quotaSyncPeriod     = 5 * time.Minute
	// discoveryPeriod is how often the collectors of every kind look for new kinds.
	discoveryPeriod = 30 * time.Second
	// maxMirrored is how many addresses of one subset of an Endpoints become EndpointSlices.
	maxMirrored = 1000
)

// blocking wraps a controller that runs until its context ends and cannot fail.
func blocking(f func(ctx context.Context)) run {
	return func(ctx context.Context) error {
		f(ctx)
		return nil
	}
}

func makeNamespace(ctx context.Context, e env) (run, error) {
	objects, err := metadata.NewForConfig(e.rest)
	if err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	c := namespace.NewNamespaceController(ctx, e.deps.Client, objects,
		e.deps.Client.Discovery().ServerPreferredNamespacedResources,
		e.cfg.Informers.Core().V1().Namespaces(), namespaceSyncPeriod, corev1.FinalizerKubernetes)
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}

func makeGarbageCollector(ctx context.Context, e env) (run, error) {
	objects, err := metadata.NewForConfig(e.rest)
	if err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	gc, err := garbagecollector.NewGarbageCollector(ctx, e.deps.Client, objects, e.kinds.mapper,
		garbagecollector.DefaultIgnoredResources(), e.kinds, e.kinds.started)
	if err != nil {
		return nil, fmt.Errorf("garbage collector: %w", err)
	}
	return blocking(func(ctx context.Context) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			gc.Sync(ctx, e.deps.Client.Discovery(), discoveryPeriod)
		}()
		gc.Run(ctx, 5, discoveryPeriod)
		<-done
	}), nil
}

func makeServiceAccount(ctx context.Context, e env) (run, error) {
	c, err := serviceaccountcontroller.NewServiceAccountsController(klog.FromContext(ctx),
		e.cfg.Informers.Core().V1().ServiceAccounts(), e.cfg.Informers.Core().V1().Namespaces(), e.deps.Client,
		serviceaccountcontroller.DefaultServiceAccountsControllerOptions())
	if err != nil {
		return nil, err
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

// makeServiceAccountToken fills the Secrets by which people ask for tokens that do not expire.
func makeServiceAccountToken(ctx context.Context, e env) (run, error) {
	if len(e.cfg.ServiceAccountKey) == 0 {
		return nil, nil
	}
	key, err := keyutil.ParsePrivateKeyPEM(e.cfg.ServiceAccountKey)
	if err != nil {
		return nil, fmt.Errorf("service account key: %w", err)
	}
	generator, err := serviceaccount.JWTTokenGenerator(serviceaccount.LegacyIssuer, key)
	if err != nil {
		return nil, fmt.Errorf("token generator: %w", err)
	}
	c, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx),
		e.cfg.Informers.Core().V1().ServiceAccounts(), e.cfg.Informers.Core().V1().Secrets(), e.deps.Client,
		serviceaccountcontroller.TokensControllerOptions{TokenGenerator: generator, RootCA: e.cfg.RootCA})
	if err != nil {
		return nil, err
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}

func makeRootCAPublisher(_ context.Context, e env) (run, error) {
	if len(e.cfg.RootCA) == 0 {
		return nil, nil
	}
	c, err := rootcacertpublisher.NewPublisher(e.cfg.Informers.Core().V1().ConfigMaps(), e.cfg.Informers.Core().V1().Namespaces(),
		e.deps.Client, e.cfg.RootCA)
	if err != nil {
		return nil, err
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

func makeClusterRoleAggregation(_ context.Context, e env) (run, error) {
	c := clusterroleaggregation.NewClusterRoleAggregation(e.cfg.Informers.Rbac().V1().ClusterRoles(), e.deps.Client.RbacV1())
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}

func makeTaintEviction(ctx context.Context, e env) (run, error) {
	c, err := tainteviction.New(ctx, e.deps.Client, e.cfg.Informers.Core().V1().Pods(), e.cfg.Informers.Core().V1().Nodes(),
		"taint-eviction-controller")
	if err != nil {
		return nil, err
	}
	return blocking(c.Run), nil
}

func makeResourceQuota(ctx context.Context, e env) (run, error) {
	discover := e.deps.Client.Discovery().ServerPreferredNamespacedResources
	quota, err := quotainstall.NewQuotaConfigurationForControllers(generic.ListerFuncForResourceFunc(e.kinds.ForResource), e.cfg.Informers)
	if err != nil {
		return nil, fmt.Errorf("quota evaluators: %w", err)
	}
	c, err := resourcequota.NewController(ctx, &resourcequota.ControllerOptions{
		QuotaClient:               e.deps.Client.CoreV1(),
		ResourceQuotaInformer:     e.cfg.Informers.Core().V1().ResourceQuotas(),
		ResyncPeriod:              controller.StaticResyncPeriodFunc(quotaSyncPeriod),
		ReplenishmentResyncPeriod: controller.NoResyncPeriodFunc,
		InformerFactory:           e.kinds,
		InformersStarted:          e.kinds.started,
		DiscoveryFunc:             discover,
		IgnoredResourcesFunc:      quota.IgnoredResources,
		Registry:                  generic.NewRegistry(quota.Evaluators()),
		UpdateFilter:              quotainstall.DefaultUpdateFilter(),
	})
	if err != nil {
		return nil, fmt.Errorf("resource quota: %w", err)
	}
	return blocking(func(ctx context.Context) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Sync(ctx, discover, discoveryPeriod)
		}()
		c.Run(ctx, 5)
		<-done
	}), nil
}

// scaleClient reads and writes the size of whatever has one.
func scaleClient(e env) (scale.ScalesGetter, error) {
	scales, err := scale.NewForConfig(e.rest, e.kinds.mapper, dynamic.LegacyAPIPathResolverFunc,
		scale.NewDiscoveryScaleKindResolver(e.deps.Client.Discovery()))
	if err != nil {
		return nil, fmt.Errorf("scale client: %w", err)
	}
	return scales, nil
}

func makeDisruption(ctx context.Context, e env) (run, error) {
	scales, err := scaleClient(e)
	if err != nil {
		return nil, err
	}
	core, apps := e.cfg.Informers.Core().V1(), e.cfg.Informers.Apps().V1()
	c := disruption.NewDisruptionController(ctx, core.Pods(), e.cfg.Informers.Policy().V1().PodDisruptionBudgets(),
		core.ReplicationControllers(), apps.ReplicaSets(), apps.Deployments(), apps.StatefulSets(),
		e.deps.Client, e.kinds.mapper, scales, e.deps.Client.Discovery())
	return blocking(c.Run), nil
}

// makePolicyStatus makes the controller that tells, in a ValidatingAdmissionPolicy's status, which of its expressions
// do not fit the types that it is about. Types are asked of the API server when there is a policy: upstream's table of
// all of them would stay in memory for as long as the process lives.
func makePolicyStatus(_ context.Context, e env) (run, error) {
	policies := e.cfg.Informers.Admissionregistration().V1().ValidatingAdmissionPolicies()
	c, err := validatingadmissionpolicystatus.NewController(policies, e.deps.Client.AdmissionregistrationV1().ValidatingAdmissionPolicies(),
		&validating.TypeChecker{
			SchemaResolver: &resolver.ClientDiscoveryResolver{Discovery: e.deps.Client.Discovery()},
			RestMapper:     e.kinds.mapper,
		})
	if err != nil {
		return nil, err
	}
	return blocking(func(ctx context.Context) { c.Run(ctx, 1) }), nil
}

func makeTTLAfterFinished(ctx context.Context, e env) (run, error) {
	c := ttlafterfinished.New(ctx, e.cfg.Informers.Batch().V1().Jobs(), e.deps.Client)
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}

func makeEndpoints(ctx context.Context, e env) (run, error) {
	core := e.cfg.Informers.Core().V1()
	c := endpoint.NewEndpointController(ctx, core.Pods(), core.Services(), core.Endpoints(), e.deps.Client, 0)
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}

// makeEndpointSliceMirroring keeps EndpointSlices of Endpoints that people write for Services without selector, as nothing
// else reads those.
func makeEndpointSliceMirroring(ctx context.Context, e env) (run, error) {
	core := e.cfg.Informers.Core().V1()
	c := endpointslicemirroring.NewController(ctx, core.Endpoints(), e.cfg.Informers.Discovery().V1().EndpointSlices(), core.Services(),
		maxMirrored, e.deps.Client, 0)
	return blocking(func(ctx context.Context) { c.Run(ctx, 5) }), nil
}
