// SPDX-License-Identifier: Apache-2.0

package nodeipam

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/controlplane/controllers/runner"
)

// Controller writes spec.podCIDR and spec.podCIDRs of nodes that have none.
type Controller struct {
	runner.Deps
	queue    *runner.Queue
	recorder record.EventRecorder
	nodes    corelisters.NodeLister
	synced   []cache.InformerSynced

	mu        sync.Mutex
	allocator *Allocator
	learned   bool // what nodes had at the start is in the allocator
}

// New registers the controller with the shared informers.
func New(deps runner.Deps, clusters []netip.Prefix, maskIPv4, maskIPv6 int) (*Controller, error) {
	allocator, err := NewAllocator(clusters, maskIPv4, maskIPv6)
	if err != nil {
		return nil, err
	}
	nodes := deps.Informers.Core().V1().Nodes()
	c := &Controller{Deps: deps, allocator: allocator, nodes: nodes.Lister(), recorder: deps.Recorder("cidrAllocator")}
	c.queue = runner.New("nodeipam", 1, deps, c.sync)
	synced, err := runner.Watch(nodes.Informer(), runner.Handlers[*corev1.Node]{
		Add: func(node *corev1.Node) { c.queue.Add(node.Name) },
		Update: func(old, cur *corev1.Node) {
			if len(cur.Spec.PodCIDRs) == 0 || old.UID != cur.UID {
				c.queue.Add(cur.Name)
			}
		},
		Delete: func(node *corev1.Node) { c.queue.Add(node.Name) },
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{synced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) sync(ctx context.Context, name string) (time.Duration, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.learn(); err != nil {
		return 0, err
	}
	node, err := c.nodes.Get(name)
	if apierrors.IsNotFound(err) {
		c.allocator.Release(name)
		c.enqueueWaiting()
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read node %s: %w", name, err)
	}
	if len(node.Spec.PodCIDRs) > 0 {
		c.occupy(node)
		return 0, nil
	}
	ranges, err := c.allocator.Allocate(name)
	if err != nil {
		c.recorder.Eventf(&corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: node.Name, UID: node.UID}, corev1.EventTypeNormal,
			"CIDRNotAvailable", "Node %s status is now: CIDRNotAvailable", node.Name)
		return 0, fmt.Errorf("pod ranges of node %s: %w", name, err)
	}
	if err := c.write(ctx, node, ranges); err != nil {
		if apierrors.IsNotFound(err) {
			c.allocator.Release(name)
			return 0, nil
		}
		if apierrors.IsInvalid(err) {
			// Somebody gave the node other ranges, which may not change any more; its event brings them.
			c.allocator.Release(name)
		}
		return 0, err
	}
	return 0, nil
}

// learn notes what all nodes have before anything is handed out.
func (c *Controller) learn() error {
	if c.learned {
		return nil
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	for _, node := range nodes {
		c.occupy(node)
	}
	c.learned = true
	return nil
}

func (c *Controller) occupy(node *corev1.Node) {
	if !c.allocator.Occupy(node.Name, parse(node.Spec.PodCIDRs)) {
		c.Log.Error("node has a pod range that overlaps another node's: delete one of them and let it register anew",
			"node", node.Name, "podCIDRs", node.Spec.PodCIDRs)
	}
}

// enqueueWaiting gives nodes without ranges another try once some are free.
func (c *Controller) enqueueWaiting() {
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		c.Log.Error("list nodes", "err", err)
		return
	}
	for _, node := range nodes {
		if len(node.Spec.PodCIDRs) == 0 {
			c.queue.Add(node.Name)
		}
	}
}

func (c *Controller) write(ctx context.Context, node *corev1.Node, ranges []netip.Prefix) error {
	podCIDRs := make([]string, len(ranges))
	for i, r := range ranges {
		podCIDRs[i] = r.String()
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": node.UID}, // not the next node of the same name
		"spec":     map[string]any{"podCIDR": podCIDRs[0], "podCIDRs": podCIDRs},
	})
	if err != nil {
		return fmt.Errorf("encode pod ranges of node %s: %w", node.Name, err)
	}
	if _, err := c.Client.CoreV1().Nodes().Patch(ctx, node.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("write pod ranges of node %s: %w", node.Name, err)
	}
	c.Log.Info("node got its pod ranges", "node", node.Name, "podCIDRs", podCIDRs)
	return nil
}

func parse(podCIDRs []string) []netip.Prefix {
	var ranges []netip.Prefix
	for _, s := range podCIDRs {
		if r, err := netip.ParsePrefix(s); err == nil {
			ranges = append(ranges, r)
		}
	}
	return ranges
}
