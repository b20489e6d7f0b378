// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"skep.io/skep/tests/cluster"
)

// plane is a control plane that is measured: skep's or upstream's, each alone on a machine.
type plane struct {
	client *kubernetes.Clientset
	use    func() (cluster.ProcessUse, error)
}

// sizes of the section's measurements.
type sizes struct {
	nodes    int // Node objects that pods are scheduled onto
	pods     int // scheduled of each kind
	replicas int // of the Deployment
	creates  int
	probes   int   // of watch delivery
	held     []int // pods of which the memory is looked at
}

// patience is how long nodes may be silent, that are nothing but objects.
const patience = "1h"

// controlSection measures the control plane alone, beside upstream's: nodes are objects, and one watch in this process
// plays all their kubelets.
func controlSection(ctx context.Context, b *bench) (err error) {
	if err := decisions(ctx, b); err != nil {
		return err
	}
	theirs, err := b.newUpstream(ctx, "control-upstream")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, theirs.stop()) }()
	if _, _, err := theirs.start(ctx); err != nil {
		return err
	}
	n, err := b.node(ctx, "control", "--node-monitor-grace-period="+patience)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	ours, other, err := planes(ctx, n, theirs)
	if err != nil {
		return err
	}
	size := sizes{nodes: 1000, pods: 2000, replicas: 1000, creates: 5000, probes: 300, held: []int{10_000, 50_000}}
	if b.quick {
		size = sizes{nodes: 100, pods: 200, replicas: 100, creates: 500, probes: 50, held: []int{1000}}
	}
	for _, measure := range []func(context.Context, *bench, sizes, plane, plane) error{writes, deliveries, scheduling, oneDeployment, memory} {
		if err := measure(ctx, b, size, ours, other); err != nil {
			return err
		}
	}
	return nil
}

func planes(ctx context.Context, n *cluster.Node, theirs *upstream) (ours, other plane, err error) {
	config, err := n.Config()
	if err != nil {
		return ours, other, err
	}
	upstreamConfig := rest.CopyConfig(theirs.config)
	upstreamConfig.Dial = theirs.machine.Dial
	if ours.client, err = binaryClient(config); err != nil {
		return ours, other, err
	}
	if other.client, err = binaryClient(upstreamConfig); err != nil {
		return ours, other, err
	}
	ours.use = func() (cluster.ProcessUse, error) { return cluster.UseOf(n.ServerPid()) }
	other.use = theirs.use
	// The one real node is to run none of the pods.
	_, err = ours.client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{})
	return ours, other, err
}

func binaryClient(config *rest.Config) (*kubernetes.Clientset, error) {
	config.QPS, config.Burst = -1, 0
	config.ContentType, config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	return kubernetes.NewForConfig(config)
}

// both measures one after the other, and adds a row of rates.
func both(b *bench, what, goal string, ours, other plane, rate func(plane) (float64, error)) error {
	mine, err := rate(ours)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	beside, err := rate(other)
	if err != nil {
		return fmt.Errorf("upstream, %s: %w", what, err)
	}
	b.add(what, fmt.Sprintf("%.0f", mine), fmt.Sprintf("upstream %.0f", beside), fmt.Sprintf("%.2f", mine/beside), goal)
	return nil
}

// clients is how many write at once.
const clients = 50

// inParallel calls do for 0 to n-1, so many at once as there are clients.
func inParallel(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next, done := make(chan int), make(chan struct{})
	for range clients {
		go func() {
			defer func() { done <- struct{}{} }()
			for i := range next {
				if err := do(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		}()
	}
feed:
	for i := range n {
		select {
		case next <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(next)
	for range clients {
		<-done
	}
	return context.Cause(ctx)
}

// writes is how many objects 50 clients create in a second.
func writes(ctx context.Context, b *bench, size sizes, ours, other plane) error {
	return both(b, "API: objects created a second, 50 clients", "2500", ours, other, func(p plane) (float64, error) {
		maps := p.client.CoreV1().ConfigMaps(metav1.NamespaceDefault)
		begin := time.Now()
		err := inParallel(ctx, size.creates, func(ctx context.Context, i int) error {
			_, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("write-", i)}}, metav1.CreateOptions{})
			return err
		})
		return float64(size.creates) / time.Since(begin).Seconds(), err
	})
}

// deliveries is how long an event takes from the beginning of the write that it is about, and from the write's answer.
func deliveries(ctx context.Context, b *bench, size sizes, ours, other plane) error {
	var all [2][]time.Duration
	for i, p := range []plane{ours, other} {
		maps := p.client.CoreV1().ConfigMaps(metav1.NamespaceDefault)
		events, err := maps.Watch(ctx, metav1.ListOptions{LabelSelector: "bench=probe"})
		if err != nil {
			return err
		}
		for j := range size.probes {
			name := fmt.Sprint("probe-", j)
			begin := time.Now()
			if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"bench": "probe"}}}, metav1.CreateOptions{}); err != nil {
				return err
			}
			for seen := false; !seen; {
				event, ok := <-events.ResultChan()
				if !ok {
					return errors.New("the watch ended")
				}
				object, is := event.Object.(metav1.Object)
				seen = is && object.GetName() == name
			}
			all[i] = append(all[i], time.Since(begin))
		}
		events.Stop()
	}
	for _, q := range []struct {
		name, goal string
		q          float64
	}{{"median", "", 0.5}, {"p99", "15 ms", 0.99}} {
		mine, beside := quantile(all[0], q.q), quantile(all[1], q.q)
		b.add("API: from the beginning of a write to its event, "+q.name, milliseconds(mine), "upstream "+milliseconds(beside), ratio(mine, beside), q.goal)
	}
	return nil
}

// memory is what is resident while there are so many pods, bound and running nowhere.
func memory(ctx context.Context, b *bench, size sizes, ours, other plane) error {
	have := 0
	for _, want := range size.held {
		var resident [2]int64
		for i, p := range []plane{ours, other} {
			if have == 0 {
				if err := errors.Join(makeNamespace(ctx, p, "held"), addNodes(ctx, p, size.nodes)); err != nil {
					return err
				}
			}
			pods := p.client.CoreV1().Pods("held")
			err := inParallel(ctx, want-have, func(ctx context.Context, j int) error {
				pod := hollowPod(fmt.Sprint("held-", have+j), nil)
				pod.Spec.NodeName = nodeName((have + j) % size.nodes)
				_, err := pods.Create(ctx, pod, metav1.CreateOptions{})
				return err
			})
			if err != nil {
				return err
			}
			if err := pause(ctx, 10*time.Second); err != nil {
				return err
			}
			use, err := p.use()
			if err != nil {
				return err
			}
			resident[i] = use.RSS
		}
		b.add(fmt.Sprintf("resident memory with %d pods", want), mebibytes(resident[0]), "upstream's control plane "+mebibytes(resident[1]), ratio(resident[0], resident[1]), "")
		have = want
	}
	return nil
}

func makeNamespace(ctx context.Context, p plane, name string) error {
	_, err := p.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	accounts, err := p.client.CoreV1().ServiceAccounts(name).Watch(waiting, metav1.ListOptions{})
	if err != nil {
		return err
	}
	defer accounts.Stop()
	for event := range accounts.ResultChan() {
		if object, ok := event.Object.(metav1.Object); ok && object.GetName() == "default" {
			return nil
		}
	}
	return fmt.Errorf("namespace %s has no service account after a minute", name)
}
