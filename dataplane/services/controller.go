// SPDX-License-Identifier: Apache-2.0

package services

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
)

// Config of a Controller.
type Config struct {
	NodeName  string
	Informers informers.SharedInformerFactory
	Store     Store
	Capacity  map[string]uint32    // of the maps, for the metric of their pressure; may be nil
	Events    record.EventRecorder // for Services that cannot be served as they ask; may be nil
	Log       *slog.Logger
	Metrics   prometheus.Registerer // may be nil
	Announcer Announcer             // may be nil
}

// Announcer tells the node's neighbours of addresses.
type Announcer interface {
	// Announce makes exactly these a Service's addresses that this node announces.
	Announce(service string, addrs []netip.Addr) error
	// Settle ends what an earlier process announced: every Service is known now.
	Settle() error
}

// Controller watches Services and EndpointSlices and keeps Table and maps.
type Controller struct {
	cfg        Config
	table      *Table
	reconciler *Reconciler
	services   corelisters.ServiceLister
	slices     cache.Indexer
	pods       corelisters.PodLister
	nodes      corelisters.NodeLister
	health     *healthServer
	told       map[string]string // Service -> what an event said; only Run's goroutine uses it
	refused    map[string]string // key -> the error that an event told; only Run's goroutine uses it
	synced     []cache.InformerSynced
	queue      workqueue.TypedRateLimitingInterface[string]
	complete   chan struct{}

	mu     sync.Mutex
	failed map[string]error
	names  names

	applied    prometheus.Histogram
	latency    *latency
	failures   prometheus.Counter
	sizes      [4]atomic.Int64
	collectors []prometheus.Collector
}

const (
	byService = "skep.io/dataplane/service"
	// podPrefix distinguishes keys of pods from those of Services, whose names have no spaces.
	podPrefix = "pod "
)

// NewController reads what the maps hold and registers with the informers, which the caller starts.
func NewController(cfg Config) (*Controller, error) {
	r, err := NewReconciler(cfg.Store)
	if err != nil {
		return nil, fmt.Errorf("reading services from the kernel: %w", err)
	}
	c := &Controller{
		cfg:        cfg,
		table:      NewTable(),
		reconciler: r,
		failed:     map[string]error{},
		complete:   make(chan struct{}),
		health:     newHealthServer(cfg.Log),
		told:       map[string]string{},
		refused:    map[string]string{},
		// The first retry comes after a millisecond: the kernel's errors are mostly momentary.
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Millisecond, 30*time.Second)),
	}
	if err := c.watch(); err != nil {
		return nil, err
	}
	if err := c.register(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Controller) watch() error {
	svcs := c.cfg.Informers.Core().V1().Services()
	slices := c.cfg.Informers.Discovery().V1().EndpointSlices()
	c.services = svcs.Lister()
	c.slices = slices.Informer().GetIndexer()
	if _, ok := c.slices.GetIndexers()[byService]; !ok {
		if err := slices.Informer().AddIndexers(cache.Indexers{byService: indexByService}); err != nil {
			return fmt.Errorf("index of EndpointSlices: %w", err)
		}
	}
	a, err := svcs.Informer().AddEventHandler(c.handler(func(o any) string {
		key, _ := cache.MetaNamespaceKeyFunc(o)
		return key
	}))
	if err != nil {
		return fmt.Errorf("watching Services: %w", err)
	}
	b, err := slices.Informer().AddEventHandler(c.handler(func(o any) string {
		keys, _ := indexByService(o)
		if len(keys) == 0 {
			return ""
		}
		return keys[0]
	}))
	if err != nil {
		return fmt.Errorf("watching EndpointSlices: %w", err)
	}
	pods := c.cfg.Informers.Core().V1().Pods()
	c.pods = pods.Lister()
	p, err := pods.Informer().AddEventHandler(c.handler(func(o any) string {
		if pod, ok := o.(*corev1.Pod); ok && pod.Spec.NodeName == c.cfg.NodeName && hasHostPorts(pod) {
			return podPrefix + pod.Namespace + "/" + pod.Name
		}
		return ""
	}))
	if err != nil {
		return fmt.Errorf("watching Pods: %w", err)
	}
	nodes := c.cfg.Informers.Core().V1().Nodes()
	c.nodes = nodes.Lister()
	n, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { c.moved(nil, o) }, UpdateFunc: c.moved,
	})
	if err != nil {
		return fmt.Errorf("watching Nodes: %w", err)
	}
	// The handlers' own HasSynced: every object of the first list is in the queue by then.
	c.synced = []cache.InformerSynced{a.HasSynced, b.HasSynced, p.HasSynced, n.HasSynced}
	return nil
}

// moved looks at all Services again when this node's zone has changed.
func (c *Controller) moved(old, cur any) {
	zone := func(o any) string {
		n, _ := o.(*corev1.Node)
		if n == nil || n.Name != c.cfg.NodeName {
			return ""
		}
		return n.Labels[corev1.LabelTopologyZone]
	}
	if zone(old) == zone(cur) {
		return
	}
	all, _ := c.services.List(labels.Everything())
	for _, s := range all {
		c.queue.Add(s.Namespace + "/" + s.Name)
	}
}

func (c *Controller) place() Place {
	here := Place{Node: c.cfg.NodeName}
	if n, err := c.nodes.Get(c.cfg.NodeName); err == nil {
		here.Zone = n.Labels[corev1.LabelTopologyZone]
	}
	return here
}

func indexByService(o any) ([]string, error) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok || s.Labels[discoveryv1.LabelServiceName] == "" {
		return nil, nil
	}
	return []string{s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]}, nil
}

func (c *Controller) handler(key func(any) string) cache.ResourceEventHandlerFuncs {
	add := func(o any) {
		if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = d.Obj
		}
		if k := key(o); k != "" {
			c.queue.Add(k)
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: add,
		UpdateFunc: func(old, new any) {
			if key(old) != key(new) {
				add(old)
			}
			add(new)
		},
		DeleteFunc: add,
	}
}

// Table is for Lookup.
func (c *Controller) Table() *Table { return c.table }

// Synced is closed when every Service known at start is in the kernel and what nobody wants is gone.
func (c *Controller) Synced() <-chan struct{} { return c.complete }

// Failed lists Services that could not be written, with the last error; they are being retried.
func (c *Controller) Failed() map[string]error {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]error, len(c.failed))
	for k, v := range c.failed {
		out[k] = v
	}
	return out
}

// Run writes changes until ctx ends. Nothing is written before all informers have synced: a Service
// without its EndpointSlices would look as if it had no backends.
func (c *Controller) Run(ctx context.Context) error {
	defer c.unregister()
	defer c.health.close()
	if !cache.WaitForCacheSync(ctx.Done(), c.synced...) {
		return ctx.Err()
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, c.queue.ShutDown)

	initial := map[string]bool{}
	all, err := c.services.List(labels.Everything())
	if err != nil {
		return err
	}
	for _, s := range all {
		initial[s.Namespace+"/"+s.Name] = true
	}
	pods, err := c.pods.List(labels.Everything())
	if err != nil {
		return err
	}
	for _, p := range pods {
		if p.Spec.NodeName == c.cfg.NodeName && hasHostPorts(p) {
			initial[podPrefix+p.Namespace+"/"+p.Name] = true
		}
	}
	pruned := false
	prune := func() {
		if pruned || len(initial) > 0 {
			return
		}
		if err := c.reconciler.Prune(); err != nil {
			c.cfg.Log.Error("services of an earlier run are still in the kernel", "err", err)
			c.queue.AddRateLimited("") // the empty key only leads here again
			return
		}
		if c.cfg.Announcer != nil {
			if err := c.cfg.Announcer.Settle(); err != nil {
				c.cfg.Log.Error("addresses of an earlier run are still announced", "err", err)
				c.queue.AddRateLimited("")
				return
			}
		}
		pruned = true
		close(c.complete)
		wg.Add(1)
		go func() {
			defer wg.Done()
			c.collect(ctx)
		}()
	}
	prune()
	for {
		key, shutdown := c.queue.Get()
		if shutdown {
			return nil
		}
		if c.sync(ctx, key) == nil {
			c.queue.Forget(key)
		} else {
			c.queue.AddRateLimited(key)
		}
		c.queue.Done(key)
		delete(initial, key) // even if it failed: what it has is claimed, what it lacks is retried
		prune()
	}
}

func (c *Controller) sync(ctx context.Context, key string) error {
	if key == "" {
		return nil
	}
	start := time.Now()
	want, err := c.desired(key)
	if err == nil {
		err = c.reconciler.Apply(key, want.Sets)
		namespace, name, _ := strings.Cut(key, "/")
		err = errors.Join(err, c.health.set(ctx, types.NamespacedName{Namespace: namespace, Name: name}, want.Health))
		if c.cfg.Announcer != nil && err == nil {
			err = c.cfg.Announcer.Announce(key, want.Announce) // now that somebody answers there
		}
	}
	c.name(key, want.Sets)
	c.tellFailure(key, err)
	services, slots, blocks, backends := c.reconciler.Size()
	for i, n := range []int{services, slots, blocks, backends} {
		c.sizes[i].Store(int64(n))
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failed[key] = err
		c.failures.Inc()
		c.cfg.Log.Error("service is not programmed, will retry", "service", key, "err", err)
		return err
	}
	if _, was := c.failed[key]; was {
		delete(c.failed, key)
		c.cfg.Log.Info("service is programmed", "service", key)
	}
	c.applied.Observe(time.Since(start).Seconds())
	c.latency.programmed(key, c.slicesOf(key), time.Now())
	return nil
}

// tellFailure makes an event of a Service that is not in the kernel as it should be, once for each reason.
func (c *Controller) tellFailure(key string, failed error) {
	if failed == nil {
		delete(c.refused, key)
		return
	}
	if c.refused[key] == failed.Error() || c.cfg.Events == nil {
		return
	}
	c.refused[key] = failed.Error()
	namespace, name, _ := strings.Cut(strings.TrimPrefix(key, podPrefix), "/")
	var about runtime.Object
	if strings.HasPrefix(key, podPrefix) {
		if pod, err := c.pods.Pods(namespace).Get(name); err == nil {
			about = pod
		}
	} else if svc, err := c.services.Services(namespace).Get(name); err == nil {
		about = svc
	}
	if about != nil { // else it has been deleted
		c.cfg.Events.Eventf(about, corev1.EventTypeWarning, "NotProgrammed", "Node %s: %v; what was there before works on", c.cfg.NodeName, failed)
	}
}

// slicesOf is empty if there are none, or an informer's index is not what it should be.
func (c *Controller) slicesOf(key string) (eps []*discoveryv1.EndpointSlice) {
	objects, err := c.slices.ByIndex(byService, key)
	if err != nil {
		return nil
	}
	for _, o := range objects {
		eps = append(eps, o.(*discoveryv1.EndpointSlice))
	}
	return eps
}

// desired also puts the Service into the table, or takes it out.
func (c *Controller) desired(key string) (Desired, error) {
	namespace, name, err := cache.SplitMetaNamespaceKey(strings.TrimPrefix(key, podPrefix))
	if err != nil {
		return Desired{}, nil
	}
	if strings.HasPrefix(key, podPrefix) {
		pod, err := c.pods.Pods(namespace).Get(name)
		if apierrors.IsNotFound(err) || err == nil && pod.Spec.NodeName != c.cfg.NodeName {
			return Desired{}, nil
		}
		if err != nil {
			return Desired{}, err
		}
		return Desired{Sets: HostPorts(pod)}, nil
	}
	svc, err := c.services.Services(namespace).Get(name)
	if apierrors.IsNotFound(err) {
		c.table.delete(key)
		delete(c.told, key)
		return Desired{}, nil
	}
	if err != nil {
		return Desired{}, err
	}
	objects, err := c.slices.ByIndex(byService, key)
	if err != nil {
		return Desired{}, err
	}
	eps := make([]*discoveryv1.EndpointSlice, 0, len(objects))
	for _, o := range objects {
		eps = append(eps, o.(*discoveryv1.EndpointSlice))
	}
	want := Build(svc, eps, c.place())
	c.table.set(key, want.Ports)
	if c.told[key] != want.Unsupported {
		c.told[key] = want.Unsupported
		if want.Unsupported != "" && c.cfg.Events != nil {
			c.cfg.Events.Event(svc, corev1.EventTypeWarning, "Unsupported", want.Unsupported)
		}
	}
	return want, nil
}

func (c *Controller) collect(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.reconciler.Garbage():
		}
		for delay := 10 * time.Millisecond; ; delay = min(delay*2, 30*time.Second) {
			err := c.reconciler.Collect()
			if err == nil {
				break
			}
			c.cfg.Log.Error("old entries stay in the kernel, will retry", "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(delay):
			}
		}
	}
}

// measured are the maps whose entries are counted, in the order of sizes.
var measured = []string{"services", "slots", "tables", "backends"}

// Sizes are how many entries the maps hold.
func (c *Controller) Sizes() map[string]int64 {
	out := map[string]int64{}
	for i, name := range measured {
		out[name] = c.sizes[i].Load()
	}
	return out
}

func (c *Controller) register() error {
	c.applied = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "skep_dataplane_service_apply_seconds",
		Help:    "Time to write one changed Service into the kernel.",
		Buckets: prometheus.ExponentialBuckets(20e-6, 4, 8),
	})
	c.failures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "skep_dataplane_service_failures_total",
		Help: "Attempts to write a Service into the kernel that failed.",
	})
	c.latency = newLatency(time.Now())
	c.collectors = []prometheus.Collector{c.applied, c.failures, c.latency.histogram}
	for i, name := range measured {
		c.collectors = append(c.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "skep_dataplane_map_entries",
			Help:        "Entries of a BPF map.",
			ConstLabels: prometheus.Labels{"map": name},
		}, func() float64 { return float64(c.sizes[i].Load()) }))
		if capacity := c.cfg.Capacity[name]; capacity > 0 {
			c.collectors = append(c.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name:        "skep_dataplane_map_pressure",
				Help:        "Entries of a BPF map as a share of what fits.",
				ConstLabels: prometheus.Labels{"map": name},
			}, func() float64 { return float64(c.sizes[i].Load()) / float64(capacity) }))
		}
	}
	if c.cfg.Metrics == nil {
		return nil
	}
	var errs []error
	for _, m := range c.collectors {
		errs = append(errs, c.cfg.Metrics.Register(m))
	}
	return errors.Join(errs...)
}

func (c *Controller) unregister() {
	if c.cfg.Metrics == nil {
		return
	}
	for _, m := range c.collectors {
		c.cfg.Metrics.Unregister(m)
	}
}
