// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"skep.io/skep/tests/cluster"
)

// machinesSection measures what several machines take: to join, to go on without the server that led, and to replace the
// pods of one that is gone.
func machinesSection(ctx context.Context, b *bench) error {
	if err := b.servers(ctx); err != nil {
		return fmt.Errorf("three servers: %w", err)
	}
	for _, s := range []struct{ what, flag, goal string }{
		{"default lease times", "", "45 s"},
		{"--node-monitor-grace-period=10s", "--node-monitor-grace-period=10s", ""},
	} {
		took, err := b.deadNode(ctx, s.flag)
		if err != nil {
			return fmt.Errorf("a dead node, %s: %w", s.what, err)
		}
		b.add("a node is cut off until a pod that tolerates nothing runs elsewhere, "+s.what, seconds(took), "", "", s.goal)
	}
	return nil
}

// fleet are machines of one cluster.
type fleet struct {
	b     *bench
	first *cluster.Node
	all   []*cluster.Node
}

// newFleet starts a cluster's first server.
func (b *bench) newFleet(ctx context.Context, name string, args ...string) (*fleet, error) {
	first, err := b.machineOf(ctx, name, cluster.Options{Args: args})
	if err != nil {
		return nil, err
	}
	f := &fleet{b: b, first: first, all: []*cluster.Node{first}}
	if err := first.Restart(ctx); err != nil {
		return nil, errors.Join(err, f.discard(ctx))
	}
	return f, nil
}

// join adds a machine and says how long it took from the start of its process until its node is Ready.
func (f *fleet) join(ctx context.Context, name string, peer bool) (*cluster.Node, time.Duration, error) {
	n, err := f.b.machineOf(ctx, name, cluster.Options{Of: f.first, Peer: peer})
	if err != nil {
		return nil, 0, err
	}
	f.all = append(f.all, n)
	args := []string{"token", "create"}
	if peer {
		args = append(args, "--for-server", "--ttl=1h")
	}
	token, err := f.first.Exec(ctx, append([]string{"skep"}, args...)...).Output()
	if err != nil {
		return nil, 0, fmt.Errorf("make a token: %w", err)
	}
	n.Args = []string{"--token=" + strings.TrimSpace(string(token))}
	begin := time.Now()
	err = n.Restart(ctx)
	return n, time.Since(begin), err
}

func (f *fleet) discard(ctx context.Context) error {
	var errs []error
	for i := len(f.all) - 1; i >= 0; i-- {
		errs = append(errs, f.all[i].Discard(context.WithoutCancel(ctx)))
	}
	return errors.Join(errs...)
}

// servers measures joining, and the loss of the leader of the store.
func (b *bench) servers(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	f, err := b.newFleet(ctx, "first", "--cluster-init")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.discard(ctx)) }()
	var agents, servers, losses []time.Duration
	for i := range b.samples(5) {
		_, took, err := f.join(ctx, fmt.Sprintf("agent%d", i), false)
		if err != nil {
			return err
		}
		agents = append(agents, took)
	}
	b.add("join: an agent's start until its node is Ready, median", seconds(median(agents)), "", "", "2 s")
	peers := []*cluster.Node{f.first}
	for i := range 2 {
		n, took, err := f.join(ctx, fmt.Sprintf("peer%d", i), true)
		if err != nil {
			return err
		}
		servers, peers = append(servers, took), append(peers, n)
	}
	b.add("join: a second and a third server's start until its node is Ready, the slower", seconds(max(servers[0], servers[1])), "", "", "")
	for range b.samples(5) {
		took, err := loseLeader(ctx, peers)
		if err != nil {
			return err
		}
		losses = append(losses, took)
	}
	b.add("the store's leader of three is killed until a write is accepted, median", seconds(median(losses)), "", "", "3 s")
	return nil
}

// writeTry bounds one attempt to write, and with it how much later than possible the one is that succeeds.
const writeTry = 200 * time.Millisecond

// loseLeader kills the server that leads the store, writes through another until that is accepted, and starts it again.
func loseLeader(ctx context.Context, servers []*cluster.Node) (took time.Duration, err error) {
	list, err := servers[0].Exec(ctx, "skep", "member", "list").Output()
	if err != nil {
		return 0, fmt.Errorf("ask who leads: %w", err)
	}
	var leader, other *cluster.Node
	for _, n := range servers {
		if strings.Contains(lineOf(string(list), n.Name), " leader ") {
			leader = n
		} else {
			other = n
		}
	}
	if leader == nil {
		return 0, fmt.Errorf("nobody leads:\n%s", list)
	}
	client, err := other.Kubernetes()
	if err != nil {
		return 0, err
	}
	write := func() error {
		try, cancel := context.WithTimeout(ctx, writeTry)
		defer cancel()
		_, err := client.CoreV1().ConfigMaps(metav1.NamespaceDefault).Create(try, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "loss-"}}, metav1.CreateOptions{})
		return err
	}
	for write() != nil { // its connections are open
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	if err := leader.Kill(ctx); err != nil {
		return 0, err
	}
	begin := time.Now()
	for err := write(); err != nil; err = write() {
		if ctx.Err() != nil {
			return 0, fmt.Errorf("no write is accepted: %w", err)
		}
	}
	took = time.Since(begin)
	return took, leader.Restart(ctx)
}

// lineOf is the line of a table that begins with a name.
func lineOf(table, name string) string {
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, name+" ") {
			return line
		}
	}
	return ""
}

// deadNode cuts a node off and measures until its pod runs on another.
func (b *bench) deadNode(ctx context.Context, flag string) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	var args []string
	name := "grace"
	if flag != "" {
		args, name = []string{flag}, "short"
	}
	f, err := b.newFleet(ctx, name, args...)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.discard(ctx)) }()
	api, err := f.first.Kubernetes()
	if err != nil {
		return 0, err
	}
	// The server's own node is not to have it.
	if _, err := api.CoreV1().Nodes().Patch(ctx, f.first.Name, types.MergePatchType, []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{}); err != nil {
		return 0, err
	}
	agents := map[string]*cluster.Node{}
	for _, agent := range []string{name + "-x", name + "-y"} {
		n, _, err := f.join(ctx, agent, false)
		if err != nil {
			return 0, err
		}
		agents[n.Name] = n
	}
	if err := awaitServiceAccount(ctx, api); err != nil {
		return 0, err
	}
	pods, err := api.CoreV1().Pods(metav1.NamespaceDefault).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, err
	}
	defer pods.Stop()
	deployment := webDeployment("web")
	now := int64(0)
	for _, taint := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
		deployment.Spec.Template.Spec.Tolerations = append(deployment.Spec.Template.Spec.Tolerations,
			corev1.Toleration{Key: taint, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &now})
	}
	if _, err := api.AppsV1().Deployments(metav1.NamespaceDefault).Create(ctx, deployment, metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	on := ""
	runsBeside := func(dead string) func(watch.Event) bool {
		return func(e watch.Event) bool {
			pod, ok := e.Object.(*corev1.Pod)
			if ok && pod.Status.Phase == corev1.PodRunning && pod.Spec.NodeName != dead {
				on = pod.Spec.NodeName
			}
			return on != "" && on != dead
		}
	}
	if err := awaitEvent(ctx, pods, runsBeside("")); err != nil {
		return 0, err
	}
	dead := agents[on]
	if dead == nil {
		return 0, fmt.Errorf("the pod runs on %s, which is no agent", on)
	}
	if err := dead.Cut(); err != nil {
		return 0, err
	}
	begin := time.Now()
	err = awaitEvent(ctx, pods, runsBeside(dead.Name))
	return time.Since(begin), err
}
