// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"skep.io/skep/api"
	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/leaks"
)

// build makes binaries and images once for all tests of the package.
var build = sync.OnceValues(func() (cluster.Built, error) {
	return cluster.Build(context.Background(), filepath.Join("..", "..", ".build", "e2e"))
})

func built(t *testing.T) cluster.Built {
	t.Helper()
	cluster.Need(t)
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// noDescriptors fails the test if it ends with more open files than it began with.
func noDescriptors(t *testing.T) {
	before, err := leaks.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		after, err := leaks.Descriptors()
		if err != nil {
			t.Fatal(err)
		}
		if leaked := leaks.New(before, after); len(leaked) > 0 {
			t.Errorf("left open: %q", leaked)
		}
	})
}

// TestScripts runs testdata/shared, all on one node.
func TestScripts(t *testing.T) {
	b := built(t)
	noDescriptors(t)
	ctx := context.Background() // the test's own ends before its clean-up
	n, err := newNode(ctx, b, "shared", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := n.StartServer(); err != nil {
		t.Fatal(err)
	}
	ready, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	if err := n.WaitReady(ready); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                "testdata/shared",
		WorkdirRoot:        t.TempDir(), // testscript's own stays when -run leaves scripts out
		RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			s := &script{node: n, namespace: "e2e-" + filepath.Base(env.WorkDir)[len("script-"):]}
			env.Values[scriptKey{}] = s
			env.Setenv("NS", s.namespace)
			s.environment(env.Setenv)
			env.Defer(func() { s.end(env) })
			return s.ownNamespace(ctx, env)
		},
		Cmds: commands(),
	})
}

// TestOwn runs testdata/own; each script makes the nodes it needs.
func TestOwn(t *testing.T) { ownScripts(t, built(t), "testdata/own", nil) }

// ownScripts runs scripts that make their nodes, each with the variables in its environment.
func ownScripts(t *testing.T, b cluster.Built, scripts string, variables map[string]string) {
	noDescriptors(t)
	testscript.Run(t, testscript.Params{
		Dir:                scripts,
		WorkdirRoot:        t.TempDir(),
		RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			name := filepath.Base(env.WorkDir)[len("script-"):]
			// Not below $WORK, which is gone before the node is.
			dir, err := os.MkdirTemp("", "skep-e2e-")
			if err != nil {
				return err
			}
			s := &script{own: true, newNode: func(args []string) (*cluster.Node, error) {
				return newNode(context.Background(), b, name, dir, args...)
			}}
			s.newAgent = func(agent string, peer bool) (*cluster.Node, error) {
				return cluster.NewNode(context.Background(), cluster.Options{
					Name: s.node.Name + "-" + agent, Dir: filepath.Join(dir, agent), Bin: b.Bin, ImagesDir: b.Images, Of: s.node, Peer: peer,
				})
			}
			env.Values[scriptKey{}] = s
			for key, value := range variables {
				env.Setenv(key, value)
			}
			env.Defer(func() {
				s.end(env)
				if err := os.RemoveAll(dir); err != nil {
					env.T().(testing.TB).Error(err)
				}
			})
			return nil
		},
		Cmds: commands(),
	})
}

// endNode removes a node. After a failure its leaks are not the story.
func endNode(t testing.TB, n *cluster.Node) {
	stop := n.Stop
	if t.Failed() {
		if n.Of != nil {
			t.Log(n.Name, n.Tail(40))
		}
		stop = n.Discard
	}
	if err := stop(context.Background()); err != nil {
		t.Error(err)
	}
}

// scriptKey finds the script's state.
type scriptKey struct{}

// script is what one script works on.
type script struct {
	node      *cluster.Node
	own       bool
	newNode   func(args []string) (*cluster.Node, error)
	newAgent  func(name string, peer bool) (*cluster.Node, error)
	writes    *writes
	agents    map[string]*cluster.Node
	namespace string
	loads     map[string]*load
	snapshot  cluster.Snapshot
	stopped   bool
}

// environment tells the script's programs where the machines are.
func (s *script) environment(set func(key, value string)) {
	set(nodeEnv, s.node.Place())
	set(outsideEnv, s.node.LAN.Place())
	set(kubectlEnv, os.Getenv(kubectlEnv))
	for _, kv := range s.node.Env() {
		key, value, _ := strings.Cut(kv, "=")
		if key == "PATH" {
			key = pathEnv
		}
		set(key, value)
	}
	if dir, err := filepath.Abs(filepath.Join("..", "..", "examples")); err == nil {
		set("EXAMPLES", dir)
	}
	set("NODE", s.node.Name)
	set("NODE_IP", s.node.Addrs[0].String())
	set("NODE_IP6", s.node.Addrs[1].String())
	set("CLIENT_IP", s.node.Client()[0].String())
	set("CLIENT_IP6", s.node.Client()[1].String())
}

// ownNamespace makes the script's namespace, and a kubeconfig that defaults to it.
func (s *script) ownNamespace(ctx context.Context, env *testscript.Env) error {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	client, err := s.node.Kubernetes()
	if err != nil {
		return err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.namespace}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("make the script's namespace: %w", err)
	}
	raw, err := os.ReadFile(s.node.Path(api.KubeconfigPath))
	if err != nil {
		return err
	}
	config, err := clientcmd.Load(raw)
	if err != nil {
		return err
	}
	for _, c := range config.Contexts {
		c.Namespace = s.namespace
	}
	path := filepath.Join(env.WorkDir, ".kubeconfig")
	env.Setenv("KUBECONFIG", path)
	return clientcmd.WriteToFile(*config, path)
}

// pause keeps a failed script's node for somebody to look at: with SKEP_E2E_PAUSE=FILE, until that
// person removes FILE. It holds what EnterFrom needs: see tests/cluster/skep-cluster.
func pause(t testing.TB, n *cluster.Node) {
	path := os.Getenv("SKEP_E2E_PAUSE")
	if path == "" {
		return
	}
	if err := os.WriteFile(path, []byte(n.Place()), 0o600); err != nil {
		t.Error(err)
		return
	}
	for {
		if _, err := os.Stat(path); err != nil {
			return
		}
		time.Sleep(time.Second)
	}
}

// end says what was the matter, and removes what the script made.
func (s *script) end(env *testscript.Env) {
	t := env.T().(testing.TB)
	ctx := context.Background()
	for name, l := range s.loads {
		l.cancel()
		t.Errorf("load %s was never stopped", name)
	}
	if s.writes != nil {
		s.writes.cancel()
		t.Error("writes were never stopped")
	}
	if s.node == nil {
		return
	}
	if t.Failed() && !s.stopped {
		t.Log(s.node.Diagnose(ctx, s.namespace))
		pause(t, s.node)
	}
	if s.own {
		for _, a := range s.agents {
			endNode(t, a)
		}
		endNode(t, s.node)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	client, err := s.node.Kubernetes()
	if err != nil {
		t.Error(err)
		return
	}
	now := int64(0)
	_ = client.CoreV1().Pods(s.namespace).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{})
	if err := client.CoreV1().Namespaces().Delete(ctx, s.namespace, metav1.DeleteOptions{}); err != nil {
		t.Errorf("delete the script's namespace: %v", err)
	}
}
