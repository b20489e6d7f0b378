// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/tools"
)

// connectionsSection opens connections from a pod: through a ClusterIP, straight to the other pod, and
// between clean namespaces, in turn.
func connectionsSection(ctx context.Context, b *bench) (err error) {
	n, err := b.node(ctx, "connections")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	client, server, err := twoPods(ctx, n)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
	}
	clean, err := newCleanServer(ctx, b, n, client, server.uid)
	if err != nil {
		return err
	}
	defer clean.close()

	for _, workers := range []int{1, 32} {
		var service, direct, pair, routed []float64
		sides := []struct {
			rates   *[]float64
			address string
			tool    func(args ...string) (*exec.Cmd, error)
		}{
			{&pair, clean.direct, clean.tool(ctx)},
			{&routed, clean.routed, clean.tool(ctx)},
			{&direct, server.direct, podTool(ctx, n, client)},
			{&service, server.service, podTool(ctx, n, client)},
		}
		for round := range b.samples(16) {
			// Each comes first, and after each other, equally often: what a run leaves behind is nobody's in particular.
			order := slices.Concat(sides[round%len(sides):], sides[:round%len(sides)])
			if round/len(sides)%2 == 1 {
				slices.Reverse(order)
			}
			for _, side := range order {
				rate, err := connect(side.tool, side.address, "-workers", fmt.Sprint(workers))
				if err != nil {
					return err
				}
				*side.rates = append(*side.rates, rate)
			}
		}
		ours := median(service)
		what := fmt.Sprintf("new connections a second through a ClusterIP, %d at a time", workers)
		for _, beside := range []struct {
			name  string
			rates []float64
			goal  string
		}{
			{"direct to the pod", direct, ""},
			{"clean namespaces with a router between them, no netfilter", routed, ""},
			{"clean namespaces on one veth pair, no netfilter", pair, "0.95"},
		} {
			b.add(what, fmt.Sprintf("%.0f", ours), fmt.Sprintf("%s %.0f", beside.name, median(beside.rates)),
				fmt.Sprintf("%.2f", pairedRatio(service, beside.rates)), beside.goal)
		}
	}
	return nil
}

// target is the server pod, by its address and by its service's.
type target struct{ direct, service, uid string }

// twoPods makes a client and a server; it returns the client's UID.
func twoPods(ctx context.Context, n *cluster.Node) (client string, server target, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	api, err := n.Kubernetes()
	if err != nil {
		return "", target{}, err
	}
	if err := awaitServiceAccount(ctx, api); err != nil {
		return "", target{}, err
	}
	const ns = metav1.NamespaceDefault
	uids, addresses := map[string]string{}, map[string]string{}
	for _, name := range []string{"client", "server"} {
		events, err := api.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		if err != nil {
			return "", target{}, err
		}
		if _, err := api.CoreV1().Pods(ns).Create(ctx, webPod(name), metav1.CreateOptions{}); err != nil {
			return "", target{}, err
		}
		err = awaitEvent(ctx, events, isRunning)
		events.Stop()
		if err != nil {
			return "", target{}, fmt.Errorf("pod %s: %w", name, err)
		}
		pod, err := api.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", target{}, err
		}
		uids[name], addresses[name] = string(pod.UID), pod.Status.PodIP
	}
	service, err := api.CoreV1().Services(ns).Create(ctx, webService("server", "server", ""), metav1.CreateOptions{})
	if err != nil {
		return "", target{}, err
	}
	t := target{direct: fmt.Sprintf("%s:%d", addresses["server"], port), service: service.Spec.ClusterIP + ":80", uid: uids["server"]}
	for _, address := range []string{t.direct, t.service} {
		cmd, err := n.PodTool(ctx, uids["client"], "first", address)
		if err != nil {
			return "", target{}, err
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", target{}, fmt.Errorf("%w: %s", err, out)
		}
	}
	return uids["client"], t, nil
}

func podTool(ctx context.Context, n *cluster.Node, uid string) func(args ...string) (*exec.Cmd, error) {
	return func(args ...string) (*exec.Cmd, error) { return n.PodTool(ctx, uid, args[0], args[1:]...) }
}

func connect(tool func(args ...string) (*exec.Cmd, error), address string, flags ...string) (float64, error) {
	cmd, err := tool(slices.Concat([]string{"connect", "-for", "1s"}, flags, []string{address})...)
	if err != nil {
		return 0, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("connect to %s: %w: %s", address, err, &stderr)
	}
	var rate tools.Rate
	if err := json.Unmarshal(out, &rate); err != nil {
		return 0, err
	}
	if rate.Failed > 0 {
		return 0, fmt.Errorf("%d of %d connections to %s failed: %s", rate.Failed, rate.Failed+rate.Connections, address, rate.LastError)
	}
	return rate.PerSecond(), nil
}

// cleanServer is machines without skep, with the same server on one. Client and server are accounted to
// the pods' cgroups: a busy machine is as busy for them, and their sockets' memory is charged as a pod's.
type cleanServer struct {
	*cluster.Clean
	clientAs       []string // cgroups
	server         *exec.Cmd
	direct, routed string
}

func newCleanServer(ctx context.Context, b *bench, n *cluster.Node, client, server string) (*cleanServer, error) {
	clientAs, err := n.PodAccounts(client)
	if err != nil {
		return nil, err
	}
	serverAs, err := n.PodAccounts(server)
	if err != nil {
		return nil, err
	}
	machines, err := cluster.NewClean(ctx, fmt.Sprintf("bench-%d", os.Getpid()))
	if err != nil {
		return nil, err
	}
	c := &cleanServer{
		Clean: machines, clientAs: clientAs,
		direct: fmt.Sprintf("%s:%d", machines.Direct, port), routed: fmt.Sprintf("%s:%d", machines.Routed, port),
	}
	c.server = c.Server.CommandAs(ctx, serverAs, filepath.Join(filepath.Dir(b.built.Images), "web"))
	c.server.Env = append(os.Environ(), "DRAIN_DELAY=0s")
	if err := c.server.Start(); err != nil {
		c.Close()
		return nil, err
	}
	for _, address := range []string{c.direct, c.routed} {
		if out, err := c.Client.ToolAs(ctx, clientAs, "first", address).CombinedOutput(); err != nil {
			c.close()
			return nil, fmt.Errorf("%w: %s", err, out)
		}
	}
	return c, nil
}

func (c *cleanServer) tool(ctx context.Context) func(args ...string) (*exec.Cmd, error) {
	return func(args ...string) (*exec.Cmd, error) {
		return c.Client.ToolAs(ctx, c.clientAs, args[0], args[1:]...), nil
	}
}

func (c *cleanServer) close() {
	_ = c.server.Process.Kill()
	_ = c.server.Wait()
	c.Close()
}
