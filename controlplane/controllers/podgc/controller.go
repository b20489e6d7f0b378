// SPDX-License-Identifier: Apache-2.0

package podgc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/controller"

	"skep.io/skep/controlplane/controllers/runner"
)

// Quarantine is how long a node may be unknown before its pods are orphans.
const Quarantine = 40 * time.Second

// Keys of the queue: "pod/NAMESPACE/NAME", "node/NAME", or endedKey for the count of ended pods.
const (
	podPrefix  = "pod/"
	nodePrefix = "node/"
	endedKey   = "ended"

	endedIndex = "skep.io/ended"
)

// Controller deletes what nobody else deletes.
type Controller struct {
	runner.Deps
	queue      *runner.Queue
	threshold  int
	quarantine time.Duration
	pods       corelisters.PodLister
	podIndex   cache.Indexer
	nodes      corelisters.NodeLister
	synced     []cache.InformerSynced

	mu sync.Mutex
	// missing is since when a node that pods name has been unknown.
	missing map[string]time.Time
}

// New registers the controller with the shared informers.
func New(deps runner.Deps, threshold int, quarantine time.Duration) (*Controller, error) {
	core := deps.Informers.Core().V1()
	c := &Controller{
		Deps: deps, threshold: threshold, quarantine: quarantine,
		pods: core.Pods().Lister(), podIndex: core.Pods().Informer().GetIndexer(), nodes: core.Nodes().Lister(),
		missing: map[string]time.Time{},
	}
	c.queue = runner.New("podgc", 2, deps, c.sync)
	if err := controller.AddPodNodeNameIndexer(core.Pods().Informer()); err != nil {
		return nil, fmt.Errorf("index pods by node: %w", err)
	}
	if err := core.Pods().Informer().AddIndexers(cache.Indexers{endedIndex: func(obj any) ([]string, error) {
		if pod, ok := obj.(*corev1.Pod); ok && IsEnded(pod) {
			return []string{endedKey}, nil
		}
		return nil, nil
	}}); err != nil {
		return nil, fmt.Errorf("index ended pods: %w", err)
	}
	podsSynced, err := runner.Watch(core.Pods().Informer(), runner.Handlers[*corev1.Pod]{
		Add:    func(pod *corev1.Pod) { c.podChanged(nil, pod) },
		Update: c.podChanged,
	})
	if err != nil {
		return nil, err
	}
	nodesSynced, err := runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{
		Add: c.nodeKnown,
		Update: func(_, node *corev1.Node) {
			if isOutOfService(node) {
				c.queue.Add(nodePrefix + node.Name)
			}
		},
		Delete: func(node *corev1.Node) { c.nodeMissing(node.Name) },
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{podsSynced, nodesSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) podChanged(old, pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil {
		c.queue.Add(podPrefix + runner.Key(pod))
	}
	if IsEnded(pod) && (old == nil || !IsEnded(old)) {
		c.queue.Add(endedKey)
	}
	if pod.Spec.NodeName != "" && (old == nil || old.Spec.NodeName == "") {
		if _, err := c.nodes.Get(pod.Spec.NodeName); err != nil {
			c.nodeMissing(pod.Spec.NodeName)
		}
	}
}

func (c *Controller) nodeMissing(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.missing[name]; !known {
		c.missing[name] = c.Clock.Now()
	}
	c.queue.AddAfter(nodePrefix+name, c.quarantine)
}

func (c *Controller) nodeKnown(node *corev1.Node) {
	c.mu.Lock()
	delete(c.missing, node.Name)
	c.mu.Unlock()
	if isOutOfService(node) {
		c.queue.Add(nodePrefix + node.Name)
	}
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	if key == endedKey {
		return 0, c.syncEnded(ctx)
	}
	if name, ok := strings.CutPrefix(key, nodePrefix); ok {
		return c.syncNode(ctx, name)
	}
	namespace, name, err := cache.SplitMetaNamespaceKey(strings.TrimPrefix(key, podPrefix))
	if err != nil {
		return 0, fmt.Errorf("queue key %q: %w", key, err)
	}
	pod, err := c.pods.Pods(namespace).Get(name)
	if apierrors.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read pod %s/%s: %w", namespace, name, err)
	}
	node, err := c.nodes.Get(pod.Spec.NodeName)
	if err != nil {
		node = nil
	}
	return 0, c.collect(ctx, pod, Judge(pod, node, false))
}

func (c *Controller) syncEnded(ctx context.Context) error {
	found, err := c.podIndex.ByIndex(endedIndex, endedKey)
	if err != nil {
		return fmt.Errorf("list ended pods: %w", err)
	}
	if len(found) <= c.threshold {
		return nil
	}
	var errs []error
	for _, pod := range Surplus(podsOf(found), c.threshold) {
		errs = append(errs, c.delete(ctx, pod))
	}
	return errors.Join(errs...)
}

// syncNode looks after the pods of a node that is gone or out of service.
func (c *Controller) syncNode(ctx context.Context, name string) (time.Duration, error) {
	node, err := c.nodes.Get(name)
	gone := false
	if err != nil {
		c.mu.Lock()
		since, known := c.missing[name]
		c.mu.Unlock()
		if !known {
			return 0, nil
		}
		if left := c.quarantine - c.Clock.Since(since); left > 0 {
			return left, nil
		}
		if gone, err = c.isGone(ctx, name); err != nil {
			return 0, err
		}
		node = nil
	}
	found, err := c.podIndex.ByIndex(controller.PodNodeNameKeyIndex, name)
	if err != nil {
		return 0, fmt.Errorf("list pods of node %s: %w", name, err)
	}
	var errs []error
	for _, pod := range podsOf(found) {
		errs = append(errs, c.collect(ctx, pod, Judge(pod, node, gone)))
	}
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	c.mu.Lock()
	delete(c.missing, name)
	c.mu.Unlock()
	return 0, nil
}

// isGone asks the API server itself: pods must not die of a late cache.
func (c *Controller) isGone(ctx context.Context, name string) (bool, error) {
	_, err := c.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read node %s: %w", name, err)
	}
	return false, nil
}

// collect marks a pod Failed, so that nobody waits for it, and deletes it without grace.
func (c *Controller) collect(ctx context.Context, pod *corev1.Pod, reason Reason) error {
	if reason == None {
		return nil
	}
	c.Log.Info("deleting pod", "pod", runner.Key(pod), "node", pod.Spec.NodeName, "reason", reason)
	if status := Failed(pod, reason); status != nil {
		if err := c.patchStatus(ctx, pod, *status); err != nil {
			if apierrors.IsNotFound(err) {
				return nil
			}
			return err
		}
	}
	return c.delete(ctx, pod)
}

func (c *Controller) patchStatus(ctx context.Context, pod *corev1.Pod, status corev1.PodStatus) error {
	type object struct {
		Metadata map[string]any   `json:"metadata"`
		Status   corev1.PodStatus `json:"status"`
	}
	for i := range status.Conditions {
		if status.Conditions[i].LastTransitionTime.IsZero() {
			status.Conditions[i].LastTransitionTime = metav1.NewTime(c.Clock.Now())
		}
	}
	old, err := json.Marshal(object{Status: pod.Status})
	if err != nil {
		return fmt.Errorf("encode status of pod %s: %w", runner.Key(pod), err)
	}
	cur, err := json.Marshal(object{Metadata: map[string]any{"uid": pod.UID}, Status: status})
	if err != nil {
		return fmt.Errorf("encode status of pod %s: %w", runner.Key(pod), err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(old, cur, corev1.Pod{})
	if err != nil {
		return fmt.Errorf("compare status of pod %s: %w", runner.Key(pod), err)
	}
	if _, err := c.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("patch status of pod %s: %w", runner.Key(pod), err)
	}
	return nil
}

func (c *Controller) delete(ctx context.Context, pod *corev1.Pod) error {
	options := metav1.NewDeleteOptions(0)
	options.Preconditions = metav1.NewUIDPreconditions(string(pod.UID))
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *options)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s: %w", runner.Key(pod), err)
	}
	return nil
}

func podsOf(objs []any) []*corev1.Pod {
	pods := make([]*corev1.Pod, 0, len(objs))
	for _, obj := range objs {
		if pod, ok := obj.(*corev1.Pod); ok {
			pods = append(pods, pod)
		}
	}
	return pods
}
