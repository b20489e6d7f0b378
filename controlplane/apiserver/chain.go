// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"log/slog"

	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/util/webhook"
	aggregatorapiserver "k8s.io/kube-aggregator/pkg/apiserver"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
)

// buildChain makes the three servers. A request passes the aggregator, then the built-in groups,
// then custom resources, then not-found; the first that knows the path answers.
func buildChain(o options.CompletedOptions, g generic, log *slog.Logger) (*aggregatorapiserver.APIAggregator, error) {
	kube, resolver, admission, err := app.CreateKubeAPIServerConfig(o, g.config, g.informers, g.storage)
	if err != nil {
		return nil, fmt.Errorf("built-in groups: %w", err)
	}
	cp := &kube.ControlPlane
	config := &app.Config{Options: o, KubeAPIs: kube}

	config.ApiExtensions, err = controlplaneapiserver.CreateAPIExtensionsConfig(*cp.Generic, cp.VersionedInformers, admission, o.CompletedOptions, o.MasterCount,
		resolver, webhook.NewDefaultAuthenticationInfoResolverWrapper(cp.ProxyTransport, cp.Generic.EgressSelector, cp.Generic.LoopbackClientConfig, cp.Generic.TracerProvider))
	if err != nil {
		return nil, fmt.Errorf("custom resources: %w", err)
	}
	config.Aggregator, err = controlplaneapiserver.CreateAggregatorConfig(*cp.Generic, o.CompletedOptions, cp.VersionedInformers, resolver, cp.ProxyTransport, cp.PeerProxy, admission)
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	// The copies above keep upstream's OpenAPI; the built-in groups get one that is made on demand.
	openAPI, openAPIv3 := cp.Generic.OpenAPIConfig, cp.Generic.OpenAPIV3Config
	cp.Generic.SkipOpenAPIInstallation = true
	completed, err := config.Complete()
	if err != nil {
		return nil, err
	}
	aggregator, err := app.CreateServerChain(completed)
	if err != nil {
		return nil, err
	}
	builtin, ok := aggregator.GenericAPIServer.NextDelegate().(*genericapiserver.GenericAPIServer)
	if !ok {
		return nil, fmt.Errorf("built-in groups are served by %T", aggregator.GenericAPIServer.NextDelegate())
	}
	if err := installMetrics(builtin, aggregator.GenericAPIServer, log); err != nil {
		return nil, err
	}
	services, mux := builtin.Handler.GoRestfulContainer.RegisteredWebServices(), builtin.Handler.NonGoRestfulMux
	installOpenAPIV2(services, openAPI, mux)
	if err := installOpenAPIV3(services, openAPIv3, mux); err != nil {
		return nil, fmt.Errorf("OpenAPI v3: %w", err)
	}
	return aggregator, nil
}
