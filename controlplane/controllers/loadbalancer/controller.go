// SPDX-License-Identifier: Apache-2.0

package loadbalancer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/api/v1alpha1"
	"skep.io/skep/controlplane/controllers/runner"
)

// everything is the queue's only key: addresses are given out over all Services at once.
const everything = "addresses"

// Controller gives addresses to Services and takes them back.
type Controller struct {
	runner.Deps
	queue     *runner.Queue
	recorder  record.EventRecorder
	reserved  map[int32]string
	bootstrap kubernetes.Interface
	pools     dynamic.Interface // nil where there is no API server, as in some tests

	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   discoverylisters.EndpointSliceLister
	synced   []cache.InformerSynced

	informer cache.SharedIndexInformer // of AddressPools, set by Run
	told     map[types.UID]string      // the last problem an event spoke of; only the one worker uses it
}

// New registers the controller with the shared informers. bootstrap makes the definition of AddressPools, and pools
// reads them. reserved are the nodes' ports
// that no Service gets at the nodes' addresses, with the name of whoever has them.
func New(deps runner.Deps, bootstrap kubernetes.Interface, pools dynamic.Interface, reserved map[int32]string) (*Controller, error) {
	core, discovery := deps.Informers.Core().V1(), deps.Informers.Discovery().V1()
	c := &Controller{
		Deps: deps, bootstrap: bootstrap, pools: pools, reserved: reserved, recorder: deps.Recorder("load-balancer-controller"),
		services: core.Services().Lister(), nodes: core.Nodes().Lister(), slices: discovery.EndpointSlices().Lister(),
		told: map[types.UID]string{},
	}
	c.queue = runner.New("loadbalancer", 1, deps, c.sync)
	services, err := runner.Watch(core.Services().Informer(), runner.Handlers[*corev1.Service]{
		Add: c.serviceChanged,
		Update: func(old, cur *corev1.Service) {
			c.serviceChanged(old)
			c.serviceChanged(cur)
		},
		Delete: c.serviceChanged,
	})
	if err != nil {
		return nil, err
	}
	nodes, err := runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{
		Add: func(*corev1.Node) { c.queue.Add(everything) },
		Update: func(old, cur *corev1.Node) {
			if ready(old) != ready(cur) || !apiequality.Semantic.DeepEqual(old.Labels, cur.Labels) ||
				!apiequality.Semantic.DeepEqual(old.Status.Addresses, cur.Status.Addresses) {
				c.queue.Add(everything)
			}
		},
		Delete: func(*corev1.Node) { c.queue.Add(everything) },
	})
	if err != nil {
		return nil, err
	}
	slices, err := runner.Watch(discovery.EndpointSlices().Informer(), runner.Handlers[*discoveryv1.EndpointSlice]{
		Add: c.sliceChanged, Update: func(_, cur *discoveryv1.EndpointSlice) { c.sliceChanged(cur) }, Delete: c.sliceChanged,
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{services, nodes, slices}
	return c, nil
}

func (c *Controller) serviceChanged(svc *corev1.Service) {
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer || len(svc.Status.LoadBalancer.Ingress) > 0 {
		c.queue.Add(everything)
	}
}

// sliceChanged matters to Services whose traffic stays on nodes that have their pods.
func (c *Controller) sliceChanged(s *discoveryv1.EndpointSlice) {
	svc, err := c.services.Services(s.Namespace).Get(s.Labels[discoveryv1.LabelServiceName])
	if err == nil && svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		c.queue.Add(everything)
	}
}

// Run works until ctx ends. It makes the AddressPool resource first.
func (c *Controller) Run(ctx context.Context) error {
	if c.pools == nil {
		return c.queue.Run(ctx, c.synced...)
	}
	if err := runner.Define(ctx, c.bootstrap, "addresspools.skep.io", v1alpha1.AddressPoolsCRD, c.pools.Resource(v1alpha1.AddressPools), c.Log); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	factory := dynamicinformer.NewDynamicSharedInformerFactory(c.pools, 0)
	informer := factory.ForResource(v1alpha1.AddressPools).Informer()
	synced, err := runner.Watch(informer, runner.Handlers[*unstructured.Unstructured]{
		Add: func(*unstructured.Unstructured) { c.queue.Add(everything) },
		Update: func(old, cur *unstructured.Unstructured) {
			if old.GetResourceVersion() != cur.GetResourceVersion() {
				c.queue.Add(everything)
			}
		},
		Delete: func(*unstructured.Unstructured) { c.queue.Add(everything) },
	})
	if err != nil {
		return err
	}
	c.informer = informer
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	return c.queue.Run(ctx, append(c.synced, synced)...)
}

func (c *Controller) sync(ctx context.Context, _ string) (time.Duration, error) {
	s := Snapshot{LocalTo: c.localTo, Reserved: c.reserved}
	var err error
	if s.Services, err = c.services.List(labels.Everything()); err != nil {
		return 0, err
	}
	if s.Nodes, err = c.nodes.List(labels.Everything()); err != nil {
		return 0, err
	}
	if c.informer != nil {
		for _, o := range c.informer.GetStore().List() {
			pool := &v1alpha1.AddressPool{}
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.(*unstructured.Unstructured).Object, pool); err != nil {
				return 0, fmt.Errorf("AddressPool %s: %w", o.(*unstructured.Unstructured).GetName(), err)
			}
			s.Pools = append(s.Pools, pool)
		}
	}
	var errs []error
	told := map[types.UID]string{}
	decisions := Plan(s)
	for _, change := range decisions.Services {
		errs = append(errs, c.act(ctx, change))
		if change.Problem != "" {
			told[change.Service.UID] = change.Problem
		}
	}
	c.told = told
	for _, change := range decisions.Pools {
		errs = append(errs, c.actOnPool(ctx, change))
	}
	return 0, errors.Join(errs...)
}

func (c *Controller) act(ctx context.Context, change Change) error {
	svc := change.Service
	if change.Problem != "" && c.told[svc.UID] != change.Problem {
		c.recorder.Event(svc, corev1.EventTypeWarning, change.Reason, change.Problem)
	}
	if !change.Write {
		return nil
	}
	written := svc.DeepCopy()
	written.Status = change.Status
	_, err := c.Client.CoreV1().Services(svc.Namespace).UpdateStatus(ctx, written, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("status of service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	if in := change.Status.LoadBalancer.Ingress; len(in) > 0 && !apiequality.Semantic.DeepEqual(in, svc.Status.LoadBalancer.Ingress) {
		var text string
		for i, a := range in {
			if i > 0 {
				text += ", "
			}
			text += a.IP
		}
		c.recorder.Event(svc, corev1.EventTypeNormal, assigned, text)
	}
	return nil
}

func (c *Controller) actOnPool(ctx context.Context, change PoolChange) error {
	if !change.Write {
		return nil
	}
	pool := change.Pool
	status := map[string]any{ // null where the pool has no address of a family any more
		"addresses": change.Status.Addresses, "ipv4": change.Status.IPv4, "ipv6": change.Status.IPv6, "conditions": change.Status.Conditions,
	}
	patch, err := json.Marshal(map[string]any{"status": status, "metadata": map[string]any{"resourceVersion": pool.ResourceVersion}})
	if err != nil {
		return err
	}
	_, err = c.pools.Resource(v1alpha1.AddressPools).Patch(ctx, pool.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "skep"}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("status of AddressPool %s: %w", pool.Name, err)
	}
	reference := &corev1.ObjectReference{Kind: "AddressPool", APIVersion: v1alpha1.AddressPools.GroupVersion().String(), Name: pool.Name, UID: pool.UID}
	for _, e := range change.Events {
		c.recorder.Event(reference, corev1.EventTypeWarning, e.Reason, e.Message)
	}
	return nil
}

func (c *Controller) localTo(svc *corev1.Service) map[string]bool {
	out := map[string]bool{}
	all, err := c.slices.EndpointSlices(svc.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: svc.Name}))
	if err != nil {
		return out
	}
	for _, s := range all {
		for i := range s.Endpoints {
			if e := &s.Endpoints[i]; e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				out[*e.NodeName] = true
			}
		}
	}
	return out
}
