// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/tests/cluster"
)

// Report is what a cluster of one size costs.
type Report struct {
	Nodes, Pods    int
	Filled         time.Duration // from the first new pod to the last one that runs
	Get, Create    Latency
	List           Latency // of the pods of one namespace, 500 at a time
	WatchLag       Latency // from a write's answer to its event
	RSS            int64   // of the server, bytes
	CPU            float64 // of one processor, while nothing changes
	FailedRequests int     // of hollow nodes
	Failures       []string
}

// Latency of some requests.
type Latency struct{ P50, P99 time.Duration }

func latencyOf(all []time.Duration) Latency {
	if len(all) == 0 {
		return Latency{}
	}
	slices.Sort(all)
	return Latency{P50: all[len(all)/2], P99: all[len(all)*99/100]}
}

func (l Latency) String() string {
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
	return fmt.Sprintf("%s / %s", round(l.P50), round(l.P99))
}

const tableHead = "nodes\tpods\tfilled in\tpods/s\tget p50 / p99\tcreate p50 / p99\tlist 500 p50 / p99\twatch lag p50 / p99\tserver RSS\tserver CPU idle\tfailed"

func (r Report) row(added int) string {
	return fmt.Sprintf("%d\t%d\t%s\t%.0f\t%s\t%s\t%s\t%s\t%d MiB\t%.0f %%\t%d", r.Nodes, r.Pods, r.Filled.Round(100*time.Millisecond), float64(added)/r.Filled.Seconds(),
		r.Get, r.Create, r.List, r.WatchLag, r.RSS>>20, r.CPU*100, r.FailedRequests)
}

// repeat measures a request a number of times.
func repeat(times int, request func(i int) error) (Latency, error) {
	var all []time.Duration
	for i := range times {
		begin := time.Now()
		if err := request(i); err != nil {
			return Latency{}, err
		}
		all = append(all, time.Since(begin))
	}
	return latencyOf(all), nil
}

// measure asks an API server as clients do.
func measure(ctx context.Context, client kubernetes.Interface, times int, r *Report) (err error) {
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceDefault)
	if r.Get, err = repeat(times, func(int) error {
		_, err := client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
		return err
	}); err != nil {
		return err
	}
	if r.List, err = repeat(max(times/10, 1), func(int) error {
		_, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{Limit: 500})
		return err
	}); err != nil {
		return err
	}
	w, err := maps.Watch(ctx, metav1.ListOptions{LabelSelector: "scale=probe"})
	if err != nil {
		return err
	}
	defer w.Stop()
	var creates, lags []time.Duration
	for i := range times {
		begin := time.Now()
		made, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "probe-", Labels: map[string]string{"scale": "probe"}}}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("probe %d: %w", i, err)
		}
		written := time.Now()
		creates = append(creates, written.Sub(begin))
		if err := awaitEvent(ctx, w.ResultChan(), made.Name); err != nil {
			return err
		}
		lags = append(lags, time.Since(written))
		if err := maps.Delete(ctx, made.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	r.Create, r.WatchLag = latencyOf(creates), latencyOf(lags)
	return nil
}

// use is what the server takes over a while in which nobody asks for anything but nodes.
func use(ctx context.Context, n *cluster.Node, while time.Duration, r *Report) error {
	before, err := cluster.UseOf(n.ServerPid())
	if err != nil {
		return err
	}
	begin := time.Now()
	select {
	case <-time.After(while):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := cluster.UseOf(n.ServerPid())
	if err != nil {
		return err
	}
	r.RSS, r.CPU = after.RSS, float64(after.CPU-before.CPU)/float64(time.Since(begin))
	return nil
}
