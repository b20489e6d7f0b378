// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	noopoteltrace "go.opentelemetry.io/otel/trace/noop"
	apiextensionsapiserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/wait"
	tokenrequest "k8s.io/apiserver/pkg/authentication/request/bearertoken"
	authenticatorunion "k8s.io/apiserver/pkg/authentication/request/union"
	authorizerunion "k8s.io/apiserver/pkg/authorization/union"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/filters"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/util/openapi"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/controlplane"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	generatedopenapi "k8s.io/kubernetes/pkg/generated/openapi"
	"k8s.io/kubernetes/pkg/kubeapiserver"

	"skep.io/skep/controlplane/apiserver/metricsapi"
)

// generic is what the three servers of the chain share.
type generic struct {
	config    *genericapiserver.Config
	informers informers.SharedInformerFactory
	storage   *serverstorage.DefaultStorageFactory
	// encryption is nil if nothing is encrypted.
	encryption *atRest
}

// longRunning requests are neither timed nor counted against the limits.
var longRunningVerbs, longRunningSubresources = sets.NewString("watch", "proxy"),
	sets.NewString("attach", "exec", "proxy", "log", "portforward")

// buildGeneric is upstream's BuildGenericConfig with one change: the servers call themselves by
// loopback, which stays in the process, instead of by TLS with a certificate that expires.
func buildGeneric(ctx context.Context, o options.CompletedOptions, access *Access, loopback *rest.Config, ids *identities) (generic, error) {
	resources := controlplane.DefaultAPIResourceConfigSource()
	config := genericapiserver.NewConfig(legacyscheme.Codecs)
	config.MergedResourceConfig = resources
	g := generic{config: config}

	if err := o.GenericServerRunOptions.ApplyTo(config); err != nil {
		return g, err
	}
	config.EffectiveVersion = effectiveVersion{config.EffectiveVersion}
	if err := o.SecureServing.SecureServingOptions.ApplyTo(&config.SecureServing); err != nil {
		return g, err
	}
	config.LoopbackClientConfig = loopback
	client, err := kubernetes.NewForConfig(loopback)
	if err != nil {
		return g, fmt.Errorf("in-process client: %w", err)
	}
	g.informers = informers.NewSharedInformerFactoryWithOptions(client, 10*time.Minute, informers.WithTransform(dropManagedFields))

	if err := o.Features.ApplyTo(config, client, g.informers); err != nil {
		return g, err
	}
	if err := o.APIEnablement.ApplyTo(config, resources, legacyscheme.Scheme); err != nil {
		return g, err
	}
	definitions := openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(generatedopenapi.GetOpenAPIDefinitions)
	namer := openapinamer.NewDefinitionNamer(legacyscheme.Scheme, apiextensionsapiserver.Scheme, aggregatorscheme.Scheme, metricsapi.Scheme())
	config.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(definitions, namer)
	config.OpenAPIConfig.Info.Title = "Kubernetes"
	config.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(definitions, namer)
	config.OpenAPIV3Config.Info.Title = "Kubernetes"
	config.OpenAPIConfig.GetOperationIDAndTagsFromRoute = operationID
	config.OpenAPIV3Config.GetOperationIDAndTagsFromRoute = operationID
	config.LongRunningFunc = filters.BasicLongRunningRequestCheck(longRunningVerbs, longRunningSubresources)

	if access.EncryptionConfig != "" {
		if g.encryption, err = newAtRest(access.EncryptionConfig, config); err != nil {
			return g, err
		}
	}
	if err := o.Audit.ApplyTo(config); err != nil {
		return g, fmt.Errorf("audit: %w", err)
	}
	if err := g.applyStorage(o); err != nil {
		return g, err
	}
	if err := g.applyAccess(ctx, o, access, client, ids); err != nil {
		return g, err
	}
	config.AggregatedDiscoveryGroupManager = aggregated.NewResourceManager("apis")

	config.DisabledPostStartHooks.Insert(replacedHooks...)
	for _, name := range slices.Sorted(maps.Keys(bootstrapHooks)) {
		if err := config.AddPostStartHook(name, bootstrapHooks[name]); err != nil {
			return g, err
		}
	}
	return g, nil
}

func (g *generic) applyStorage(o options.CompletedOptions) error {
	o.Etcd.StorageConfig.Transport.TracerProvider = noopoteltrace.NewTracerProvider()
	f := kubeapiserver.NewStorageFactoryConfigEffectiveVersion(g.config.EffectiveVersion)
	f.APIResourceConfig = g.config.MergedResourceConfig
	f.DefaultResourceEncoding.SetEffectiveVersion(g.config.EffectiveVersion)
	var err error
	if g.storage, err = f.Complete(o.Etcd).New(); err != nil {
		return fmt.Errorf("storage: %w", err)
	}
	g.storage.StorageConfig.StorageObjectCountTracker = g.config.StorageObjectCountTracker
	if err := o.Etcd.ApplyWithStorageFactoryTo(g.storage, g.config); err != nil {
		return fmt.Errorf("storage: %w", err)
	}
	return nil
}

// applyAccess sets authentication (in-process identities, client certificates, service-account and
// bootstrap tokens, OIDC, front proxy, health without any) and authorization (Node, RBAC, ingress's Secrets).
func (g *generic) applyAccess(ctx context.Context, o options.CompletedOptions, access *Access, client kubernetes.Interface, ids *identities) error {
	c := g.config
	drained := wait.ContextForChannel(c.DrainedNotify())
	err := o.Authentication.ApplyTo(drained, &c.Authentication, c.SecureServing, nil,
		c.OpenAPIConfig, c.OpenAPIV3Config, client, g.informers, c.APIServerID)
	if err != nil {
		return fmt.Errorf("authentication: %w", err)
	}
	c.Authentication.Authenticator, err = access.orHealth(authenticatorunion.New(tokenrequest.New(ids), c.Authentication.Authenticator,
		newFreshTokens(client, c.Authentication.APIAudiences)))
	if err != nil {
		return err
	}

	c.Authorization.Authorizer, c.RuleResolver, _, err = controlplaneapiserver.BuildAuthorizer(drained, o.CompletedOptions, nil, c.APIServerID, g.informers)
	if err != nil {
		return fmt.Errorf("authorization: %w", err)
	}
	certificates, err := newIngressSecrets(client, g.informers)
	if err != nil {
		return fmt.Errorf("authorization of ingress: %w", err)
	}
	c.Authorization.Authorizer = authorizerunion.New(c.Authorization.Authorizer, certificates)
	return nil
}

// dropManagedFields keeps them out of the server's own caches, where nobody reads them.
func dropManagedFields(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil && m.GetManagedFields() != nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}
