// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"time"

	"k8s.io/kubernetes/pkg/controller/podautoscaler"
	"k8s.io/kubernetes/pkg/controller/podautoscaler/metrics"
	resourceclient "k8s.io/metrics/pkg/client/clientset/versioned/typed/metrics/v1beta1"
	"k8s.io/metrics/pkg/client/custom_metrics"
	"k8s.io/metrics/pkg/client/external_metrics"
)

// Upstream's defaults of kube-controller-manager's --horizontal-pod-autoscaler-* flags. Metrics have no events: a
// HorizontalPodAutoscaler is looked at once a period, and nothing is while there is none.
const (
	autoscalerPeriod            = 15 * time.Second
	autoscalerDownscaleWindow   = 5 * time.Minute
	autoscalerTolerance         = 0.1
	autoscalerCPUInitialization = 5 * time.Minute
	autoscalerInitialReadiness  = 30 * time.Second
)

// makeAutoscaling makes the controller of HorizontalPodAutoscalers. Pods' use comes from metrics.k8s.io, which the
// API server serves; custom and external metrics from whoever registers their APIs.
func makeAutoscaling(ctx context.Context, e env) (run, error) {
	scales, err := scaleClient(e)
	if err != nil {
		return nil, err
	}
	resources, err := resourceclient.NewForConfig(e.rest)
	if err != nil {
		return nil, fmt.Errorf("client of pods' metrics: %w", err)
	}
	external, err := external_metrics.NewForConfig(e.rest)
	if err != nil {
		return nil, fmt.Errorf("client of external metrics: %w", err)
	}
	versions := custom_metrics.NewAvailableAPIsGetter(e.deps.Client.Discovery())
	c := podautoscaler.NewHorizontalController(ctx, e.deps.Client.CoreV1(), scales, e.deps.Client.AutoscalingV2(), e.kinds.mapper,
		metrics.NewRESTMetricsClient(resources, custom_metrics.NewForConfig(e.rest, e.kinds.mapper, versions), external),
		e.cfg.Informers.Autoscaling().V2().HorizontalPodAutoscalers(), e.cfg.Informers.Core().V1().Pods(),
		autoscalerPeriod, autoscalerDownscaleWindow, autoscalerTolerance, autoscalerCPUInitialization, autoscalerInitialReadiness)
	return blocking(func(ctx context.Context) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			custom_metrics.PeriodicallyInvalidate(versions, autoscalerPeriod, ctx.Done())
		}()
		c.Run(ctx, 5)
		<-done
	}), nil
}
