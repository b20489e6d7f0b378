// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"skep.io/skep/tests/cluster"
)

// podsSection takes pods from create to Running one after another, with runc's bare start of the
// same root file system in turn; then as many at once.
func podsSection(ctx context.Context, b *bench) (err error) {
	n, err := b.node(ctx, "pods")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	client, err := n.Kubernetes()
	if err != nil {
		return err
	}
	if err := awaitServiceAccount(ctx, client); err != nil {
		return err
	}
	bare, err := newBareRunc(ctx, b, n)
	if err != nil {
		return err
	}
	var ours, runc, gone []time.Duration
	for i := range b.samples(50) + 1 {
		name := fmt.Sprintf("pod-%d", i)
		running, deleted, err := onePod(ctx, n, name)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
		}
		alone, err := bare.start(ctx, name)
		if err != nil {
			return err
		}
		if i == 0 {
			continue // warms caches up
		}
		ours, gone, runc = append(ours, running), append(gone, deleted), append(runc, alone)
	}
	b.add(fmt.Sprintf("create to Running, %d pods one after another, median", len(ours)), milliseconds(median(ours)),
		"bare `runc run` "+milliseconds(median(runc)), ratio(median(ours), median(runc)), "150 ms")
	b.add("the same, p99", milliseconds(quantile(ours, 0.99)), "bare `runc run` "+milliseconds(quantile(runc, 0.99)),
		ratio(quantile(ours, 0.99), quantile(runc, 0.99)), "")
	b.add("delete (no grace) to gone, median", milliseconds(median(gone)), "", "", "")

	many := b.samples(50)
	all, err := manyPods(ctx, n, many)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
	}
	b.add(fmt.Sprintf("%d pods at once, until the last is Running", many), seconds(all), "", "", "")
	return nil
}

// onePod is measured by the watch's events: what a client sees.
func onePod(ctx context.Context, n *cluster.Node, name string) (running, gone time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client, err := n.Kubernetes()
	if err != nil {
		return 0, 0, err
	}
	pods := client.CoreV1().Pods(metav1.NamespaceDefault)
	events, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return 0, 0, err
	}
	defer events.Stop()
	begin := time.Now()
	if _, err := pods.Create(ctx, sleeperPod(name), metav1.CreateOptions{}); err != nil {
		return 0, 0, err
	}
	if err := awaitEvent(ctx, events, isRunning); err != nil {
		return 0, 0, fmt.Errorf("pod %s to run: %w", name, err)
	}
	running = time.Since(begin)
	begin = time.Now()
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return 0, 0, err
	}
	if err := awaitEvent(ctx, events, func(e watch.Event) bool { return e.Type == watch.Deleted }); err != nil {
		return 0, 0, fmt.Errorf("pod %s to go: %w", name, err)
	}
	return running, time.Since(begin), nil
}

func isRunning(e watch.Event) bool {
	pod, ok := e.Object.(*corev1.Pod)
	return ok && pod.Status.Phase == corev1.PodRunning
}

func awaitEvent(ctx context.Context, w watch.Interface, met func(watch.Event) bool) error {
	for {
		select {
		case e, open := <-w.ResultChan():
			if !open {
				return errors.New("the watch ended")
			}
			if met(e) {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func manyPods(ctx context.Context, n *cluster.Node, count int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	client, err := n.Kubernetes()
	if err != nil {
		return 0, err
	}
	pods := client.CoreV1().Pods(metav1.NamespaceDefault)
	events, err := pods.Watch(ctx, metav1.ListOptions{LabelSelector: "app=many"})
	if err != nil {
		return 0, err
	}
	defer events.Stop()
	begin := time.Now()
	for i := range count {
		pod := sleeperPod(fmt.Sprintf("many-%d", i))
		pod.Labels = map[string]string{"app": "many"}
		if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			return 0, err
		}
	}
	seen := map[string]bool{}
	err = awaitEvent(ctx, events, func(e watch.Event) bool {
		if isRunning(e) {
			seen[e.Object.(*corev1.Pod).Name] = true
		}
		return len(seen) == count
	})
	if err != nil {
		return 0, fmt.Errorf("%d of %d pods run: %w", len(seen), count, err)
	}
	return time.Since(begin), nil
}

// bareRunc starts containers with nothing but runc, on the same node.
type bareRunc struct {
	node   *cluster.Node
	bundle string
}

func newBareRunc(ctx context.Context, b *bench, n *cluster.Node) (*bareRunc, error) {
	r := &bareRunc{node: n, bundle: filepath.Join(b.dir, "bundle")}
	bin := filepath.Join(r.bundle, "rootfs", "bin")
	for _, dir := range []string{bin, filepath.Join(r.bundle, "rootfs", "proc"), filepath.Join(r.bundle, "rootfs", "dev"), filepath.Join(r.bundle, "rootfs", "sys")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	script := fmt.Sprintf(`cp "$(command -v busybox)" %[1]s/sleep && cd %[2]s && runc spec && sed -i 's/"terminal": true/"terminal": false/; s/"sh"$/"sleep", "100000"/' config.json`, bin, r.bundle)
	if out, err := n.Exec(ctx, "sh", "-ec", script).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make a bundle: %w\n%s", err, out)
	}
	return r, nil
}

// start measures `runc run --detach`, which returns once the container's process runs. The process
// that enters the node is part of it: about 10 ms, measured here with `true` and taken off.
func (r *bareRunc) start(ctx context.Context, name string) (time.Duration, error) {
	begin := time.Now()
	if err := r.node.Exec(ctx, "true").Run(); err != nil {
		return 0, err
	}
	entering := time.Since(begin)
	cmd := r.node.Exec(ctx, "runc", "--root", "/run/bare", "run", "--detach", "--bundle", r.bundle, name)
	begin = time.Now()
	err := cmd.Run() // output would be inherited by the container, and waited for
	took := time.Since(begin) - entering
	if err != nil {
		return 0, fmt.Errorf("runc run %s: %w", name, err)
	}
	if out, err := r.node.Exec(ctx, "runc", "--root", "/run/bare", "delete", "--force", name).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("runc delete %s: %w\n%s", name, err, out)
	}
	return took, nil
}
