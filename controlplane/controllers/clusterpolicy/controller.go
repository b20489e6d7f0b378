// SPDX-License-Identifier: Apache-2.0

// Package clusterpolicy defines ClusterNetworkPolicies, and says in their status which of their rules cannot be
// honoured. Nodes enforce them (dataplane/policy).
package clusterpolicy

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	api "skep.io/skep/api/clusterpolicy"
	"skep.io/skep/controlplane/controllers/runner"
)

// Controller writes conditions.
type Controller struct {
	runner.Deps
	queue     *runner.Queue
	recorder  record.EventRecorder
	bootstrap kubernetes.Interface
	client    dynamic.Interface // nil where there is no API server, as in some tests
	informer  cache.SharedIndexInformer
}

// New makes it. bootstrap makes the definition; client reads the policies and writes their status.
func New(deps runner.Deps, bootstrap kubernetes.Interface, client dynamic.Interface) (*Controller, error) {
	c := &Controller{Deps: deps, bootstrap: bootstrap, client: client, recorder: deps.Recorder("cluster-policy-controller")}
	c.queue = runner.New("clusterpolicy", 1, deps, c.sync)
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	if c.client == nil {
		return c.queue.Run(ctx)
	}
	if err := runner.Define(ctx, c.bootstrap, api.DefinitionName, api.Definition, c.client.Resource(api.Resource), c.Log); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	factory := dynamicinformer.NewDynamicSharedInformerFactory(c.client, 0)
	c.informer = factory.ForResource(api.Resource).Informer()
	synced, err := runner.Watch(c.informer, runner.Handlers[*unstructured.Unstructured]{
		Add: func(o *unstructured.Unstructured) { c.queue.Add(o.GetName()) },
		Update: func(old, cur *unstructured.Unstructured) {
			if old.GetResourceVersion() != cur.GetResourceVersion() {
				c.queue.Add(cur.GetName())
			}
		},
	})
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	return c.queue.Run(ctx, synced)
}

func (c *Controller) sync(ctx context.Context, name string) (time.Duration, error) {
	o, found, err := c.informer.GetStore().GetByKey(name)
	if err != nil || !found {
		return 0, err
	}
	p := &v1beta1.ClusterNetworkPolicy{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.(*unstructured.Unstructured).Object, p); err != nil {
		return 0, fmt.Errorf("ClusterNetworkPolicy %s: %w", name, err)
	}
	conditions, changed := Plan(p)
	if !changed {
		return 0, nil
	}
	if text := problem(conditions); text != "" {
		c.recorder.Event(p, corev1.EventTypeWarning, notHonoured, text)
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": conditions}, "metadata": map[string]any{"resourceVersion": p.ResourceVersion}})
	if err != nil {
		return 0, err
	}
	_, err = c.client.Resource(api.Resource).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "skep"}, "status")
	if err != nil && !apierrors.IsNotFound(err) {
		return 0, fmt.Errorf("status of ClusterNetworkPolicy %s: %w", name, err)
	}
	return 0, nil
}

// Reasons of the condition.
const (
	honoured    = "Honoured"
	notHonoured = "NotHonoured"
)

// Plan gives the conditions that a policy should have, and whether they are others than it has.
func Plan(p *v1beta1.ClusterNetworkPolicy) (conditions []metav1.Condition, changed bool) {
	want := metav1.Condition{
		Type: api.Condition, Status: metav1.ConditionTrue, Reason: honoured, ObservedGeneration: p.Generation,
		Message: "every rule is honoured as it is",
	}
	if problems := api.Problems(p); len(problems) > 0 {
		var texts []string
		for _, err := range problems {
			texts = append(texts, err.Error())
		}
		want.Status, want.Reason, want.Message = metav1.ConditionFalse, notHonoured, strings.Join(texts, "; ")
	}
	for _, c := range p.Status.Conditions {
		conditions = append(conditions, *c.DeepCopy())
	}
	return conditions, meta.SetStatusCondition(&conditions, want)
}

func problem(conditions []metav1.Condition) string {
	if c := meta.FindStatusCondition(conditions, api.Condition); c != nil && c.Status == metav1.ConditionFalse {
		return c.Message
	}
	return ""
}
