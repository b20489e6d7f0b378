// SPDX-License-Identifier: Apache-2.0

// Package node is the agent: it makes a Linux host a node, and keeps the pods that are bound to it running.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/api"
	"skep.io/skep/node/csi"
	"skep.io/skep/node/dns"
	"skep.io/skep/node/eviction"
	"skep.io/skep/node/idmap"
	"skep.io/skep/node/pods"
	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/static"
	"skep.io/skep/node/volumes"
)

// Network is what the agent needs of the data plane. *dataplane.Dataplane implements it.
type Network interface {
	sandbox.Network
	// ConfigureNode makes devices and routes for the node's pod ranges.
	ConfigureNode(ctx context.Context, podCIDRs []netip.Prefix) error
}

// Runtime is what the agent needs of containerd. Containerd implements it.
type Runtime interface {
	runtime.Containers
	runtime.Sessions
	Images() runtime.Images
	// DiskUsage is what a container has written to its root file system.
	DiskUsage(ctx context.Context, id string) (bytes, inodes int64, err error)
	Close() error
}

// Containerd is a *runtime.Runtime as the agent wants it.
type Containerd struct{ *runtime.Runtime }

// Images gives the image store.
func (c Containerd) Images() runtime.Images { return c.Runtime.Images() }

// Config of an Agent.
type Config struct {
	NodeName string
	NodeIPs  []netip.Addr // InternalIPs, the primary one first
	// Client acts as system:node:NODENAME, group system:nodes, and talks protobuf.
	Client kubernetes.Interface
	// Informers, if set, are shared with others in the process and started by whoever made them; the agent wants
	// Services of it. Without them it watches Services itself.
	Informers     informers.SharedInformerFactory
	DataDir       string // empty: api.DefaultDataDir
	RunDir        string // empty: api.RunDir
	LogsDir       string // empty: api.PodLogsDir
	ImagesDir     string // archives to import at start; empty for none
	StaticPodDir  string // manifests of pods that this node runs whatever the API says; empty for none
	ClusterDNS    []netip.Addr
	ClusterDomain string
	// HostResolvConf is the host's resolv.conf; empty: dns.HostResolvConf finds it.
	HostResolvConf string
	Network        Network
	MTU            int // of pod links; 0: the kernel's default

	// Runtime, if set, is used instead of one made from RuntimeConfig, and not closed.
	Runtime       Runtime
	RuntimeConfig runtime.Config // DataDir, RunDir and Log are filled in where empty

	// ServeAPI serves the node's own API until ctx ends; nil serves none.
	ServeAPI func(ctx context.Context, a *Agent) error
	Port     int // of the node's API; 0: api.DefaultNodeAPIPort
	Labels   map[string]string
	MaxPods  int // 0: 110
	// UnsafeSysctls may be set by pods; a name may end in an asterisk.
	UnsafeSysctls []string
	// LeaseLife is how long this node may be silent, in whole seconds; it gives a sign four times as often. 0: 40 s.
	LeaseLife time.Duration
	ImageGC   ImageGC
	Eviction  Eviction
	// KubeReserved is kept from pods for this agent and what belongs to it, SystemReserved for the rest of the host.
	KubeReserved, SystemReserved Reserved
	// PodMaxPids is how many processes and threads one pod may have; 0: a quarter of what all pods may have together,
	// negative: no limit of its own.
	PodMaxPids int64
	Shutdown   Shutdown
	Log        *slog.Logger
	Metrics    prometheus.Registerer
}

// Agent of one node.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	runtime   Runtime
	ownsRT    bool
	sandboxes *sandbox.Sandboxes
	services  corelisters.ServiceLister
	synced    cache.DoneChecker
	resolv    []byte
	host      hostFacts
	// noUserNamespaces says why pods cannot have user ids of their own; nil: they can.
	noUserNamespaces error

	podCIDRs  atomic.Pointer[[]netip.Prefix]
	set       atomic.Pointer[pods.Set]
	volumes   atomic.Pointer[volumes.Volumes]
	ready     chan struct{} // closed when the node is Ready for the first time
	readyOnce sync.Once
	status    *statusLoop
}

// New starts the container runtime and reads what the host is. It needs no API server yet.
func New(ctx context.Context, cfg Config) (_ *Agent, err error) {
	if cfg.DataDir == "" {
		cfg.DataDir = api.DefaultDataDir
	}
	if cfg.RunDir == "" {
		cfg.RunDir = api.RunDir
	}
	if cfg.LogsDir == "" {
		cfg.LogsDir = api.PodLogsDir
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Port == 0 {
		cfg.Port = api.DefaultNodeAPIPort
	}
	if cfg.MaxPods == 0 {
		cfg.MaxPods = 110
	}
	if cfg.ClusterDomain == "" {
		cfg.ClusterDomain = api.DefaultClusterDomain
	}
	if cfg.NodeName == "" || len(cfg.NodeIPs) == 0 {
		return nil, errors.New("a node needs a name and at least one address")
	}
	if cfg.Eviction, err = cfg.Eviction.complete(); err != nil {
		return nil, fmt.Errorf("thresholds of eviction: %w", err)
	}
	a := &Agent{cfg: cfg, log: cfg.Log, runtime: cfg.Runtime, ready: make(chan struct{}), noUserNamespaces: idmap.Supported()}
	if a.host, err = readHost(cfg.DataDir); err != nil {
		return nil, err
	}
	if err := a.host.keep(cfg.KubeReserved, cfg.SystemReserved, cfg.Eviction.Hard); err != nil {
		return nil, err
	}
	if cfg.HostResolvConf == "" {
		a.resolv, err = dns.HostResolvConf()
	} else {
		a.resolv, err = os.ReadFile(cfg.HostResolvConf)
	}
	if err != nil {
		return nil, fmt.Errorf("resolv.conf of the host: %w", err)
	}
	if a.runtime == nil {
		rc := cfg.RuntimeConfig
		if rc.DataDir == "" {
			rc.DataDir = cfg.DataDir
		}
		if rc.RunDir == "" {
			rc.RunDir = cfg.RunDir
		}
		if rc.SeccompDir == "" {
			rc.SeccompDir = filepath.Join(cfg.DataDir, "seccomp") // where kubelet has it below its own
		}
		if rc.Log == nil {
			rc.Log = cfg.Log
		}
		rt, err := runtime.New(ctx, rc)
		if err != nil {
			return nil, fmt.Errorf("container runtime: %w", err)
		}
		a.runtime, a.ownsRT = Containerd{rt}, true
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.closeRuntime())
		}
	}()
	a.sandboxes, err = sandbox.New(sandbox.Config{
		RunDir: cfg.RunDir, Network: cfg.Network, MTU: cfg.MTU, Log: cfg.Log, PodCIDRs: a.PodCIDRs, Pods: cfg.MaxPods,
	})
	if err != nil {
		return nil, err
	}
	if cfg.Informers != nil {
		s := cfg.Informers.Core().V1().Services()
		a.synced, a.services = s.Informer().HasSyncedChecker(), s.Lister()
	}
	a.status = newStatusLoop(a)
	return a, nil
}

func (a *Agent) closeRuntime() error {
	if !a.ownsRT {
		return nil
	}
	return a.runtime.Close()
}

// PodCIDRs are the node's pod ranges; none until the control plane has given it some.
func (a *Agent) PodCIDRs() []netip.Prefix {
	if p := a.podCIDRs.Load(); p != nil {
		return *p
	}
	return nil
}

// Ready is closed when the node has first reported itself Ready.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Pods are the pods of this node; nil before Run has read what an earlier agent left.
func (a *Agent) Pods() *pods.Set { return a.set.Load() }

// LocalPaths are the directories of this node's local-path volumes.
func (a *Agent) LocalPaths() *volumes.LocalPaths {
	return volumes.NewLocalPaths(a.localPath())
}

func (a *Agent) localPath() string { return filepath.Join(a.cfg.DataDir, "storage") }

// Runtime is the container runtime.
func (a *Agent) Runtime() Runtime { return a.runtime }

// Run registers the node and runs its pods until ctx ends. Containers go on running after that.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, a.closeRuntime()) }()
	ctx, cancel := context.WithCancel(ctx)
	g := &group{ctx: ctx, cancel: cancel}
	defer func() { _ = g.wait() }() // on the way out of an earlier error, which is the one to tell
	defer cancel()

	broadcaster := record.NewBroadcaster(record.WithContext(context.WithoutCancel(ctx)))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: a.cfg.Client.CoreV1().Events("")})
	defer broadcaster.Shutdown()
	recorder := broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kubelet", Host: a.cfg.NodeName})
	a.status.recorder = recorder

	if a.services == nil {
		f := informers.NewSharedInformerFactory(a.cfg.Client, 0)
		s := f.Core().V1().Services()
		a.synced, a.services = s.Informer().HasSyncedChecker(), s.Lister()
		f.StartWithContext(ctx)
		defer f.Shutdown()
		defer cancel()
	}

	objects := volumes.NewObjects(ctx, a.cfg.Client, a.log, func(uid types.UID) {
		if s := a.set.Load(); s != nil {
			s.VolumesChanged(uid)
		}
	})
	defer objects.Wait()
	defer cancel()
	drivers := csi.New(csi.Config{Dir: filepath.Join(a.cfg.DataDir, "plugins_registry"), NodeName: a.cfg.NodeName, Client: a.cfg.Client, Log: a.log})
	vols, err := volumes.New(volumes.Config{
		Dir: filepath.Join(a.cfg.DataDir, "pods"), Client: a.cfg.Client, Objects: objects,
		Allocatable: a.host.allocatable(a.cfg.MaxPods), Images: a.runtime.Images(), Drivers: drivers, Log: a.log,
	})
	if err != nil {
		return err
	}
	a.volumes.Store(vols)
	prober := probes.New(probes.Config{
		Exec:   a.runtime.ExecSync,
		Report: func(r probes.Result) { a.set.Load().ProbeResult(r) },
		Failed: func(f probes.Failure) { a.set.Load().ProbeFailed(f) },
	})
	defer prober.Close()
	set, err := pods.New(ctx, pods.Config{
		NodeName: a.cfg.NodeName, NodeIPs: a.cfg.NodeIPs, Client: a.cfg.Client,
		Runtime: a.runtime, Images: a.runtime.Images(), Sandboxes: a.sandboxes, Volumes: volumeAdapter{vols, objects}, Objects: objects,
		Prober: prober, Services: func(ns string, wait bool) ([]*corev1.Service, error) { return a.servicesOf(ctx, ns, wait) }, ResolvConf: a.resolvConf, Recorder: recorder,
		Dir: filepath.Join(a.cfg.DataDir, "pods"), LogsDir: a.cfg.LogsDir, ClusterDomain: a.cfg.ClusterDomain,
		Allocatable: a.host.allocatable(a.cfg.MaxPods), Terms: pods.Terms{UnsafeSysctls: a.cfg.UnsafeSysctls, PodPids: a.host.podPids(a.cfg.PodMaxPids), NoUserNamespaces: a.noUserNamespaces}, Node: a.status.current, MemoryCapacity: a.host.memory, BootID: a.host.bootID, Weigh: weighBurstable, Log: a.log, Metrics: a.cfg.Metrics,
	})
	if err != nil {
		return err
	}
	a.set.Store(set)
	setDone := make(chan struct{})
	go func() { defer close(setDone); set.Run() }()
	defer func() { cancel(); <-setDone }()

	if err := a.limitPods(); err != nil {
		a.log.Warn("what all pods have together is not limited", "error", err)
	}
	a.log.Info("node agent starts", "node", a.cfg.NodeName, "addresses", a.cfg.NodeIPs)
	if err := a.runStatic(ctx, g, set); err != nil {
		return err
	}
	if err := a.register(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	g.do(func() error { return a.watchNode(ctx) })
	g.do(func() error { return a.watchPods(ctx, set) })
	g.do(func() error { set.RunMirrors(ctx); return nil })
	g.do(func() error { a.renewLease(ctx); return nil })
	g.do(func() error { a.status.run(ctx); return nil })
	g.do(func() error {
		(&evictor{a: a, set: set, policy: a.cfg.Eviction, state: eviction.NewState()}).run(ctx)
		return nil
	})
	g.do(func() error { return a.importImages(ctx, set) })
	g.do(func() error { drivers.Run(ctx); return nil })
	if a.cfg.ServeAPI != nil {
		g.do(func() error { return a.cfg.ServeAPI(ctx, a) })
	}
	<-ctx.Done()
	return g.wait()
}

// runStatic runs the pods of the files in the static pods' directory, before the API server has answered: they may be what
// it takes to reach it. What an earlier agent left of those whose files are gone belongs to nobody.
func (a *Agent) runStatic(ctx context.Context, g *group, set *pods.Set) error {
	if a.cfg.StaticPodDir == "" {
		return nil
	}
	if err := os.MkdirAll(a.cfg.StaticPodDir, 0o700); err != nil {
		return fmt.Errorf("directory of static pods: %w", err)
	}
	dir := static.NewDir(a.cfg.StaticPodDir, a.cfg.NodeName, a.log)
	list, err := dir.Read()
	if err != nil {
		return err
	}
	set.SetStatic(list)
	g.do(func() error { dir.Watch(ctx, set.SetStatic); return nil })
	return nil
}

// resolvConf is the resolv.conf of a pod.
func (a *Agent) resolvConf(pod *corev1.Pod) ([]byte, error) {
	return dns.ResolvConf(pod, a.cfg.ClusterDNS, a.cfg.ClusterDomain, a.resolv)
}

// servicesOf lists the Services of a namespace: containers get variables from them. With wait that is once they are known.
func (a *Agent) servicesOf(ctx context.Context, namespace string, wait bool) ([]*corev1.Service, error) {
	if !wait {
		return a.services.Services(namespace).List(labels.Everything())
	}
	select {
	case <-a.synced.Done():
		return a.services.Services(namespace).List(labels.Everything())
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// importImages imports archives beside everything else, and then has pods that missed an image look again.
func (a *Agent) importImages(ctx context.Context, set *pods.Set) error {
	defer set.ImagesImported()
	if a.cfg.ImagesDir == "" {
		return nil
	}
	began := time.Now()
	list, err := a.runtime.Images().ImportDir(ctx, a.cfg.ImagesDir)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		a.log.Error("import images", "dir", a.cfg.ImagesDir, "error", err)
	}
	if len(list) > 0 {
		a.log.Info("images imported", "dir", a.cfg.ImagesDir, "images", len(list), "took", time.Since(began).Round(time.Millisecond))
		a.status.changed()
	}
	return nil
}

// volumeAdapter gives volumes the shape that pods want.
type volumeAdapter struct {
	*volumes.Volumes
	objects *volumes.Objects
}

func (v volumeAdapter) Track(pod *corev1.Pod) { v.objects.Track(pod) }

func (v volumeAdapter) Untrack(pod types.UID) { v.objects.Untrack(pod) }

func (v volumeAdapter) ContainerMounts(pod *corev1.Pod, c *corev1.Container, expand func(string) string) ([]runtime.Mount, error) {
	list, err := v.Volumes.ContainerMounts(pod, c, expand)
	out := make([]runtime.Mount, 0, len(list))
	for _, m := range list {
		out = append(out, runtime.Mount(m))
	}
	return out, err
}

func (v volumeAdapter) ContainerDevices(pod *corev1.Pod, c *corev1.Container) ([]runtime.Device, error) {
	list, err := v.Volumes.ContainerDevices(pod, c)
	out := make([]runtime.Device, 0, len(list))
	for _, d := range list {
		out = append(out, runtime.Device(d))
	}
	return out, err
}

// group runs what the agent is made of; the first error ends all.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	err    error
}

func (g *group) do(f func() error) {
	g.wg.Go(func() {
		if err := f(); err != nil && g.ctx.Err() == nil {
			g.mu.Lock()
			g.err = errors.Join(g.err, err)
			g.mu.Unlock()
			g.cancel()
		}
	})
}

func (g *group) wait() error {
	g.wg.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}
