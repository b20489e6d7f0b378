// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/conntrack"
	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/network"
	"skep.io/skep/dataplane/policy"
	"skep.io/skep/dataplane/services"
)

// Config of a node's data plane.
type Config struct {
	NodeName                   string
	NodeIPs                    []netip.Addr // the first of each family is lent to translated packets
	ClusterCIDRs, ServiceCIDRs []netip.Prefix
	ClusterDNS                 []netip.Addr        // on skep0, answered by this node
	CgroupPath                 string              // a cgroup2 directory; processes below it get socket translation
	BPFDir                     string              // default api.BPFDir
	Routing                    network.Routing     // default network.VXLAN
	NodePortMode               loader.NodePortMode // default loader.SNAT
	XDP                        loader.XDPMode      // default loader.XDPOff
	Informers                  informers.SharedInformerFactory
	ConntrackMax               uint32               // flows of each protocol that fit; 0: by the machine's memory
	Dynamic                    dynamic.Interface    // for ClusterNetworkPolicies; nil: there are none
	Events                     record.EventRecorder // for policies that cannot be put into force; may be nil
	Log                        *slog.Logger
	Metrics                    prometheus.Registerer // may be nil
}

// Dataplane is this node's.
type Dataplane struct {
	cfg        Config
	loader     *loader.Loader
	maps       *maps.Maps
	store      *servicesStore
	services   *services.Controller
	announcer  *announcer
	policies   *policy.Controller
	synced     chan struct{}
	collectors []prometheus.Collector
	peers      *peers
	flows      atomic.Pointer[conntrack.Pass] // the last collection
	destroyed  prometheus.Counter
	names      names
	log        *flows.Log

	mu       sync.Mutex // of all below, and of everything that changes links or the network
	podCIDRs []netip.Prefix
	xdp      map[string]loader.XDPMode // of devices, as it was logged
	told     map[string]string         // peers that cannot be reached, and why, as it was logged
}

// keptFlows is how many events a node remembers.
const keptFlows = 4096

// New loads the programs, or puts them in place of those that an earlier process left, and attaches
// them. The informers must be started after it.
func New(ctx context.Context, cfg Config) (*Dataplane, error) {
	if cfg.BPFDir == "" {
		cfg.BPFDir = api.BPFDir
	}
	if cfg.Routing == "" {
		cfg.Routing = network.VXLAN
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	// Pods of other nodes are beyond a tunnel, by which nothing can be sent from XDP: only who asks for it gets it then, for
	// backends outside the cluster.
	if cfg.XDP == "" || cfg.XDP == loader.XDPAuto && cfg.Routing == network.VXLAN {
		cfg.XDP = loader.XDPOff
	}
	if cfg.ConntrackMax == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, fmt.Errorf("data plane: memory of this machine: %w", err)
		}
		cfg.ConntrackMax = conntrack.Max(info.Totalram * uint64(info.Unit))
	}
	l, err := loader.Load(loader.Config{Dir: cfg.BPFDir, NodePortMode: cfg.NodePortMode, XDP: cfg.XDP, Log: cfg.Log, ConntrackMax: cfg.ConntrackMax})
	if err != nil {
		return nil, fmt.Errorf("data plane: %w", err)
	}
	d := &Dataplane{cfg: cfg, loader: l, maps: l.Maps(), store: newServicesStore(l.Maps()), synced: make(chan struct{}), destroyed: newDestroyed()}
	d.announcer = newAnnouncer(d.maps, cfg.Log)
	if d.peers, err = newPeers(cfg); err != nil {
		d.Close()
		return nil, fmt.Errorf("data plane: %w", err)
	}
	if err := d.start(ctx); err != nil {
		d.Close()
		return nil, fmt.Errorf("data plane: %w", err)
	}
	return d, nil
}

func (d *Dataplane) start(ctx context.Context) error {
	if err := d.syncNode(); err != nil {
		return err
	}
	var err error
	d.services, err = services.NewController(services.Config{
		NodeName: d.cfg.NodeName, Informers: d.cfg.Informers, Store: d.store, Capacity: d.maps.Capacity(),
		Announcer: d.announcer, Events: d.cfg.Events, Log: d.cfg.Log, Metrics: d.cfg.Metrics,
	})
	if err != nil {
		return err
	}
	if d.policies, err = d.newPolicies(); err != nil {
		return err
	}
	events, err := d.maps.OpenEvents()
	if err != nil {
		return err
	}
	d.log = flows.NewLog(events, d.maps.SetFollowers, d.readFlow, keptFlows, d.cfg.Log)
	if err := d.loader.AttachSockets(d.cfg.CgroupPath); err != nil {
		return err
	}
	if err := d.loader.AttachIngress(); err != nil {
		return err
	}
	if err := d.adoptPods(); err != nil {
		return err
	}
	if !d.loader.Holds() {
		if err := d.loader.RemoveOldMaps(); err != nil {
			return err
		}
	}
	return d.register(ctx)
}

// adoptPods gives the pods that an earlier process attached the programs of this one.
func (d *Dataplane) adoptPods() error {
	indexes, err := d.loader.Pods()
	if err != nil {
		return err
	}
	for _, index := range slices.Compact(slices.Sorted(slices.Values(indexes))) {
		if _, err := net.InterfaceByIndex(index); err != nil {
			d.cfg.Log.Info("the device of a pod is gone, detaching", "ifindex", index)
			if err := d.loader.DetachPod(index); err != nil {
				return err
			}
			continue
		}
		if err := d.loader.AttachPod(index); err != nil {
			return err
		}
	}
	return nil
}

func (d *Dataplane) register(context.Context) error {
	if d.cfg.Metrics == nil {
		return nil
	}
	tracked := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "skep_dataplane_flows", Help: "Flows tracked when last collected.",
	}, func() float64 { p := d.tracked(); return float64(p.Flows() - p.Removed) })
	capacity := d.maps.Capacity()
	pressure := func(name string, used func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "skep_dataplane_map_pressure", Help: "Entries of a BPF map as a share of what fits.", ConstLabels: prometheus.Labels{"map": name},
		}, used)
	}
	evicted := func(protocol string, of func(conntrack.ByProtocol) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "skep_dataplane_conntrack_evictions_total", Help: "Flows that others drove out, for want of room, when last collected.",
			ConstLabels: prometheus.Labels{"protocol": protocol},
		}, func() float64 { return float64(of(d.tracked().Evicted)) })
	}
	collectors := []prometheus.Collector{
		evicted("tcp", func(n conntrack.ByProtocol) uint64 { return n.TCP }), evicted("udp", func(n conntrack.ByProtocol) uint64 { return n.UDP }),
		flows.NewCollector(d.maps.Counters), tracked, d.destroyed,
		pressure("conntrack_tcp", func() float64 { return float64(d.tracked().TCP) / float64(capacity["conntrack_tcp"]) }),
		pressure("conntrack_udp", func() float64 { return float64(d.tracked().UDP) / float64(capacity["conntrack_udp"]) }),
		pressure("endpoints", func() float64 { return float64(d.names.addresses()) / float64(capacity["endpoints"]) }),
	}
	for _, name := range maps.Counted {
		collectors = append(collectors, pressure(name, func() float64 {
			n, err := d.maps.Count(name)
			if err != nil {
				return math.NaN()
			}
			return float64(n) / float64(capacity[name])
		}))
	}
	for _, c := range collectors {
		if err := d.cfg.Metrics.Register(c); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		d.collectors = append(d.collectors, c)
	}
	return nil
}

// tracked is what the last collection of flows found.
func (d *Dataplane) tracked() conntrack.Pass {
	if p := d.flows.Load(); p != nil {
		return *p
	}
	return conntrack.Pass{}
}

// Run keeps the kernel as the API wants it until ctx ends. Programs stay attached.
func (d *Dataplane) Run(ctx context.Context) error {
	defer d.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	gc := &conntrack.Collector{
		Table: d.loader, Lifetimes: conntrack.Defaults, Log: d.cfg.Log, Room: int(d.cfg.ConntrackMax),
		Observe: func(p conntrack.Pass) { d.flows.Store(&p) },
	}
	wg.Go(func() { gc.Run(ctx) })
	e := d.subscribe(ctx)
	wg.Go(func() { d.watchNode(ctx, e) })
	wg.Go(func() { d.waitSynced(ctx) })
	wg.Go(func() { d.watchOrphans(ctx) })
	wg.Go(func() {
		if err := d.log.Run(ctx); err != nil {
			d.cfg.Log.Error("flows are not shown any more", "err", err)
		}
	})
	policies := make(chan error, 1)
	wg.Go(func() {
		policies <- d.policies.Run(ctx)
		cancel()
	})
	err := d.services.Run(ctx)
	cancel()
	if err = errors.Join(err, <-policies); errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (d *Dataplane) waitSynced(ctx context.Context) {
	for _, s := range []<-chan struct{}{d.services.Synced(), d.policies.Synced()} {
		select {
		case <-s:
		case <-ctx.Done():
			return
		}
	}
	if err := d.release(); err != nil {
		d.cfg.Log.Error("programs of an older version could not all be replaced", "err", err)
	}
	close(d.synced)
}

// release puts programs in the place of those of an older version, which were left until the maps said what they should.
func (d *Dataplane) release() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.loader.Holds() {
		return nil
	}
	return errors.Join(d.loader.Release(), d.loader.RemoveOldMaps())
}

// Close releases what this process holds; what is attached stays. Run does it by itself.
func (d *Dataplane) Close() {
	for _, c := range d.collectors {
		d.cfg.Metrics.Unregister(c)
	}
	d.collectors = nil
	d.announcer.close()
	if d.log != nil {
		d.log.Close()
	}
	d.loader.Close()
}

// Services answers which addresses serve a Service.
func (d *Dataplane) Services() *services.Table { return d.services.Table() }

// Synced is closed when every Service and NetworkPolicy known at start is in the kernel.
func (d *Dataplane) Synced() <-chan struct{} { return d.synced }

// FailedServices lists those that could not be written to the kernel and are being retried.
func (d *Dataplane) FailedServices() map[string]error { return d.services.Failed() }

// PolicyProblems lists NetworkPolicies that deny more than they say, and why.
func (d *Dataplane) PolicyProblems() map[types.NamespacedName]string { return d.policies.Problems() }

// ConfigureNode makes device skep0, routes and rules for the node's pod ranges.
func (d *Dataplane) ConfigureNode(ctx context.Context, podCIDRs []netip.Prefix) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.podCIDRs = slices.Clone(podCIDRs)
	return d.configure(ctx, true)
}

// configure is called with mu held.
func (d *Dataplane) configure(ctx context.Context, rules bool) error {
	cfg := network.Config{
		ClusterCIDRs: d.cfg.ClusterCIDRs, ServiceCIDRs: d.cfg.ServiceCIDRs, ServiceAddresses: d.cfg.ClusterDNS, Log: d.cfg.Log,
	}
	var err error
	if rules {
		err = network.Configure(ctx, cfg, d.podCIDRs)
	} else {
		err = network.ConfigureLinks(cfg, d.podCIDRs)
	}
	if err == nil {
		err = d.syncPeersLocked()
	}
	if err == nil {
		err = d.syncNodeLocked()
	}
	if err != nil {
		return fmt.Errorf("node network: %w", err)
	}
	return nil
}

// SteerIngress hands connections to port of any of the node's addresses to l, until l is closed.
func (d *Dataplane) SteerIngress(_ context.Context, port uint16, l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return fmt.Errorf("ingress port %d: %w", port, err)
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = d.maps.SetListener(port, fd) })
	if errors.Is(inner, unix.EOPNOTSUPP) {
		inner = fmt.Errorf("the listener speaks MPTCP, as Go's do by default; make it with net.ListenConfig and SetMultipathTCP(false): %w", inner)
	}
	if err = errors.Join(err, inner); err != nil {
		return fmt.Errorf("ingress port %d: %w", port, err)
	}
	return nil
}

// Cleanup removes every trace of a data plane from the host. dir is where it was pinned; empty for
// api.BPFDir. Repeating it is no error.
func Cleanup(ctx context.Context, dir string) error {
	if dir == "" {
		dir = api.BPFDir
	}
	return errors.Join(loader.Cleanup(dir), network.Cleanup(ctx))
}
