// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/tests/cluster"
)

// startSection measures a first start, on an empty data directory with the images to import: until
// the API serves, the node is Ready, and a pod that was applied at once answers through ingress.
// Beside it upstream's control plane starts, which ends up with neither node, network nor ingress.
func startSection(ctx context.Context, b *bench) error {
	var serving, ready, first, theirServing, theirReady []float64
	for i := range b.samples(5) {
		times, err := b.oneStart(ctx, fmt.Sprintf("start%d", i))
		if err != nil {
			return err
		}
		serving, ready, first = append(serving, times[0].Seconds()), append(ready, times[1].Seconds()), append(first, times[2].Seconds())
		theirs, err := b.upstreamStart(ctx, fmt.Sprintf("upstream%d", i))
		if err != nil {
			return err
		}
		theirServing, theirReady = append(theirServing, theirs[0].Seconds()), append(theirReady, theirs[1].Seconds())
	}
	for _, r := range []struct {
		what, name, goal string
		ours, theirs     []float64
	}{
		{"first start until the API serves", "etcd and kube-apiserver", "", serving, theirServing},
		{"first start until the node is Ready", "upstream's control plane alone", "1.5 s", ready, theirReady},
		{"first start until a pod answers through ingress", "upstream's control plane alone", "2.5 s", first, theirReady},
	} {
		b.add(r.what, fmt.Sprintf("%.2f s", median(r.ours)), fmt.Sprintf("%s %.2f s", r.name, median(r.theirs)),
			fmt.Sprintf("%.2f", pairedRatio(r.ours, r.theirs)), r.goal)
	}
	return nil
}

func (b *bench) upstreamStart(ctx context.Context, name string) (times [2]time.Duration, err error) {
	u, err := b.newUpstream(ctx, name)
	if err != nil {
		return times, err
	}
	defer func() { err = errors.Join(err, u.stop()) }()
	times[0], times[1], err = u.start(ctx)
	return times, err
}

func (b *bench) oneStart(ctx context.Context, name string) (times [3]time.Duration, err error) {
	n, err := b.machine(ctx, name, b.built.Hello)
	if err != nil {
		return times, err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	begin := time.Now()
	if err := n.StartServer(); err != nil {
		return times, err
	}
	if err := n.WaitServing(ctx); err != nil {
		return times, err
	}
	times[0] = time.Since(begin)
	answered := make(chan error, 1)
	go func() { answered <- deployWeb(ctx, n) }()
	if err := n.WaitReady(ctx); err != nil {
		return times, err
	}
	times[1] = time.Since(begin)
	if err := <-answered; err != nil {
		return times, fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
	}
	times[2] = time.Since(begin)
	return times, nil
}

// deployWeb applies Deployment, Service and Ingress, and returns once they answer outside.
func deployWeb(ctx context.Context, n *cluster.Node) error {
	client, err := n.Kubernetes()
	if err != nil {
		return err
	}
	const ns = metav1.NamespaceDefault
	if err := awaitServiceAccount(ctx, client); err != nil {
		return err
	}
	if _, err := client.AppsV1().Deployments(ns).Create(ctx, webDeployment("web"), metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, err := client.CoreV1().Services(ns).Create(ctx, webService("web", "web", ""), metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, err := client.NetworkingV1().Ingresses(ns).Create(ctx, webIngress("web"), metav1.CreateOptions{}); err != nil {
		return err
	}
	outside := &http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: n.LAN.Dial, DisableKeepAlives: true}}
	return awaitPage(ctx, outside, fmt.Sprintf("http://%s/", n.Addrs[0]))
}

// awaitPage asks until the answer is 200.
func awaitPage(ctx context.Context, client *http.Client, url string) error {
	for {
		response, err := client.Get(url)
		if err == nil {
			err = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s never answered: %w", url, errors.Join(ctx.Err(), err))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// awaitServiceAccount waits until pods can be created in the default namespace.
func awaitServiceAccount(ctx context.Context, client kubernetes.Interface) error {
	for {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("default service account: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
