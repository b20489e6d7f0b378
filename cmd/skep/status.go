// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/dataplane/inspect"
)

func newStatusCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{
		Use:   "status",
		Short: "Show whether the cluster works: API, nodes, pods",
		Long: "Show whether the cluster works: API, nodes, pods, and what a node's data plane has no room for or could not do.\n\n" +
			"The exit status is 1 if the API does not answer or a node is not Ready.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			return runStatus(ctx, cmd, streams, wait)
		},
	}
	c.Flags().DurationVar(&wait, "wait", 0, "Wait this long for the API to answer and a node to be Ready")
	return c
}

func runStatus(ctx context.Context, cmd *cobra.Command, streams genericiooptions.IOStreams, wait time.Duration) error {
	if wait > 0 {
		if err := waitForCluster(ctx, cmd, wait); err != nil {
			return err
		}
	}
	config, err := clientConfig(cmd)
	if err != nil {
		return fail("%w", err)
	}
	config.Timeout = 10 * time.Second
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	checks, err := apiReady(ctx, client)
	if err != nil {
		return fail("the API at %s %w", config.Host, err)
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fail("list nodes: %w", err)
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return fail("list pods: %w", err)
	}
	version, err := client.Discovery().ServerVersion()
	if err != nil {
		return fail("version of the API: %w", err)
	}
	fmt.Fprintf(streams.Out, "API     %s, Kubernetes %s, %d health checks pass\n\n", config.Host, version.GitVersion, checks)
	unready := printNodes(streams.Out, nodes.Items, pods.Items, time.Now())
	if troubled := troubledPods(pods.Items); len(troubled) > 0 {
		fmt.Fprintf(streams.Out, "\nPods that need a look (skep describe pod -n NAMESPACE NAME):\n  %s\n", strings.Join(troubled, "\n  "))
	}
	if troubles := networkTroubles(ctx, client, nodes.Items); len(troubles) > 0 {
		fmt.Fprintf(streams.Out, "\nThe data plane needs a look (skep net, skep get events):\n  %s\n", strings.Join(troubles, "\n  "))
	}
	if len(nodes.Items) == 0 {
		return fail("no node has registered yet")
	}
	if unready > 0 {
		return fail("%d of %d nodes are not Ready", unready, len(nodes.Items))
	}
	return nil
}

// apiReady asks the API for its health checks and returns how many pass; the error says in what state
// the API is if not all do.
func apiReady(ctx context.Context, client kubernetes.Interface) (int, error) {
	verbose, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").Param("verbose", "").Do(ctx).Raw()
	passed, failed := healthChecks(string(verbose))
	switch {
	case len(failed) > 0:
		return passed, fmt.Errorf("is not ready: %d health checks pass, these fail: %s", passed, strings.Join(failed, ", "))
	case err != nil:
		return passed, fmt.Errorf("does not answer: %w", err)
	}
	return passed, nil
}

// healthChecks reads what /readyz?verbose prints, a line for each check.
func healthChecks(verbose string) (passed int, failed []string) {
	for line := range strings.Lines(verbose) {
		switch {
		case strings.HasPrefix(line, "[+]"):
			passed++
		case strings.HasPrefix(line, "[-]"):
			name, _, _ := strings.Cut(line[3:], " ")
			failed = append(failed, name)
		}
	}
	return passed, failed
}

// printNodes writes a table of nodes and returns how many are not Ready.
func printNodes(out io.Writer, nodes []corev1.Node, pods []corev1.Pod, now time.Time) (unready int) {
	running := map[string]int{}
	total := map[string]int{}
	for _, p := range pods {
		total[p.Spec.NodeName]++
		if p.Status.Phase == corev1.PodRunning {
			running[p.Spec.NodeName]++
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NODE\tSTATUS\tPODS RUNNING\tADDRESSES\tAGE\tVERSION")
	for _, n := range nodes {
		state := nodeState(n)
		if state != "Ready" {
			unready++
		}
		var addrs []string
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				addrs = append(addrs, a.Address)
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%d/%d\t%s\t%s\t%s\n", n.Name, state, running[n.Name], total[n.Name],
			strings.Join(addrs, ","), duration.HumanDuration(now.Sub(n.CreationTimestamp.Time)), n.Status.NodeInfo.KubeletVersion)
	}
	_ = w.Flush() // what it writes to is the terminal: there is nobody else to tell
	return unready
}

// askedAtOnce bounds how many nodes are asked at the same time.
const askedAtOnce = 16

// networkTroubles asks the nodes that are Ready what their data planes lack, and gives a line for each, with the node's name.
func networkTroubles(ctx context.Context, client kubernetes.Interface, nodes []corev1.Node) []string {
	found := make([][]string, len(nodes))
	var asking errgroup.Group
	asking.SetLimit(askedAtOnce)
	for i := range nodes {
		if nodeState(nodes[i]) != "Ready" {
			continue
		}
		asking.Go(func() error {
			name := nodes[i].Name
			err := askNode(ctx, client, name, "health", nil, func(h inspect.Health) error {
				for _, t := range h.Troubles() {
					found[i] = append(found[i], name+": "+t)
				}
				return nil
			})
			if err != nil {
				found[i] = append(found[i], fmt.Sprintf("not known: %v", err))
			}
			return nil // the others are asked all the same
		})
	}
	_ = asking.Wait()
	return slices.Concat(found...)
}

// nodeState is "Ready", or why not.
func nodeState(n corev1.Node) string {
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		if c.Status == corev1.ConditionTrue {
			return "Ready"
		}
		return "NotReady (" + cmp.Or(c.Message, c.Reason, string(c.Status)) + ")"
	}
	return "NotReady (has not reported yet)"
}

// troubledPods names pods with a container that waits for a reason other than being started.
func troubledPods(pods []corev1.Pod) []string {
	var troubled []string
	for _, p := range pods {
		for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
				troubled = append(troubled, fmt.Sprintf("%s/%s: container %s: %s", p.Namespace, p.Name, c.Name, w.Reason))
			}
		}
	}
	return troubled
}
