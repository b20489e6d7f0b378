// SPDX-License-Identifier: Apache-2.0

package nodelifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	coordinationlisters "k8s.io/client-go/listers/coordination/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller"

	"skep.io/skep/controlplane/controllers/runner"
)

const workers = 8

// Controller keeps nodes' conditions and taints true.
type Controller struct {
	runner.Deps
	timing   Timing
	queue    *runner.Queue
	recorder record.EventRecorder
	nodes    corelisters.NodeLister
	leases   coordinationlisters.LeaseLister
	pods     cache.Indexer
	synced   []cache.InformerSynced

	mu     sync.Mutex
	health map[string]Health
	zones  *zones
}

// New registers the controller with the shared informers.
func New(deps runner.Deps, timing Timing) (*Controller, error) {
	core, leases := deps.Informers.Core().V1(), deps.Informers.Coordination().V1().Leases()
	c := &Controller{
		Deps:     deps,
		timing:   timing,
		recorder: deps.Recorder("node-controller"),
		nodes:    core.Nodes().Lister(),
		leases:   leases.Lister(),
		pods:     core.Pods().Informer().GetIndexer(),
		health:   map[string]Health{},
		zones:    newZones(),
	}
	c.queue = runner.New("nodelifecycle", workers, deps, c.sync)
	if err := controller.AddPodNodeNameIndexer(core.Pods().Informer()); err != nil {
		return nil, fmt.Errorf("index pods by node: %w", err)
	}
	nodesSynced, err := runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{
		Add: func(node *corev1.Node) {
			c.event(node, "RegisteredNode", fmt.Sprintf("Node %s event: Registered Node %s in Controller", node.Name, node.Name))
			c.nodeChanged(node)
		},
		Update: func(_, node *corev1.Node) { c.nodeChanged(node) },
		Delete: c.nodeGone,
	})
	if err != nil {
		return nil, err
	}
	leasesSynced, err := runner.Watch(leases.Informer(), runner.Handlers[*coordinationv1.Lease]{
		Add:    c.leaseChanged,
		Update: func(_, lease *coordinationv1.Lease) { c.leaseChanged(lease) },
	})
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(core.Pods().Informer(), runner.Handlers[*corev1.Pod]{
		Add: func(pod *corev1.Pod) { c.podAssigned(pod) },
		Update: func(old, cur *corev1.Pod) {
			if old.Spec.NodeName != cur.Spec.NodeName || !podutil.IsPodReady(old) && podutil.IsPodReady(cur) {
				c.podAssigned(cur)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{nodesSynced, leasesSynced, podsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) nodeChanged(node *corev1.Node) {
	c.mu.Lock()
	before := c.zones.allDisrupted()
	changed := c.zones.set(node, c.Clock.Now())
	if before && !c.zones.allDisrupted() {
		// Back from a disruption of everything: it was this side that did not hear, so everybody gets time anew.
		for name, h := range c.health {
			h.Seen = c.Clock.Now()
			c.health[name] = h
		}
	}
	c.mu.Unlock()
	c.queue.Add(node.Name)
	if changed {
		c.enqueueAll()
	}
}

func (c *Controller) nodeGone(node *corev1.Node) {
	c.event(node, "RemovingNode", fmt.Sprintf("Node %s event: Removing Node %s from Controller", node.Name, node.Name))
	c.mu.Lock()
	delete(c.health, node.Name)
	changed := c.zones.remove(node.Name, c.Clock.Now())
	c.mu.Unlock()
	if changed {
		c.enqueueAll()
	}
}

// enqueueAll after a change of what is allowed; that is rare.
func (c *Controller) enqueueAll() {
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		c.Log.Error("list nodes", "err", err)
		return
	}
	for _, node := range nodes {
		c.queue.Add(node.Name)
	}
}

// leaseChanged only notes the time: the timer that waits for silence looks at it when it fires.
func (c *Controller) leaseChanged(lease *coordinationv1.Lease) {
	if lease.Namespace != corev1.NamespaceNodeLease {
		return
	}
	node, err := c.nodes.Get(lease.Name)
	if err != nil {
		return // a lease before its node: the node's own event comes
	}
	c.observe(node, lease)
}

func (c *Controller) observe(node *corev1.Node, lease *coordinationv1.Lease) Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.health[node.Name].Observe(node, lease, c.Clock.Now())
	c.health[node.Name] = h
	return h
}

// podAssigned looks after a pod that comes to a node which may be dead already.
func (c *Controller) podAssigned(pod *corev1.Pod) {
	node, err := c.nodes.Get(pod.Spec.NodeName)
	if err != nil {
		return
	}
	if ready := conditionOf(node, corev1.NodeReady); ready != nil && ready.Status == corev1.ConditionUnknown {
		c.queue.Add(node.Name)
	}
}

func (c *Controller) sync(ctx context.Context, name string) (time.Duration, error) {
	node, err := c.nodes.Get(name)
	if apierrors.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read node %s: %w", name, err)
	}
	lease, err := c.leases.Leases(corev1.NamespaceNodeLease).Get(name)
	if err != nil && !apierrors.IsNotFound(err) {
		return 0, fmt.Errorf("read lease of node %s: %w", name, err)
	}
	if err != nil {
		lease = nil
	}
	health := c.observe(node, lease)
	c.mu.Lock()
	all := c.zones.allDisrupted()
	c.mu.Unlock()
	return c.apply(ctx, node, Compute(Snapshot{Node: node, Health: health, Timing: c.timing, AllDisrupted: all}, c.Clock.Now()))
}

func (c *Controller) apply(ctx context.Context, node *corev1.Node, plan Plan) (time.Duration, error) {
	if plan.Conditions != nil {
		c.Log.Warn("node shows no sign of life", "node", node.Name)
		changed := node.DeepCopy()
		changed.Status.Conditions = plan.Conditions
		if _, err := c.Client.CoreV1().Nodes().UpdateStatus(ctx, changed, metav1.UpdateOptions{}); err != nil {
			return 0, fmt.Errorf("update status of node %s: %w", node.Name, err)
		}
		if plan.NotReady {
			c.event(node, "NodeNotReady", fmt.Sprintf("Node %s status is now: NodeNotReady", node.Name))
		}
		return 0, nil // the event of this write goes on from here
	}
	after := plan.RequeueAfter
	if plan.Evict != nil {
		c.mu.Lock()
		ok, wait := c.zones.mayEvict(node.Name, c.Clock.Now())
		c.mu.Unlock()
		switch {
		case ok:
			plan.Taints = append(plan.Taints, *plan.Evict)
			plan.Retaint = true
		case wait > 0 && (after == 0 || wait < after):
			after = wait
		}
	}
	if err := c.patch(ctx, node, plan); err != nil {
		return 0, err
	}
	if plan.MarkPods {
		if err := c.markPods(ctx, node); err != nil {
			return 0, err
		}
	}
	return after, nil
}

// patch writes taints and labels. It names the version that was read, so that it cannot undo another's taint.
func (c *Controller) patch(ctx context.Context, node *corev1.Node, plan Plan) error {
	if !plan.Retaint && len(plan.Labels) == 0 {
		return nil
	}
	meta := map[string]any{"resourceVersion": node.ResourceVersion}
	if len(plan.Labels) > 0 {
		meta["labels"] = plan.Labels
	}
	body := map[string]any{"metadata": meta}
	if plan.Retaint {
		body["spec"] = map[string]any{"taints": plan.Taints}
	}
	data, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode taints of node %s: %w", node.Name, err)
	}
	if _, err := c.Client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, data, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("patch taints of node %s: %w", node.Name, err)
	}
	return nil
}

// markPods sets Ready to False on the pods of a node that nobody hears from, so that no Service sends to them.
func (c *Controller) markPods(ctx context.Context, node *corev1.Node) error {
	found, err := c.pods.ByIndex(controller.PodNodeNameKeyIndex, node.Name)
	if err != nil {
		return fmt.Errorf("list pods of node %s: %w", node.Name, err)
	}
	var errs []error
	for _, obj := range found {
		pod, ok := obj.(*corev1.Pod)
		if !ok || !podutil.IsPodReady(pod) {
			continue
		}
		changed := pod.DeepCopy()
		_, ready := podutil.GetPodCondition(&changed.Status, corev1.PodReady)
		ready.Status = corev1.ConditionFalse
		ready.LastTransitionTime = metav1.NewTime(c.Clock.Now())
		if _, err := c.Client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, changed, metav1.UpdateOptions{}); err != nil {
			if !apierrors.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("mark pod %s/%s not ready: %w", pod.Namespace, pod.Name, err))
			}
			continue
		}
		c.recorder.Event(pod, corev1.EventTypeWarning, "NodeNotReady", "Node is not ready")
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// event is about a node; like upstream's it names the node's UID, so that `describe node` shows it.
func (c *Controller) event(node *corev1.Node, reason, message string) {
	c.recorder.Event(&corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}, corev1.EventTypeNormal, reason, message)
}
