// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/api"
)

// waitForCluster returns once the API is ready and a node is Ready, or fails after limit. It tries
// again whenever the kubeconfig is written, and with a growing pause while a connection is refused or
// the API is still starting: neither sends an event.
func waitForCluster(ctx context.Context, cmd *cobra.Command, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	changed := make(chan struct{}, 1)
	if watcher, err := fsnotify.NewWatcher(); err == nil {
		defer func() { _ = watcher.Close() }()
		_ = watcher.Add(api.ConfigDir) // the folder may not exist yet: the pauses cover that
		go func() {
			for range watcher.Events {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		}()
	}
	pause := wait.Backoff{Duration: 50 * time.Millisecond, Factor: 1.5, Cap: time.Second, Steps: 1 << 20}
	for {
		last := clusterReady(ctx, cmd)
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fail("the cluster was not ready within %s: %w", limit, last)
		case <-changed:
		case <-time.After(pause.Step()):
		}
	}
}

// clusterReady watches the nodes until one is Ready; it fails when the API is not ready: on a second
// start the stored node is Ready before anything else is.
func clusterReady(ctx context.Context, cmd *cobra.Command) error {
	useDefaultKubeconfig() // the server may have written it since this process started
	config, err := clientConfig(cmd)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if _, err := apiReady(ctx, client); err != nil {
		return fmt.Errorf("the API %w", err)
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	if slices.ContainsFunc(nodes.Items, isReady) {
		return nil
	}
	w, err := client.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{ResourceVersion: nodes.ResourceVersion})
	if err != nil {
		return err
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		if n, ok := event.Object.(*corev1.Node); ok && isReady(*n) {
			return nil
		}
	}
	return errors.New("the API answers, but no node is Ready")
}

func isReady(n corev1.Node) bool { return nodeState(n) == "Ready" }
