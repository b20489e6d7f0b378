// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"skep.io/skep/api"
)

// Options of one node.
type Options struct {
	Name      string   // the host name; unique on the machine
	Dir       string   // gets data/, log/ and server.log; survives the node
	Bin       string   // directory of skep and the shim
	ImagesDir string   // archives to import at start; may be empty
	Args      []string // further arguments of `skep server` or `skep agent`
	Of        *Node    // the server whose cluster this node joins, on its LAN; nil: the first server
	Peer      bool     // join Of's cluster as another server, and not as an agent
	LAN       *LAN     // to share one with other nodes; nil: an own one, closed by Stop
	Server    []string // what to run in place of `Bin/skep server`
}

// Node is a machine that runs skep.
type Node struct {
	*Machine
	Options
	Addrs []netip.Addr // on the LAN, IPv4 first

	ownLAN bool
	gone   bool // torn down
	before leakList
	server int // pid, 0 when it does not run
	client *kubernetes.Clientset
}

// Start makes the machine and starts the server. It does not wait until the server is ready: see WaitReady.
// When it fails, nothing is left.
func Start(ctx context.Context, o Options) (*Node, error) {
	n, err := NewNode(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := n.StartServer(); err != nil {
		return nil, errors.Join(err, n.tearDown(ctx))
	}
	return n, nil
}

// NewNode makes the machine only.
func NewNode(ctx context.Context, o Options) (*Node, error) {
	n := &Node{Options: o}
	var err error
	if n.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	for _, sub := range []string{"data", "log"} {
		if err := os.MkdirAll(filepath.Join(n.Dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("make node directory: %w", err)
		}
	}
	if n.Of != nil {
		n.LAN = n.Of.LAN
	}
	if n.LAN == nil {
		if n.LAN, err = NewLAN(o.Name + "-lan"); err != nil {
			return nil, err
		}
		n.ownLAN = true
	}
	n.Machine, err = newMachine(o.Name, setup{
		Data:  filepath.Join(n.Dir, "data"),
		Logs:  filepath.Join(n.Dir, "log"),
		Hosts: "127.0.0.1 localhost\n::1 localhost\n",
	}, true)
	if err != nil {
		n.closeLAN()
		return nil, err
	}
	if n.Addrs, err = n.LAN.join(n.Machine); err != nil {
		return nil, errors.Join(err, n.tearDown(ctx))
	}
	if n.before, err = n.leaks(ctx); err != nil {
		return nil, errors.Join(err, n.tearDown(ctx))
	}
	return n, nil
}

// Client is the address of the client outside the cluster, IPv4 first.
func (n *Node) Client() []netip.Addr { return n.LAN.address(1) }

// Outside prepares a command on the client's machine.
func (n *Node) Outside(ctx context.Context, argv ...string) *exec.Cmd {
	return n.LAN.Command(ctx, argv...)
}

// Env is what commands on the node get: its binaries first, no configuration of the developer's.
func (n *Node) Env() []string {
	return []string{
		"PATH=" + n.Bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/var/home", "LANG=C.UTF-8", "TERM=dumb",
	}
}

// Exec prepares a command on the node; kubectl finds the cluster.
func (n *Node) Exec(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := n.Command(ctx, argv...)
	cmd.Env = n.Env()
	if filepath.Base(argv[0]) != "skep" {
		cmd.Env = append(cmd.Env, "KUBECONFIG="+api.KubeconfigPath)
	}
	// exec looks the command up before the namespaces change; the helper does it again after.
	return cmd
}

// LogPath is the server's output, over all its starts.
func (n *Node) LogPath() string { return filepath.Join(n.Dir, "server.log") }

// ServerPid is 0 when no server runs.
func (n *Node) ServerPid() int { return n.server }

// StartServer starts the server, which must not be running.
func (n *Node) StartServer() error {
	if n.server != 0 {
		return fmt.Errorf("node %s: the server runs already", n.Name)
	}
	argv := slices.Clone(n.Server)
	if argv == nil {
		argv = []string{filepath.Join(n.Bin, "skep"), "server"}
		switch {
		case n.Peer:
			argv = append(argv, "--join", n.Of.URL())
		case n.Of != nil:
			argv = append(argv[:1], "agent", "--server", n.Of.URL())
		}
		if n.ImagesDir != "" {
			argv = append(argv, "--images-dir", n.ImagesDir)
		}
		// How full the disk of whoever runs the tests is says nothing of skep; n.Args may want more.
		argv = append(argv, "--eviction-hard=memory.available<50Mi")
	}
	argv = append(argv, n.Args...)
	pid, err := n.spawn(request{Argv: argv, Env: n.Env(), Out: n.LogPath()})
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	n.server, n.client = pid, nil
	return nil
}

// URL is where a server's API is reached on the LAN.
func (n *Node) URL() string {
	return fmt.Sprintf("https://%s", netip.AddrPortFrom(n.Addrs[0], api.DefaultAPIPort))
}

// Token makes a token with which agents can join the server's cluster.
func (n *Node) Token(ctx context.Context) (string, error) {
	out, err := n.Exec(ctx, "skep", "token", "create", "--ttl", "1h").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("node %s: skep token create: %w\n%s", n.Name, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// Config reaches the API server from the calling process as the administrator.
func (n *Node) Config() (*rest.Config, error) {
	if n.Of != nil && !n.Peer {
		return n.Of.Config()
	}
	raw, err := os.ReadFile(n.Path(api.KubeconfigPath))
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(raw)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	config.Dial = n.Dial
	config.QPS, config.Burst = -1, 0
	return config, nil
}

// Kubernetes is a client of the node's API server.
func (n *Node) Kubernetes() (*kubernetes.Clientset, error) {
	if n.Of != nil && !n.Peer {
		return n.Of.Kubernetes()
	}
	if n.client != nil {
		return n.client, nil
	}
	config, err := n.Config()
	if err != nil {
		return nil, err
	}
	n.client, err = kubernetes.NewForConfig(config)
	return n.client, err
}

// WaitServing returns once the API server answers /readyz with ok.
func (n *Node) WaitServing(ctx context.Context) error {
	return n.await(ctx, "the API server to serve", func(ctx context.Context) error {
		client, err := n.Kubernetes()
		if err != nil {
			return err
		}
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// WaitReady returns once the node's object says Ready.
func (n *Node) WaitReady(ctx context.Context) error {
	if err := n.WaitServing(ctx); err != nil {
		return err
	}
	return n.await(ctx, "the node to be Ready", func(ctx context.Context) error {
		client, err := n.Kubernetes()
		if err != nil {
			return err
		}
		node, err := client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions of node %s: %+v", n.Name, node.Status.Conditions)
	})
}

// await looks until try succeeds, the server ends or ctx does.
func (n *Node) await(ctx context.Context, what string, try func(context.Context) error) error {
	done := n.exited.done(n.server)
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-done:
			how := n.exited.how(n.server)
			n.server = 0
			return fmt.Errorf("node %s: waiting for %s: the server ended with %s\n%s", n.Name, what, how, n.Tail(40))
		case <-ctx.Done():
			return fmt.Errorf("node %s: waiting for %s: %w, last: %w\n%s", n.Name, what, ctx.Err(), err, n.Tail(40))
		case <-time.After(pollEvery):
		}
	}
}

// Signal sends a signal to the server alone and, for one that ends it, waits until it is gone. It
// returns how the process ended.
func (n *Node) Signal(ctx context.Context, sig unix.Signal) (string, error) {
	if n.server == 0 {
		return "", fmt.Errorf("node %s: no server runs", n.Name)
	}
	if err := unix.Kill(n.server, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return "", fmt.Errorf("signal server: %w", err)
	}
	return n.WaitEnded(ctx)
}

// WaitEnded returns how the server ended, once it did so by itself.
func (n *Node) WaitEnded(ctx context.Context) (string, error) {
	select {
	case <-n.exited.done(n.server):
	case <-ctx.Done():
		return "", fmt.Errorf("node %s: waiting for the server to end: %w\n%s", n.Name, ctx.Err(), n.Tail(40))
	}
	how := n.exited.how(n.server)
	n.server, n.client = 0, nil
	return how, nil
}

// Kill ends the server as a crash would. Its containers go on.
func (n *Node) Kill(ctx context.Context) error {
	_, err := n.Signal(ctx, unix.SIGKILL)
	return err
}

// Restart starts the server again and waits until the node is Ready.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.StartServer(); err != nil {
		return err
	}
	return n.WaitReady(ctx)
}

// EnsureReady starts the server if it has ended by itself, and waits until the node is Ready.
func (n *Node) EnsureReady(ctx context.Context) error {
	if n.server != 0 {
		select {
		case <-n.exited.done(n.server):
			n.server, n.client = 0, nil
		default:
		}
	}
	if n.server == 0 {
		return n.Restart(ctx)
	}
	return n.WaitReady(ctx)
}

// Shutdown asks the server to end, and is an error when it ends with a failure.
func (n *Node) Shutdown(ctx context.Context) error {
	how, err := n.Signal(ctx, unix.SIGTERM)
	if err != nil {
		return err
	}
	if how != "exit status 0" {
		return fmt.Errorf("node %s: the server ended with %s after SIGTERM\n%s", n.Name, how, n.Tail(40))
	}
	return nil
}

// Reset runs `skep reset`.
func (n *Node) Reset(ctx context.Context) error {
	out, err := n.Exec(ctx, "skep", "reset", "--yes").CombinedOutput()
	if err != nil {
		return fmt.Errorf("node %s: skep reset: %w\n%s", n.Name, err, out)
	}
	return nil
}

// Tail is the end of the server's log.
func (n *Node) Tail(lines int) string {
	raw, err := os.ReadFile(n.LogPath())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(raw), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return "--- server.log\n" + strings.Join(all, "\n") + "\n---"
}

// Diagnose tells what somebody would want to know after a failure, about one namespace or, with
// "", all of them.
func (n *Node) Diagnose(ctx context.Context, namespace string) string {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	where := []string{"-A"}
	if namespace != "" {
		where = []string{"-n", namespace}
	}
	var b strings.Builder
	for _, command := range [][]string{
		{"get", "nodes,pods,deployments,replicasets,services,endpointslices,ingresses", "-o", "wide"},
		{"describe", "pods"},
		{"get", "events", "--sort-by=.metadata.creationTimestamp"},
	} {
		argv := append(append([]string{"skep", "--request-timeout=5s"}, command...), where...)
		out, err := n.Exec(ctx, argv...).CombinedOutput()
		fmt.Fprintf(&b, "--- %s\n%s", strings.Join(argv, " "), out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	b.WriteString(n.Tail(80))
	return b.String()
}
