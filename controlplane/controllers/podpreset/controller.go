// SPDX-License-Identifier: Apache-2.0

// Package podpreset defines PodPresets. They are applied where pods are admitted (controlplane/apiserver/podpreset).
package podpreset

import (
	"context"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	api "skep.io/skep/api/podpreset"
	"skep.io/skep/controlplane/controllers/runner"
)

// Controller makes the definition.
type Controller struct {
	runner.Deps
	bootstrap kubernetes.Interface
	client    dynamic.Interface // nil where there is no API server, as in some tests
}

// New makes it. bootstrap makes the definition; client reads PodPresets.
func New(deps runner.Deps, bootstrap kubernetes.Interface, client dynamic.Interface) (*Controller, error) {
	return &Controller{Deps: deps, bootstrap: bootstrap, client: client}, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	if c.client != nil {
		if err := runner.Define(ctx, c.bootstrap, api.DefinitionName, api.Definition, c.client.Resource(api.Resource), c.Log); err != nil && ctx.Err() == nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}
