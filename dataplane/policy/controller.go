// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	networkinglisters "k8s.io/client-go/listers/networking/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	dpmaps "skep.io/skep/dataplane/maps"
)

// Kernel is a Store with what a controller reads of it when it starts; *maps.Maps is the real one.
type Kernel interface {
	Store
	PolicyState() (dpmaps.PolicyState, error)
	PolicySets(slot uint32) (dpmaps.PolicySets, error)
	PolicySlots() uint32
	PrunePolicies(epoch uint32) error
}

// Config of a Controller.
type Config struct {
	// Informers for NetworkPolicies; for Pods and Namespaces only from the first NetworkPolicy on.
	Informers informers.SharedInformerFactory
	Dynamic   dynamic.Interface // for ClusterNetworkPolicies; nil: there are none
	Kernel    Kernel
	Limits    Limits
	Capacity  map[string]uint32    // entries that fit, by map
	Slots     []uint32             // that pods have which an earlier process attached
	Events    record.EventRecorder // may be nil
	Log       *slog.Logger
	Metrics   prometheus.Registerer // may be nil
}

// Controller keeps the kernel's policies as the API wants them. Pods are attached by whoever makes them, which
// may be before anything is known of policies.
type Controller struct {
	cfg      Config
	policies networkinglisters.NetworkPolicyLister
	synced   cache.InformerSynced
	queue    workqueue.TypedRateLimitingInterface[task]
	complete chan struct{}
	cluster  *cluster
	wide     *clusterPolicies // nil without Dynamic

	mu        sync.Mutex // of all below
	table     *Table
	resolved  bool            // policies are known
	unclaimed map[uint32]bool // slots with sets of an earlier epoch
	pruned    bool
	told      map[types.NamespacedName]string // problems with events
	past      map[dropLabels]uint64           // drops of sets that are gone
	waiting   map[types.NamespacedName]string // policies whose steps the kernel did not take, and why
	stuck     error                           // why steps wait; nil if none does

	applied  prometheus.Histogram
	failures prometheus.Counter
}

// task is an object to look at; without a kind, what is left to be done of earlier ones.
type task struct {
	kind kind
	name types.NamespacedName
}

type kind int

const (
	rest kind = iota
	onePolicy
	onePod
	oneNamespace
	oneClusterPolicy
	oneNode
	theDefinition // of ClusterNetworkPolicies
)

// NewController registers with the informers, which the caller starts.
func NewController(cfg Config) (*Controller, error) {
	state, err := cfg.Kernel.PolicyState()
	if err != nil {
		return nil, err
	}
	state.Epoch = state.Epoch%254 + 1
	if err := cfg.Kernel.PutPolicyState(state); err != nil {
		return nil, err
	}
	c := &Controller{
		cfg: cfg, complete: make(chan struct{}), cluster: &cluster{}, unclaimed: map[uint32]bool{},
		told: map[types.NamespacedName]string{}, past: map[dropLabels]uint64{}, waiting: map[types.NamespacedName]string{}, applied: newApplied(), failures: newFailures(),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[task](time.Millisecond, 30*time.Second)),
	}
	c.table = NewTable(c.cluster, cfg.Limits, state)
	for _, slot := range cfg.Slots {
		c.unclaimed[slot] = true
		sets, err := cfg.Kernel.PolicySets(slot)
		if err != nil {
			return nil, err
		}
		c.table.Inherit(slot, sets)
	}
	np := cfg.Informers.Networking().V1().NetworkPolicies()
	c.policies = np.Lister()
	registration, err := np.Informer().AddEventHandler(c.handler(onePolicy, nil))
	if err != nil {
		return nil, fmt.Errorf("watching NetworkPolicies: %w", err)
	}
	c.synced = registration.HasSynced
	nodes := cfg.Informers.Core().V1().Nodes()
	c.cluster.nodes = nodes.Lister()
	if _, err := nodes.Informer().AddEventHandler(c.handler(oneNode, sameNode)); err != nil {
		return nil, fmt.Errorf("watching Nodes: %w", err)
	}
	if cfg.Dynamic != nil {
		c.wide = newClusterPolicies(cfg.Dynamic)
	}
	if cfg.Metrics != nil {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return c, nil
}

// handler queues objects that change, unless same says that the change means nothing here.
func (c *Controller) handler(k kind, same func(old, new any) bool) cache.ResourceEventHandlerFuncs {
	add := func(o any) {
		if name, err := cache.DeletionHandlingObjectToName(o); err == nil {
			c.queue.Add(task{k, types.NamespacedName(name)})
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: add, DeleteFunc: add,
		UpdateFunc: func(old, new any) {
			if same == nil || !same(old, new) {
				add(new)
			}
		},
	}
}

// watchCluster starts watching pods and namespaces, of which nobody has to know before there are policies.
func (c *Controller) watchCluster(ctx context.Context) error {
	if c.cluster.pods != nil {
		return nil
	}
	core := c.cfg.Informers.Core().V1()
	pods, namespaces := core.Pods().Informer(), core.Namespaces().Informer()
	a, err := pods.AddEventHandler(c.handler(onePod, samePod))
	if err != nil {
		return fmt.Errorf("watching Pods: %w", err)
	}
	b, err := namespaces.AddEventHandler(c.handler(oneNamespace, sameNamespace))
	if err != nil {
		return fmt.Errorf("watching Namespaces: %w", err)
	}
	c.cfg.Informers.StartWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), a.HasSynced, b.HasSynced) {
		return ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cluster.pods, c.cluster.namespaces = core.Pods().Lister(), core.Namespaces().Lister()
	return nil
}

func samePod(old, new any) bool {
	a, ok := old.(*corev1.Pod)
	b, ok2 := new.(*corev1.Pod)
	return ok && ok2 && a.UID == b.UID && a.Status.Phase == b.Status.Phase && maps.Equal(a.Labels, b.Labels) &&
		slices.Equal(a.Status.PodIPs, b.Status.PodIPs)
}

func sameNamespace(old, new any) bool {
	a, ok := old.(*corev1.Namespace)
	b, ok2 := new.(*corev1.Namespace)
	return ok && ok2 && maps.Equal(a.Labels, b.Labels)
}

func sameNode(old, new any) bool {
	a, ok := old.(*corev1.Node)
	b, ok2 := new.(*corev1.Node)
	return ok && ok2 && maps.Equal(a.Labels, b.Labels) && slices.Equal(nodeAddresses(a), nodeAddresses(b))
}

// Synced is closed when the policies known at start are in force.
func (c *Controller) Synced() <-chan struct{} { return c.complete }

// Problems are policies that are not in force as they are, and why.
func (c *Controller) Problems() map[types.NamespacedName]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.problems()
}

func (c *Controller) problems() map[types.NamespacedName]string {
	all := c.table.Problems()
	maps.Copy(all, c.waiting)
	return all
}

// Stuck says why the kernel does not take what policies ask for; nil if it does. What it took before stays in force.
func (c *Controller) Stuck() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stuck
}

// flush is called with mu held.
func (c *Controller) flush() error {
	if c.stuck = c.table.Flush(c.cfg.Kernel); c.stuck != nil {
		c.failures.Inc()
		return c.stuck
	}
	clear(c.waiting)
	return nil
}

// Run follows the API until ctx ends. What is in the kernel stays.
func (c *Controller) Run(ctx context.Context) error {
	defer func() {
		if c.cfg.Metrics != nil {
			c.cfg.Metrics.Unregister(c)
		}
	}()
	stop := context.AfterFunc(ctx, c.queue.ShutDown)
	defer stop()
	if !cache.WaitForCacheSync(ctx.Done(), c.synced) {
		return ctx.Err()
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	for {
		t, shutdown := c.queue.Get()
		if shutdown {
			return nil
		}
		err := c.sync(ctx, t)
		c.queue.Done(t)
		if err == nil {
			c.queue.Forget(t)
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		c.cfg.Log.Error("network policies are not all in the kernel, will retry", "err", err)
		c.queue.AddRateLimited(t)
	}
}

func (c *Controller) start(ctx context.Context) error {
	known, err := c.policies.List(labels.Everything())
	if err != nil {
		return err
	}
	if c.wide != nil {
		if err := c.wide.start(ctx, c.handler(theDefinition, nil), c.handler(oneClusterPolicy, nil)); err != nil {
			return err
		}
	}
	wide, err := c.wide.list()
	if err != nil {
		return err
	}
	if len(known)+len(wide) > 0 {
		if err := c.watchCluster(ctx); err != nil {
			return err
		}
	}
	c.mu.Lock()
	for _, np := range known {
		c.table.Learn(np)
	}
	for _, o := range wide {
		c.table.LearnCluster(o)
	}
	c.table.ResolveAll()
	c.resolved = true
	c.mu.Unlock()
	c.queue.Add(task{})
	return nil
}

// sync looks at one object, and does all that is left to be done.
func (c *Controller) sync(ctx context.Context, t task) error {
	start := time.Now()
	var np *networkingv1.NetworkPolicy
	var wide *v1beta1.ClusterNetworkPolicy
	var err error
	switch t.kind {
	case onePolicy:
		np, err = c.policies.NetworkPolicies(t.name.Namespace).Get(t.name.Name)
		if apierrors.IsNotFound(err) {
			err = nil
		}
	case oneClusterPolicy:
		wide, err = c.wide.get(t.name.Name)
	case theDefinition:
		err = c.wide.watch(ctx, c.handler(oneClusterPolicy, nil))
	}
	if err == nil && (np != nil || wide != nil) {
		err = c.watchCluster(ctx)
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch t.kind {
	case onePolicy:
		if np != nil {
			c.table.SetPolicy(np)
		} else {
			c.table.DeletePolicy(t.name)
		}
	case onePod:
		if pod := c.cluster.Pod(t.name); pod != nil {
			c.table.SetPod(pod)
		} else {
			c.table.DeletePod(t.name)
		}
	case oneNamespace:
		c.table.SetNamespace(t.name.Name)
	case oneClusterPolicy:
		if wide != nil {
			c.table.SetClusterPolicy(wide)
		} else {
			c.table.DeleteClusterPolicy(t.name.Name)
		}
	case oneNode:
		c.table.SetNodes()
	}
	if err := c.flush(); err != nil {
		if np != nil || wide != nil {
			c.waiting[t.name] = fmt.Sprintf("it is not in force: %v; what was before it is", err)
		}
		c.tell()
		return err
	}
	c.applied.Observe(time.Since(start).Seconds())
	select {
	case <-c.complete:
	default:
		close(c.complete)
	}
	c.tell()
	if c.queue.Len() > 0 {
		return nil // later, once for all of them
	}
	return c.collect()
}

// collect is called with mu held.
func (c *Controller) collect() error {
	if err := c.table.Collect(c.cfg.Kernel, c.remember); err != nil {
		return err
	}
	if c.pruned || !c.resolved || len(c.unclaimed) > 0 {
		return nil
	}
	// No slot leads to what an earlier process wrote, and no reader does any more.
	if err := c.cfg.Kernel.WaitReaders(); err != nil {
		return err
	}
	if err := c.cfg.Kernel.PrunePolicies(c.table.state.Epoch); err != nil {
		return err
	}
	c.pruned = true
	return nil
}

// tell reports problems that are new.
func (c *Controller) tell() {
	now := c.problems()
	for name, text := range now {
		if c.told[name] == text {
			continue
		}
		c.cfg.Log.Error("network policy is not in force as it is", "policy", name, "why", text)
		if c.cfg.Events == nil {
			continue
		}
		if name.Namespace == "" {
			if o, err := c.wide.get(name.Name); err == nil && o != nil {
				c.cfg.Events.Event(o, corev1.EventTypeWarning, "NotInForce", text)
			}
		} else if np, err := c.policies.NetworkPolicies(name.Namespace).Get(name.Name); err == nil {
			c.cfg.Events.Event(np, corev1.EventTypeWarning, "NotInForce", text)
		}
	}
	c.told = now
}

// Attach gives a pod its slot: the one it has, if not 0, else a free one. When it returns, the policies that
// select the pod are in force there; as long as they are not known, nothing passes but the node's own
// traffic.
func (c *Controller) Attach(pod Local, has uint32) (slot uint32, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	slot = has
	if slot == 0 {
		if slot, err = c.free(); err != nil {
			return 0, err
		}
	}
	sets, err := c.cfg.Kernel.PolicySets(slot)
	if err != nil {
		return 0, err
	}
	if l, known := c.table.locals[slot]; known {
		sets = l.has
	}
	if c.resolved {
		c.table.Attach(slot, pod, sets)
	} else {
		c.table.Expect(slot, pod, sets, has != 0)
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	delete(c.unclaimed, slot)
	c.queue.Add(task{})
	return slot, nil
}

// Detach takes the slot of a pod back, which must not be found by its addresses any more.
func (c *Controller) Detach(pod Local) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for slot, l := range c.table.locals {
		if l.Local == pod {
			c.table.Detach(slot)
			c.queue.Add(task{})
		}
	}
}

// Release takes a slot back that no address leads to any more, of a pod that an earlier process attached.
func (c *Controller) Release(slot uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.table.Detach(slot)
	delete(c.unclaimed, slot)
	c.queue.Add(task{})
}

func (c *Controller) free() (uint32, error) {
	for slot := uint32(1); slot < c.cfg.Kernel.PolicySlots(); slot++ {
		if _, used := c.table.locals[slot]; !used && !c.unclaimed[slot] {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("all %d policy slots are used: this node has as many pods as it can have", c.cfg.Kernel.PolicySlots()-1)
}
