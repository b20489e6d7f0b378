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
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/tools"
)

// connectionsSection opens connections from a pod: through a ClusterIP, straight to the other pod,
// and between two clean namespaces that no skep and no netfilter rule has touched, in turn.
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
	clean, err := newCleanPair(ctx, b)
	if err != nil {
		return err
	}
	defer clean.close()

	for _, workers := range []int{1, 32} {
		var service, direct, bare []float64
		for range b.samples(7) {
			for _, side := range []struct {
				rates   *[]float64
				address string
				tool    func(args ...string) (*exec.Cmd, error)
			}{
				{&bare, clean.address, clean.tool(ctx)},
				{&direct, server.direct, podTool(ctx, n, client)},
				{&service, server.service, podTool(ctx, n, client)},
			} {
				rate, err := connect(side.tool, workers, side.address)
				if err != nil {
					return err
				}
				*side.rates = append(*side.rates, rate)
			}
		}
		ours := median(service)
		what := fmt.Sprintf("new connections a second through a ClusterIP, %d at a time", workers)
		b.add(what, fmt.Sprintf("%.0f", ours), fmt.Sprintf("direct to the pod %.0f", median(direct)), fmt.Sprintf("%.2f", ours/median(direct)), "")
		b.add(what, fmt.Sprintf("%.0f", ours), fmt.Sprintf("clean namespaces %.0f", median(bare)), fmt.Sprintf("%.2f", ours/median(bare)), "0.95")
	}
	return nil
}

// target is the server pod, by its address and by its service's.
type target struct{ direct, service string }

// twoPods makes a client and a server; it returns the client's UID.
func twoPods(ctx context.Context, n *cluster.Node) (client string, server target, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := awaitServiceAccount(ctx, n); err != nil {
		return "", target{}, err
	}
	api, err := n.Kubernetes()
	if err != nil {
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
	t := target{direct: fmt.Sprintf("%s:%d", addresses["server"], port), service: service.Spec.ClusterIP + ":80"}
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

func connect(tool func(args ...string) (*exec.Cmd, error), workers int, address string) (float64, error) {
	cmd, err := tool("connect", "-for", "2s", "-workers", fmt.Sprint(workers), address)
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

// cleanPair is two machines joined by a veth, with the same server on one.
type cleanPair struct {
	lan     *cluster.LAN
	other   *cluster.Machine
	server  *exec.Cmd
	address string
}

func newCleanPair(ctx context.Context, b *bench) (*cleanPair, error) {
	lan, err := cluster.NewLAN(fmt.Sprintf("bench-clean-%d", os.Getpid()))
	if err != nil {
		return nil, err
	}
	p := &cleanPair{lan: lan}
	if err := p.serve(ctx, filepath.Join(filepath.Dir(b.built.Images), "web")); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *cleanPair) serve(ctx context.Context, web string) error {
	other, addr, err := p.lan.Pair(fmt.Sprintf("bench-other-%d", os.Getpid()))
	if err != nil {
		return err
	}
	p.other, p.address = other, fmt.Sprintf("%s:%d", addr, port)
	p.server = other.Command(ctx, web)
	p.server.Env = append(os.Environ(), "DRAIN_DELAY=0s")
	if err := p.server.Start(); err != nil {
		return err
	}
	if out, err := p.lan.Tool(ctx, "first", p.address).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func (p *cleanPair) tool(ctx context.Context) func(args ...string) (*exec.Cmd, error) {
	return func(args ...string) (*exec.Cmd, error) { return p.lan.Tool(ctx, args[0], args[1:]...), nil }
}

func (p *cleanPair) close() {
	if p.server != nil {
		_ = p.server.Process.Kill()
		_ = p.server.Wait()
	}
	if p.other != nil {
		p.other.Close()
	}
	p.lan.Close()
}
