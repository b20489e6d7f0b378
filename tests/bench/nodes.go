// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
)

// nodesSection measures from pod to pod, on one node and across two, through the tunnel and directly, beside machines on
// bridges between which their hosts route.
func nodesSection(ctx context.Context, b *bench) error {
	bridged, err := cluster.NewBridged(ctx, fmt.Sprintf("bench-bridged-%d", os.Getpid()))
	if err != nil {
		return err
	}
	defer bridged.Close()
	for _, routing := range []string{"vxlan", "direct"} {
		if err := b.twoNodes(ctx, routing, bridged); err != nil {
			return fmt.Errorf("--routing=%s: %w", routing, err)
		}
	}
	return nil
}

func (b *bench) twoNodes(ctx context.Context, routing string, bridged *cluster.Bridged) (err error) {
	name := "nodes-" + routing
	server, err := b.machineOf(ctx, name, cluster.Options{Args: []string{"--routing=" + routing}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Discard(context.WithoutCancel(ctx))) }()
	agent, err := b.machineOf(ctx, name+"-agent", cluster.Options{Of: server})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, agent.Discard(context.WithoutCancel(ctx))) }()
	ready, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	if err := server.Restart(ready); err != nil {
		return err
	}
	token, err := server.Token(ready)
	if err != nil {
		return err
	}
	agent.Args = []string{"--token=" + token}
	if err := agent.Restart(ready); err != nil {
		return err
	}
	client, err := podOn(ready, server, server.Name, "client")
	if err != nil {
		return err
	}
	near, err := podOn(ready, server, server.Name, "near")
	if err != nil {
		return err
	}
	far, err := podOn(ready, server, agent.Name, "far")
	if err != nil {
		return err
	}
	// As in connectionsSection: a busy machine is as busy for all.
	clientAs, err := server.PodAccounts(client.uid)
	if err != nil {
		return err
	}
	for _, s := range []struct {
		machine *cluster.Machine
		node    *cluster.Node
		pod     target
	}{{bridged.NearServer, server, near}, {bridged.FarServer, agent, far}} {
		as, err := s.node.PodAccounts(s.pod.uid)
		if err != nil {
			return err
		}
		web := s.machine.CommandAs(ctx, as, filepath.Join(filepath.Dir(b.built.Images), "web"))
		web.Env = append(os.Environ(), "DRAIN_DELAY=0s")
		if err := web.Start(); err != nil {
			return err
		}
		defer func() {
			_ = web.Process.Kill()
			_ = web.Wait()
		}()
	}
	ours := podTool(ctx, server, client.uid)
	theirs := func(args ...string) (*exec.Cmd, error) {
		return bridged.Client.ToolAs(ctx, clientAs, args[0], args[1:]...), nil
	}
	type way struct{ what, ours, theirs string }
	ways := []way{{"across two nodes, --routing=" + routing, far.direct, fmt.Sprintf("%s:%d", bridged.Far, port)}}
	if routing == "vxlan" { // of one node it makes no difference
		ways = append(ways, way{"on one node", near.direct, fmt.Sprintf("%s:%d", bridged.Near, port)})
	}
	for _, w := range ways {
		for _, cmd := range []func() (*exec.Cmd, error){
			func() (*exec.Cmd, error) { return ours("first", w.ours) }, func() (*exec.Cmd, error) { return theirs("first", w.theirs) },
		} {
			first, err := cmd()
			if err != nil {
				return err
			}
			if out, err := first.CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", w.what, err, out)
			}
		}
		for _, kind := range []struct{ what, flag string }{{"new connections a second", "-kept=false"}, {"requests a second on a kept connection", "-kept"}} {
			var mine, other []float64
			for round := range b.samples(9) {
				sides := []func() error{
					func() (err error) { mine, err = sample(mine, ours, w.ours, kind.flag); return err },
					func() (err error) { other, err = sample(other, theirs, w.theirs, kind.flag); return err },
				}
				if round%2 == 1 {
					slices.Reverse(sides)
				}
				for _, side := range sides {
					if err := side(); err != nil {
						return err
					}
				}
			}
			b.add(fmt.Sprintf("pod to pod %s: %s", w.what, kind.what), fmt.Sprintf("%.0f", median(mine)),
				fmt.Sprintf("bridges and routing, no netfilter %.0f", median(other)), fmt.Sprintf("%.2f", pairedRatio(mine, other)), "1")
		}
	}
	return nil
}

func sample(samples []float64, tool func(args ...string) (*exec.Cmd, error), address, flag string) ([]float64, error) {
	rate, err := connect(tool, address, flag)
	return append(samples, rate), err
}

// podOn makes a web pod on a node and waits until it runs.
func podOn(ctx context.Context, server *cluster.Node, node, name string) (target, error) {
	api, err := server.Kubernetes()
	if err != nil {
		return target{}, err
	}
	if err := awaitServiceAccount(ctx, api); err != nil {
		return target{}, err
	}
	pods := api.CoreV1().Pods(metav1.NamespaceDefault)
	pod := webPod(name)
	pod.Spec.NodeName = node
	events, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return target{}, err
	}
	defer events.Stop()
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return target{}, err
	}
	if err := awaitEvent(ctx, events, isRunning); err != nil {
		return target{}, fmt.Errorf("pod %s: %w", name, err)
	}
	if pod, err = pods.Get(ctx, name, metav1.GetOptions{}); err != nil {
		return target{}, err
	}
	return target{direct: fmt.Sprintf("%s:%d", pod.Status.PodIP, port), uid: string(pod.UID)}, nil
}
