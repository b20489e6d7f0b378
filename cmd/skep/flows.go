// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
)

func newFlowsCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var o flowFlags
	var follow bool
	var last int
	var node, output string
	c := &cobra.Command{
		Use:   "flows",
		Short: "Show which connections are made, and which packets are dropped and why",
		Long: "Show which connections were made lately, which were refused, and which packets were dropped: by which\n" +
			"NetworkPolicies, or for which reason. Every node remembers its last 4096.\n\n" +
			"A node tells of so many a second and no more, whatever happens; what it leaves out is counted.",
		Example: "  skep flows -f --verdict dropped               # what is being dropped, as it happens\n" +
			"  skep flows --service web --last 20            # the last connections to a service\n" +
			"  skep flows --from client --to web-0 -o json   # between two pods, for programs",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			// The root's flag means something else for every other verb.
			if f := cmd.Flags().Lookup("namespace"); f != nil && f.Value.String() != "" {
				o.namespaces = strings.Split(f.Value.String(), ",")
			}
			filter, err := o.filter(time.Now())
			if err != nil {
				return fail("%w", err)
			}
			show, err := flowPrinter(streams.Out, output)
			if err != nil {
				return fail("%w", err)
			}
			client, err := inspectClient(cmd)
			if err != nil {
				return err
			}
			r := flowReader{client: client, names: &peerNames{client: client}, filter: &filter, show: show, last: last, errOut: streams.ErrOut}
			return r.run(ctx, node, follow)
		},
	}
	f := c.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "Go on with what happens from now on")
	f.IntVar(&last, "last", 0, "Show only so many of those that are remembered; with --follow none, unless it is given")
	f.StringVar(&node, "node", "", "Ask only this node")
	f.StringVarP(&output, "output", "o", "", "json: an object a line; wide: with addresses and the service's")
	f.StringSliceVar(&o.from, "from", nil, "Source: a pod (NAME or NAMESPACE/NAME), node/NAME, an address or a CIDR")
	f.StringSliceVar(&o.to, "to", nil, "Destination: as --from")
	f.StringSliceVar(&o.pods, "pod", nil, "Source or destination: as --from")
	f.StringSliceVar(&o.services, "service", nil, "Service that was asked for: NAME or NAMESPACE/NAME")
	f.StringSliceVar(&o.policies, "policy", nil, "Policy that denied it: NAME or NAMESPACE/NAME")
	f.StringSliceVar(&o.verdicts, "verdict", nil, "forwarded, dropped or refused")
	f.StringSliceVar(&o.reasons, "reason", nil, "Why it was dropped or refused")
	f.StringSliceVar(&o.protocols, "protocol", nil, "TCP, UDP, ...")
	f.StringSliceVar(&o.ports, "port", nil, "Port of the destination, or of the service")
	f.DurationVar(&o.since, "since", 0, "Not older than this")
	return c
}

// inspectClient is a client of the API for verbs that ask nodes through it.
func inspectClient(cmd *cobra.Command) (kubernetes.Interface, error) {
	config, err := clientConfig(cmd)
	if err != nil {
		return nil, fail("%w", err)
	}
	return kubernetes.NewForConfig(config)
}

// nodeNames lists the nodes to ask.
func nodeNames(ctx context.Context, client kubernetes.Interface, only string) ([]string, error) {
	if only != "" {
		return []string{only}, nil
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return nil, fail("list nodes: %w", err)
	}
	names := make([]string, 0, len(nodes.Items))
	for i := range nodes.Items {
		names = append(names, nodes.Items[i].Name)
	}
	return names, nil
}

// askNode asks a node's API through the API server, which decides who may.
func askNode[T any](ctx context.Context, client kubernetes.Interface, node, what string, params map[string]string, each func(T) error) error {
	req := client.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix(inspect.Root + what)
	for k, v := range params {
		req = req.Param(k, v)
	}
	body, err := req.Stream(ctx)
	if err != nil {
		return fmt.Errorf("node %s: %w", node, err)
	}
	defer body.Close()
	if err := inspect.Decode(body, each); err != nil {
		return fmt.Errorf("node %s: %w", node, err)
	}
	return nil
}

// flowReader shows the flows of nodes.
type flowReader struct {
	client kubernetes.Interface
	names  *peerNames
	filter *flowFilter
	show   func(*flows.Flow) error
	last   int
	errOut io.Writer

	mu   sync.Mutex
	past []flows.Flow
}

func (r *flowReader) run(ctx context.Context, node string, follow bool) error {
	nodes, err := nodeNames(ctx, r.client, node)
	if err != nil {
		return err
	}
	if !follow || r.last > 0 {
		if err := r.ask(ctx, nodes, false, time.Time{}); err != nil {
			return fail("%w", err)
		}
		slices.SortStableFunc(r.past, func(a, b flows.Flow) int { return a.Time.Compare(b.Time) })
		if r.last > 0 {
			r.past = r.past[max(0, len(r.past)-r.last):]
		}
		for i := range r.past {
			if err := r.show(&r.past[i]); err != nil {
				return err
			}
		}
	}
	if !follow {
		return nil
	}
	after := time.Now()
	if n := len(r.past); n > 0 {
		after = r.past[n-1].Time
	}
	if err := r.ask(ctx, nodes, true, after); err != nil && ctx.Err() == nil {
		return fail("%w", err)
	}
	return nil
}

// ask asks all nodes at the same time. One that does not answer does not keep the others from it.
func (r *flowReader) ask(ctx context.Context, nodes []string, follow bool, after time.Time) error {
	group, answered := errgroup.Group{}, make([]bool, len(nodes))
	for i, node := range nodes {
		group.Go(func() error {
			err := askNode(ctx, r.client, node, "flows", map[string]string{"follow": strconv.FormatBool(follow)}, func(f flows.Flow) error {
				return r.take(ctx, &f, follow, after)
			})
			answered[i] = err == nil
			if err != nil && ctx.Err() == nil && len(nodes) > 1 {
				fmt.Fprintln(r.errOut, err)
				return nil
			}
			return err
		})
	}
	err := group.Wait()
	if err == nil && len(nodes) > 0 && !slices.Contains(answered, true) {
		err = errors.New("no node answered")
	}
	return err
}

func (r *flowReader) take(ctx context.Context, f *flows.Flow, follow bool, after time.Time) error {
	if follow && !f.Time.After(after) {
		return nil
	}
	for _, p := range []*flows.Peer{&f.Source, &f.Destination} {
		if err := r.names.name(ctx, p); err != nil {
			return err
		}
	}
	if !r.filter.matches(f) {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if follow {
		return r.show(f)
	}
	r.past = append(r.past, *f)
	return nil
}

// flowPrinter prints one flow a line.
func flowPrinter(out io.Writer, format string) (func(*flows.Flow) error, error) {
	switch format {
	case "json":
		encoder := json.NewEncoder(out)
		return func(f *flows.Flow) error { return encoder.Encode(f) }, nil
	case "", "wide":
		return func(f *flows.Flow) error {
			_, err := fmt.Fprintln(out, flowLine(f, format == "wide"))
			return err
		}, nil
	}
	return nil, fmt.Errorf("--output: %q is neither json nor wide", format)
}

// flowLine reads: when, who, to whom, by which service, what became of it, and why.
func flowLine(f *flows.Flow, wide bool) string {
	var b strings.Builder
	if f.Suppressed > 0 {
		fmt.Fprintf(&b, "... %d more on node %s before this\n", f.Suppressed, f.Node)
	}
	fmt.Fprintf(&b, "%s  %s -> %s  %s  %s", f.Time.Local().Format("15:04:05.000"), peerText(&f.Source, wide), peerText(&f.Destination, wide), f.Protocol, f.Verdict)
	if f.Service != nil {
		fmt.Fprintf(&b, "  service %s/%s", f.Service.Namespace, f.Service.Name)
		if wide {
			fmt.Fprintf(&b, " (%s)", f.Service.Address)
		}
	}
	if f.Reason != "" {
		fmt.Fprintf(&b, "  %s", f.Reason)
	}
	if len(f.Policies) > 0 {
		fmt.Fprintf(&b, ": %s", strings.Join(f.Policies, ", "))
	}
	if wide {
		fmt.Fprintf(&b, "  on node %s", f.Node)
	}
	return b.String()
}

func peerText(p *flows.Peer, wide bool) string {
	name, address := p.Node, ""
	if name != "" {
		name = "node/" + name
	}
	if p.Pod != "" {
		name = p.Namespace + "/" + p.Pod
	}
	if p.Address.IsValid() {
		address = p.Address.String()
	}
	text := name
	switch {
	case name == "":
		text = address
	case wide && address != "":
		text = name + "(" + address + ")"
	}
	if text == "" {
		text = "?"
	}
	if p.Port == 0 {
		return text
	}
	if text == address {
		return net.JoinHostPort(address, strconv.Itoa(int(p.Port)))
	}
	return text + ":" + strconv.Itoa(int(p.Port))
}
