// SPDX-License-Identifier: Apache-2.0

package endpointslice

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	endpointsliceutil "k8s.io/endpointslice/util"

	"skep.io/skep/controlplane/controllers/runner"
)

const (
	workers = 5
	// selectorIndex finds the Services whose selector may match a pod, by one of the selector's pairs.
	selectorIndex = "skep.io/selector-pair"
	// sliceIndex finds a Service's slices.
	sliceIndex = "skep.io/slice-service"
)

// Controller keeps Services' EndpointSlices true. A pod's change is written at once, not batched.
type Controller struct {
	runner.Deps
	queue    *runner.Queue
	recorder record.EventRecorder
	services corelisters.ServiceLister
	bySelect cache.Indexer
	pods     corelisters.PodLister
	nodes    corelisters.NodeLister
	slices   cache.Indexer
	tracker  *endpointsliceutil.EndpointSliceTracker
	triggers *endpointsliceutil.TriggerTimeTracker
	synced   []cache.InformerSynced

	mu sync.Mutex
	// waiting are Services with pods on nodes that are not known yet, by node.
	waiting map[string]map[string]struct{}
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	core := deps.Informers.Core().V1()
	endpointSlices := deps.Informers.Discovery().V1().EndpointSlices()
	c := &Controller{
		Deps:     deps,
		recorder: deps.Recorder("endpoint-slice-controller"),
		services: core.Services().Lister(),
		bySelect: core.Services().Informer().GetIndexer(),
		pods:     core.Pods().Lister(),
		nodes:    core.Nodes().Lister(),
		slices:   endpointSlices.Informer().GetIndexer(),
		tracker:  endpointsliceutil.NewEndpointSliceTracker(),
		triggers: endpointsliceutil.NewTriggerTimeTracker(),
		waiting:  map[string]map[string]struct{}{},
	}
	c.queue = runner.New("endpointslice", workers, deps, c.sync)
	if err := core.Services().Informer().AddIndexers(cache.Indexers{selectorIndex: indexSelector}); err != nil {
		return nil, fmt.Errorf("index services by selector: %w", err)
	}
	if err := endpointSlices.Informer().AddIndexers(cache.Indexers{sliceIndex: indexSlice}); err != nil {
		return nil, fmt.Errorf("index endpoint slices by service: %w", err)
	}

	servicesSynced, err := runner.Watch(core.Services().Informer(), runner.Handlers[*corev1.Service]{
		Add:    func(s *corev1.Service) { c.queue.Add(runner.Key(s)) },
		Update: func(_, s *corev1.Service) { c.queue.Add(runner.Key(s)) },
		Delete: func(s *corev1.Service) { c.queue.Add(runner.Key(s)) },
	})
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(core.Pods().Informer(), runner.Handlers[*corev1.Pod]{
		Add:    func(pod *corev1.Pod) { c.podChanged(nil, pod) },
		Update: c.podChanged,
		Delete: func(pod *corev1.Pod) { c.podChanged(pod, nil) },
	})
	if err != nil {
		return nil, err
	}
	nodesSynced, err := runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{Add: c.nodeAdded})
	if err != nil {
		return nil, err
	}
	slicesSynced, err := runner.Watch(endpointSlices.Informer(), runner.Handlers[*discoveryv1.EndpointSlice]{
		Add:    c.sliceChanged,
		Update: c.sliceUpdated,
		Delete: c.sliceDeleted,
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{servicesSynced, podsSynced, nodesSynced, slicesSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

// indexSelector files a Service under the first pair of its selector: a pod that matches has that pair too,
// so looking up a pod's pairs finds every Service that may match, whatever the number of Services.
func indexSelector(obj any) ([]string, error) {
	service, ok := obj.(*corev1.Service)
	if !ok || service.Spec.Selector == nil {
		return nil, nil
	}
	first := ""
	for k, v := range service.Spec.Selector {
		if pair := pairKey(service.Namespace, k, v); first == "" || pair < first {
			first = pair
		}
	}
	if first == "" { // an empty, not absent, selector matches every pod
		first = pairKey(service.Namespace, "", "")
	}
	return []string{first}, nil
}

func pairKey(namespace, key, value string) string { return namespace + "/" + key + "=" + value }

func indexSlice(obj any) ([]string, error) {
	slice, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok || slice.Labels[discoveryv1.LabelManagedBy] != ManagedBy {
		return nil, nil
	}
	return []string{slice.Namespace + "/" + slice.Labels[discoveryv1.LabelServiceName]}, nil
}

func (c *Controller) podChanged(old, cur *corev1.Pod) {
	var change *endpointsliceutil.PodProjectionKey
	switch {
	case old == nil:
		change = endpointsliceutil.GetPodUpdateProjectionKey(nil, cur)
	case cur == nil:
		change = endpointsliceutil.GetPodUpdateProjectionKey(old, nil)
	default:
		change = endpointsliceutil.GetPodUpdateProjectionKey(old, cur)
	}
	if change == nil {
		return // nothing that an endpoint shows
	}
	c.enqueueSelecting(change.Namespace, change.Labels)
	if change.OldLabels != nil {
		c.enqueueSelecting(change.Namespace, change.OldLabels)
	}
}

func (c *Controller) enqueueSelecting(namespace string, pod labels.Set) {
	c.enqueuePair(namespace, "", "", pod)
	for k, v := range pod {
		c.enqueuePair(namespace, k, v, pod)
	}
}

func (c *Controller) enqueuePair(namespace, key, value string, pod labels.Set) {
	candidates, err := c.bySelect.ByIndex(selectorIndex, pairKey(namespace, key, value))
	if err != nil {
		return // only an index of another name is an error
	}
	for _, obj := range candidates {
		if service, ok := obj.(*corev1.Service); ok && labels.ValidatedSetSelector(service.Spec.Selector).Matches(pod) {
			c.queue.Add(runner.Key(service))
		}
	}
}

func (c *Controller) nodeAdded(node *corev1.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.waiting[node.Name] {
		c.queue.Add(key)
	}
	delete(c.waiting, node.Name)
}

func isManaged(slice *discoveryv1.EndpointSlice) bool {
	return slice.Labels[discoveryv1.LabelManagedBy] == ManagedBy
}

func (c *Controller) enqueueService(slice *discoveryv1.EndpointSlice) {
	if name := slice.Labels[discoveryv1.LabelServiceName]; name != "" {
		c.queue.Add(slice.Namespace + "/" + name)
	}
}

// sliceChanged ignores what this controller wrote itself.
func (c *Controller) sliceChanged(slice *discoveryv1.EndpointSlice) {
	if isManaged(slice) && c.tracker.ShouldSync(slice) {
		c.enqueueService(slice)
	}
}

func (c *Controller) sliceUpdated(old, cur *discoveryv1.EndpointSlice) {
	if old.Labels[discoveryv1.LabelServiceName] != cur.Labels[discoveryv1.LabelServiceName] || isManaged(old) != isManaged(cur) {
		c.enqueueService(old)
		c.enqueueService(cur)
		return
	}
	c.sliceChanged(cur)
}

func (c *Controller) sliceDeleted(slice *discoveryv1.EndpointSlice) {
	if expected := c.tracker.Has(slice) && c.tracker.HandleDeletion(slice); isManaged(slice) && !expected {
		c.enqueueService(slice) // somebody else deleted it
	}
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return 0, fmt.Errorf("queue key %q: %w", key, err)
	}
	service, err := c.services.Services(namespace).Get(name)
	if apierrors.IsNotFound(err) {
		// Its slices go with it: they name it as their owner.
		c.triggers.DeleteService(namespace, name)
		c.tracker.DeleteService(namespace, name)
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read service %s: %w", key, err)
	}
	if service.Spec.Selector == nil || service.Spec.Type == corev1.ServiceTypeExternalName {
		return 0, nil // somebody else says where such a Service ends
	}

	s, err := c.snapshot(service)
	if err != nil {
		return 0, err
	}
	if c.tracker.StaleSlices(service, s.Slices) {
		return 0, fmt.Errorf("endpoint slices of service %s: %w", key, runner.ErrStaleCache)
	}
	s.Triggered = c.triggers.ComputeEndpointLastChangeTriggerTime(namespace, service, s.Pods)
	plan := Compute(s)
	c.await(key, plan.MissingNodes)
	if err := c.apply(ctx, service, plan); err != nil {
		if !apierrors.IsConflict(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			c.recorder.Eventf(service, corev1.EventTypeWarning, "FailedToUpdateEndpointSlices",
				"Error updating Endpoint Slices for Service %s/%s: %v", namespace, name, err)
		}
		return 0, err
	}
	return 0, nil
}

func (c *Controller) snapshot(service *corev1.Service) (Snapshot, error) {
	s := Snapshot{Service: service, Node: func(name string) *corev1.Node {
		node, err := c.nodes.Get(name)
		if err != nil {
			return nil
		}
		return node
	}}
	var err error
	if s.Pods, err = c.pods.Pods(service.Namespace).List(labels.ValidatedSetSelector(service.Spec.Selector)); err != nil {
		return s, fmt.Errorf("list pods of service %s/%s: %w", service.Namespace, service.Name, err)
	}
	found, err := c.slices.ByIndex(sliceIndex, runner.Key(service))
	if err != nil {
		return s, fmt.Errorf("list endpoint slices of service %s/%s: %w", service.Namespace, service.Name, err)
	}
	for _, obj := range found {
		if slice, ok := obj.(*discoveryv1.EndpointSlice); ok && slice.DeletionTimestamp == nil {
			s.Slices = append(s.Slices, slice)
		}
	}
	return s, nil
}

// await remembers which nodes a Service waits for.
func (c *Controller) await(key string, nodes []string) {
	if len(nodes) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range nodes {
		if _, err := c.nodes.Get(name); err == nil {
			c.queue.Add(key) // it came in between
			continue
		}
		if c.waiting[name] == nil {
			c.waiting[name] = map[string]struct{}{}
		}
		c.waiting[name][key] = struct{}{}
	}
}

// apply writes a plan: new addresses before old ones go.
func (c *Controller) apply(ctx context.Context, service *corev1.Service, plan Plan) error {
	client := c.Client.DiscoveryV1().EndpointSlices(service.Namespace)
	var errs []error
	for _, slice := range plan.Create {
		created, err := client.Create(ctx, slice, metav1.CreateOptions{})
		if err != nil {
			errs = append(errs, fmt.Errorf("create endpoint slice for service %s/%s: %w", service.Namespace, service.Name, err))
			continue
		}
		c.tracker.Update(created)
	}
	for _, slice := range plan.Update {
		updated, err := client.Update(ctx, slice, metav1.UpdateOptions{})
		if err != nil {
			errs = append(errs, fmt.Errorf("update endpoint slice %s/%s: %w", slice.Namespace, slice.Name, err))
			continue
		}
		c.tracker.Update(updated)
	}
	for _, slice := range plan.Delete {
		err := client.Delete(ctx, slice.Name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete endpoint slice %s/%s: %w", slice.Namespace, slice.Name, err))
			continue
		}
		c.tracker.ExpectDeletion(slice)
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}
