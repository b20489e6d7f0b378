// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/tools"
)

// soak is how long TestFaults goes on with faults in any order; without it, it has each once.
var soak = flag.Duration("soak", 0, "how long TestFaults goes on (make soak)")

// fault is something that happens to one node, while others write and serve.
type fault struct {
	name   string
	victim func(context.Context, *faulty) (*cluster.Node, error)
	// strike lets it happen, and returns when it has; mend, if there is something to mend, undoes it.
	strike, mend func(context.Context, *faulty, *cluster.Node) error
	// silent says that the node cannot be reached after the strike: it is waited for that the others find out.
	silent bool
}

// faults begin with the leader, which at first is the leader in every sense: of the store, and of the controllers.
func faults() []fault {
	cut := func(_ context.Context, _ *faulty, n *cluster.Node) error { return n.Cut() }
	heal := func(_ context.Context, _ *faulty, n *cluster.Node) error { return n.Heal() }
	return []fault{
		{name: "the leader is cut off", victim: leader, strike: cut, mend: heal, silent: true},
		{name: "a server is cut off", victim: follower, strike: cut, mend: heal, silent: true},
		{name: "an agent is cut off", victim: agent, strike: cut, mend: heal, silent: true},
		{name: "the leader is killed", victim: leader, strike: kill, mend: start},
		{name: "an agent is killed", victim: agent, strike: kill, mend: start},
		{name: "a server's disk is full", victim: small, strike: fill, mend: unfill},
		{name: "every node is upgraded", victim: nobody, strike: upgrade},
	}
}

// TestFaults lets one thing after the other happen to a cluster of three servers and two agents. A client writes
// numbered objects meanwhile, and others make requests through a service. Afterwards every acknowledged write is on
// every server, and only connections to a node that could not be reached have failed.
func TestFaults(t *testing.T) {
	b := built(t)
	noDescriptors(t)
	c := newFaulty(t, b)
	all := faults()
	for _, f := range all {
		if ok := t.Run(f.name, func(t *testing.T) { c.suffer(t, f) }); !ok {
			return
		}
	}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	end := time.Now().Add(*soak)
	for n := 1; time.Now().Before(end); n++ {
		f := all[random.IntN(len(all))]
		if ok := t.Run(fmt.Sprintf("%d of seed %d: %s", n, seed, f.name), func(t *testing.T) { c.suffer(t, f) }); !ok {
			return
		}
	}
}

// suffer lets a fault happen and looks at what became of it.
func (c *faulty) suffer(t *testing.T, f fault) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyLimit)
	defer cancel()
	begin := time.Now()
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v\n%s", what, err, c.logs(t))
		}
		t.Logf("%6.1fs %s", time.Since(begin).Seconds(), what)
	}
	victim, err := f.victim(ctx, c)
	check("choose a node", err)
	watcher, home := c.others(victim)
	loads, err := c.startLoads(ctx, home)
	check("begin requests", err)
	defer loads.cancel()
	written, err := startWrites(c.servers)
	check("begin writes", err)
	defer written.cancel()
	check("write before", written.more(ctx))

	check("strike", f.strike(ctx, c, victim))
	check("write after the strike", written.more(ctx))
	if f.silent {
		check("find out", c.waitNodes(ctx, watcher, victim))
		check("go elsewhere", c.waitAnswered(ctx, home))
		check("write when it was found out", written.more(ctx))
	}
	if f.mend != nil {
		check("mend", f.mend(ctx, c, victim))
	}
	check("wait for all nodes", c.waitNodes(ctx, watcher, nil))
	for _, n := range c.servers {
		check("wait for all servers", n.WaitReady(ctx))
	}
	check("write in the end", written.more(ctx))
	check("requests", loads.stop(t, c.ranges(victim, f.silent)))
	check("writes", written.stop(ctx, c.servers))
	t.Logf("%d writes were acknowledged; the client changed servers %d times", len(written.names), written.moved)
}

// faulty is the cluster that things happen to.
type faulty struct {
	servers, agents []*cluster.Node
	bins            [2]string         // binaries of two versions; all nodes run the first
	clusterIP       string            // a service with a pod on every node
	localPort       int32             // the same, by the node that is asked alone
	podRanges       map[string]string // by node
}

// grace is how long a node may be silent here.
const grace = 12 * time.Second

func newFaulty(t *testing.T, b cluster.Built) *faulty {
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyLimit)
	defer cancel()
	dir, err := os.MkdirTemp("", "skep-faults-")
	if err != nil {
		t.Fatal(err)
	}
	c := &faulty{bins: [2]string{b.Bin, os.Getenv("SKEP_OTHER_BIN")}}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if c.bins[1] == "" {
		c.bins[1], err = cluster.BuildVersion(ctx, filepath.Join("..", "..", ".build", "e2e", "other"), otherVersion, "")
		check("build another version", err)
	}
	add := func(name string, of *cluster.Node, peer bool, args ...string) *cluster.Node {
		n, err := cluster.NewNode(ctx, cluster.Options{
			Name: fmt.Sprintf("faults-%d-%s", os.Getpid(), name), Dir: filepath.Join(dir, name),
			Bin: b.Bin, ImagesDir: b.Images, Of: of, Peer: peer, Args: args,
		})
		check("make "+name, err)
		t.Cleanup(func() { endNode(t, n) })
		return n
	}
	first := add("a", nil, false, "--cluster-init", "--node-monitor-grace-period="+grace.String())
	c.servers = []*cluster.Node{first}
	check("start the first server", first.Restart(ctx))
	token := func(args ...string) string {
		out, err := first.Exec(ctx, append([]string{"skep", "token", "create"}, args...)...).Output()
		check("make a token", err)
		return "--token=" + strings.TrimSpace(string(out))
	}
	forServers, forAgents := token("--for-server", "--ttl=1h"), token()
	for _, name := range []string{"b", "c"} {
		n := add(name, first, true, forServers)
		c.servers = append(c.servers, n)
		if name == "c" {
			check("give it a small disk", n.Exec(ctx, "mount", "-t", "tmpfs", "-o", "size=600m", "small", "/var/lib/skep").Run())
			t.Cleanup(func() { // before the node ends, as cleanups are run
				if err := c.takeDown(n); err != nil {
					t.Error(err)
				}
			})
		}
		check("start "+name, n.Restart(ctx))
	}
	for _, name := range []string{"x", "y"} {
		n := add(name, first, false, forAgents)
		c.agents = append(c.agents, n)
		check("start "+name, n.Restart(ctx))
	}
	check("deploy", c.deploy(ctx))
	return c
}

// takeDown ends skep on the server with the small disk, and takes the disk away.
func (c *faulty) takeDown(n *cluster.Node) error {
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	if n.ServerPid() != 0 {
		if err := n.Shutdown(ctx); err != nil {
			return err
		}
	}
	if err := n.Reset(ctx); err != nil {
		return err
	}
	return n.Exec(ctx, "umount", "/var/lib/skep").Run()
}

// deploy makes the service with a pod on every node, and learns its addresses.
func (c *faulty) deploy(ctx context.Context) error {
	apply := c.servers[0].Exec(ctx, "skep", "apply", "-f", "-")
	apply.Stdin = strings.NewReader(faultyApp)
	if out, err := apply.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if err := c.waitNodes(ctx, c.servers[0], nil); err != nil {
		return err
	}
	client, err := c.servers[0].Kubernetes()
	if err != nil {
		return err
	}
	services := client.CoreV1().Services(metav1.NamespaceDefault)
	app, err := services.Get(ctx, "app", metav1.GetOptions{})
	if err != nil {
		return err
	}
	local, err := services.Get(ctx, "local", metav1.GetOptions{})
	if err != nil {
		return err
	}
	c.clusterIP, c.localPort = app.Spec.ClusterIP, local.Spec.Ports[0].NodePort
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	c.podRanges = map[string]string{}
	for i := range nodes.Items {
		c.podRanges[nodes.Items[i].Name] = nodes.Items[i].Spec.PodCIDR
	}
	return c.waitAnswered(ctx, c.agents[0])
}

func (c *faulty) nodes() []*cluster.Node {
	return append(c.servers[:len(c.servers):len(c.servers)], c.agents...)
}

// others are a server and a node that nothing happens to.
func (c *faulty) others(victim *cluster.Node) (watcher, home *cluster.Node) {
	watcher, home = c.servers[0], c.agents[0]
	if victim == watcher {
		watcher = c.servers[1]
	}
	if victim == home {
		home = c.agents[1]
	}
	return watcher, home
}

// waitNodes waits until watcher says that all nodes are Ready and serve, but for the one that is away.
func (c *faulty) waitNodes(ctx context.Context, watcher, away *cluster.Node) error {
	client, err := watcher.Kubernetes()
	if err != nil {
		return err
	}
	return eventually(ctx, func() error {
		nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		slices, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=app"})
		if err != nil {
			return err
		}
		serving := map[string]bool{}
		for i := range slices.Items {
			for _, e := range slices.Items[i].Endpoints {
				if e.NodeName != nil && e.Conditions.Ready != nil && *e.Conditions.Ready {
					serving[*e.NodeName] = true
				}
			}
		}
		if len(nodes.Items) != len(c.nodes()) {
			return fmt.Errorf("%d nodes", len(nodes.Items))
		}
		for i := range nodes.Items {
			n := &nodes.Items[i]
			want := away == nil || n.Name != away.Name
			if ready := isReady(n); ready != want || serving[n.Name] != want {
				return fmt.Errorf("node %s: ready %v, serving %v", n.Name, ready, serving[n.Name])
			}
		}
		return nil
	})
}

func isReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// waitAnswered waits until requests from a node are all answered, and stay so.
func (c *faulty) waitAnswered(ctx context.Context, home *cluster.Node) error {
	round := func() error {
		var report tools.LoadReport
		out, err := home.Tool(ctx, "load", "-kept", "0", "-new", "4", "-count", "200", "http://"+c.clusterIP+"/").Output()
		if err != nil {
			return err
		}
		_, answer, _ := strings.Cut(string(out), "{")
		if err := json.Unmarshal([]byte("{"+answer), &report); err != nil {
			return fmt.Errorf("read the load's report: %w", err)
		}
		if report.Failed > 0 {
			return fmt.Errorf("%+v", report)
		}
		return nil
	}
	if err := eventually(ctx, round); err != nil {
		return err
	}
	return round()
}

// eventually repeats try until it succeeds.
func eventually(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// faultyLoads are clients of the service: some within the cluster, whose connections lead anywhere, and some outside,
// who ask one node for what it has itself.
type faultyLoads struct{ inside, outside *load }

func (c *faulty) startLoads(ctx context.Context, home *cluster.Node) (l faultyLoads, err error) {
	run := func(m *cluster.Machine, url string) (*load, error) {
		ctx, cancel := context.WithCancel(ctx)
		return startLoad(m.Tool(ctx, "load", "-kept", "12", "-new", "2", "-pause", "20ms", url), cancel)
	}
	if l.inside, err = run(home.Machine, "http://"+c.clusterIP+"/"); err != nil {
		return l, err
	}
	l.outside, err = run(home.LAN.Machine, fmt.Sprintf("http://%s/", netip.AddrPortFrom(home.Addrs[0], uint16(c.localPort))))
	return l, err
}

func (l faultyLoads) cancel() {
	for _, one := range []*load{l.inside, l.outside} {
		if one != nil {
			one.cancel()
		}
	}
}

// stop ends the requests. Only those may have failed that led to one of the ranges.
func (l faultyLoads) stop(t *testing.T, ranges []netip.Prefix) error {
	var errs []error
	for name, one := range map[string]*load{"inside": l.inside, "outside": l.outside} {
		report, err := one.stop()
		if err != nil {
			return err
		}
		t.Logf("%s: %d requests over %d connections, %d failed", name, report.Requests, report.Connections, report.Failed)
		if report.Requests == 0 {
			errs = append(errs, fmt.Errorf("%s: there were none", name))
		}
		for peer := range report.Lost {
			if address, err := netip.ParseAddr(peer); err != nil || !within(address, ranges) {
				errs = append(errs, fmt.Errorf("%s: lost to %q, with %v failing: %+v", name, peer, ranges, report))
			}
		}
	}
	return errors.Join(errs...)
}

func within(address netip.Addr, ranges []netip.Prefix) bool {
	for _, r := range ranges {
		if r.Contains(address) {
			return true
		}
	}
	return false
}

// ranges are where connections may be lost to.
func (c *faulty) ranges(victim *cluster.Node, silent bool) []netip.Prefix {
	if !silent {
		return nil
	}
	return []netip.Prefix{netip.MustParsePrefix(c.podRanges[victim.Name])}
}

// logs are the last lines of every node.
func (c *faulty) logs(t *testing.T) string {
	if t.Context().Err() != nil {
		return ""
	}
	var all strings.Builder
	for _, n := range c.nodes() {
		fmt.Fprintf(&all, "%s %s\n", n.Name, n.Tail(25))
	}
	return all.String()
}

// leader is the server that runs controllers and scheduler.
func leader(ctx context.Context, c *faulty) (found *cluster.Node, err error) {
	client, err := c.servers[0].Kubernetes()
	if err != nil {
		return nil, err
	}
	return found, eventually(ctx, func() error {
		lease, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(ctx, "skep-leader", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if lease.Spec.HolderIdentity != nil {
			for _, n := range c.servers {
				if strings.HasPrefix(*lease.Spec.HolderIdentity, n.Name+"_") {
					found = n
					return nil
				}
			}
		}
		return errors.New("nobody holds the lease skep-leader")
	})
}

// follower is a server that does not lead.
func follower(ctx context.Context, c *faulty) (*cluster.Node, error) {
	leads, err := leader(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, n := range c.servers {
		if n != leads {
			return n, nil
		}
	}
	return nil, errors.New("there is one server only")
}

func agent(_ context.Context, c *faulty) (*cluster.Node, error) { return c.agents[0], nil }

// small is the server that has a small disk.
func small(_ context.Context, c *faulty) (*cluster.Node, error) { return c.servers[2], nil }

func nobody(context.Context, *faulty) (*cluster.Node, error) { return nil, nil }

func kill(ctx context.Context, _ *faulty, n *cluster.Node) error { return n.Kill(ctx) }

func start(ctx context.Context, _ *faulty, n *cluster.Node) error { return n.Restart(ctx) }

const filling = "/var/lib/skep/filling"

// fill leaves nothing of a server's disk, and writes until the server says so: its store has room for some while.
func fill(ctx context.Context, c *faulty, n *cluster.Node) error {
	if err := n.Exec(ctx, "sh", "-c", "dd if=/dev/zero of="+filling+" bs=64k 2>/dev/null; test -s "+filling).Run(); err != nil {
		return fmt.Errorf("fill the disk of %s: %w", n.Name, err)
	}
	watcher, _ := c.others(n)
	client, err := watcher.Kubernetes()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		_, err := n.WaitEnded(ctx)
		ended <- err
	}()
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceDefault)
	large := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "large-"}, Data: map[string]string{"x": strings.Repeat("x", 900_000)}}
	for {
		select {
		case err := <-ended:
			return err
		default:
		}
		made, err := maps.Create(ctx, large, metav1.CreateOptions{})
		if err == nil {
			err = maps.Delete(ctx, made.Name, metav1.DeleteOptions{})
		}
		if err == nil {
			continue
		}
		// The one whose disk is full may have led: others are without a leader for a while.
		select {
		case ended := <-ended:
			return ended
		case <-ctx.Done():
			return fmt.Errorf("another server takes no large object: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func unfill(ctx context.Context, _ *faulty, n *cluster.Node) error {
	if err := n.Exec(ctx, "rm", filling).Run(); err != nil {
		return err
	}
	return n.Restart(ctx)
}

// otherVersion is what the other binaries say they are.
const otherVersion = "other"

// upgrade restarts all nodes with the other binaries, one after the other, servers first.
func upgrade(ctx context.Context, c *faulty, _ *cluster.Node) error {
	c.bins[0], c.bins[1] = c.bins[1], c.bins[0]
	for _, n := range c.nodes() {
		if _, err := n.Signal(ctx, unix.SIGTERM); err != nil {
			return err
		}
		n.Bin = c.bins[0]
		if err := n.Restart(ctx); err != nil {
			return fmt.Errorf("with the binaries of %s: %w", n.Bin, err)
		}
	}
	return nil
}

const faultyApp = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: app}
spec:
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      tolerations: [{operator: Exists}]
      containers:
        - name: web
          image: hello:v1
          ports: [{name: http, containerPort: 8080}]
          readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 5, failureThreshold: 5, timeoutSeconds: 10}
---
apiVersion: v1
kind: Service
metadata: {name: app}
spec:
  selector: {app: app}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: NodePort
  externalTrafficPolicy: Local
  selector: {app: app}
  ports: [{port: 80, targetPort: http}]
`
