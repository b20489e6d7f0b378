// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
)

func newNetCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "net",
		Short: "Show what the kernel of each node holds: services, backends, endpoints, policies, connections",
		Long: "Show what the kernel of each node holds, with names. It is read from the tables that decide about each\n" +
			"packet, and not from what somebody wanted them to be.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(
		netVerb(streams, "services", "Addresses at which Services are reached, and what they lead to", []string{"svc", "frontends"}, frontendTable),
		netVerb(streams, "backends", "Addresses that serve", nil, backendTable),
		netVerb(streams, "endpoints", "Addresses of the nodes' pods", []string{"ep"}, endpointTable),
		netVerb(streams, "policy", "What may come to the nodes' pods, and what may leave them", []string{"policies"}, policyTable),
		netVerb(streams, "conntrack", "Tracked connections, those that were used last first", []string{"connections", "ct"}, connectionTable),
	)
	return c
}

// table says how to print objects of a kind: names are filled in first.
type table[T any] struct {
	header, wide string // tab-separated; wide are further columns
	namespaces   func(*T) []string
	peers        func(*T) []*flows.Peer
	rows         func(v *T, wide bool) []string
	summary      func(inspect.Health) string // a last line of each node; nil: none
}

func netVerb[T any](streams genericiooptions.IOStreams, name, short string, aliases []string, t table[T]) *cobra.Command {
	var node, output string
	c := &cobra.Command{
		Use: name, Short: short, Aliases: aliases, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			if output != "" && output != "wide" && output != "json" {
				return fail("--output: %q is neither json nor wide", output)
			}
			client, err := inspectClient(cmd)
			if err != nil {
				return err
			}
			var namespaces []string
			if f := cmd.Flags().Lookup("namespace"); f != nil && f.Value.String() != "" {
				namespaces = strings.Split(f.Value.String(), ",")
			}
			return t.show(ctx, streams.Out, client, name, node, output, namespaces)
		},
	}
	c.Flags().StringVar(&node, "node", "", "Ask only this node")
	c.Flags().StringVarP(&output, "output", "o", "", "json: an object a line; wide: more columns")
	return c
}

// onNode is an object in JSON with the node it is of.
type onNode[T any] struct {
	Node  string `json:"node"`
	Value T      `json:"value"`
}

func (t *table[T]) show(ctx context.Context, out io.Writer, client kubernetes.Interface, what, node, output string, namespaces []string) error {
	nodes, err := nodeNames(ctx, client, node)
	if err != nil {
		return err
	}
	names := &peerNames{client: client}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	encoder := json.NewEncoder(out)
	header := t.header
	if output == "wide" {
		header += t.wide
	}
	if len(nodes) > 1 {
		header = "NODE\t" + header
	}
	if output != "json" {
		fmt.Fprintln(w, header)
	}
	for _, n := range nodes {
		err := askNode(ctx, client, n, what, nil, func(v T) error {
			if len(namespaces) > 0 && !slices.ContainsFunc(t.namespaces(&v), func(s string) bool { return slices.Contains(namespaces, s) }) {
				return nil
			}
			for _, p := range t.peers(&v) {
				if err := names.name(ctx, p); err != nil {
					return err
				}
			}
			if output == "json" {
				return encoder.Encode(onNode[T]{n, v})
			}
			for _, row := range t.rows(&v, output == "wide") {
				if len(nodes) > 1 {
					row = n + "\t" + row
				}
				fmt.Fprintln(w, row)
			}
			return nil
		})
		if err != nil {
			return fail("%w", err)
		}
	}
	if err := w.Flush(); err != nil || t.summary == nil || output == "json" {
		return err
	}
	for _, n := range nodes {
		err := askNode(ctx, client, n, "health", nil, func(h inspect.Health) error {
			_, err := fmt.Fprintf(out, "\n%s: %s\n", n, t.summary(h))
			return err
		})
		if err != nil {
			return fail("%w", err)
		}
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

func listed[T fmt.Stringer](list []T, limit int) string {
	var out []string
	for i, v := range list {
		if limit > 0 && i == limit {
			out = append(out, fmt.Sprintf("+ %d more", len(list)-limit))
			break
		}
		out = append(out, v.String())
	}
	return orNone(strings.Join(out, ","))
}

var frontendTable = table[inspect.Frontend]{
	header: "NAMESPACE\tSERVICE\tADDRESS\tPROTOCOL\tSCOPE\tBACKENDS", wide: "\tALGORITHM\tAFFINITY\tPOLICY\tID\tGENERATION",
	namespaces: func(f *inspect.Frontend) []string { return []string{f.Namespace} },
	peers:      func(*inspect.Frontend) []*flows.Peer { return nil },
	rows: func(f *inspect.Frontend, wide bool) []string {
		address := f.Address.String()
		if f.Address.Addr().IsUnspecified() {
			address = fmt.Sprintf("node:%d (%s)", f.Address.Port(), family(f.Address.Addr()))
		}
		limit := 3
		if wide {
			limit = 0
		}
		row := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", orNone(f.Namespace), orNone(f.Service), address, f.Protocol, f.Scope, listed(f.Backends, limit))
		if wide {
			affinity, policy := "<none>", "Cluster"
			if f.AffinitySeconds > 0 {
				affinity = fmt.Sprintf("ClientIP %ds", f.AffinitySeconds)
			}
			if f.LocalOnly {
				policy = "Local"
			}
			row += fmt.Sprintf("\t%s\t%s\t%s\t%d\t%d", f.Algorithm, affinity, policy, f.ID, f.Generation)
		}
		return []string{row}
	},
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

var backendTable = table[inspect.Backend]{
	header: "NAMESPACE\tSERVICE\tADDRESS\tPROTOCOL\tPOD\tSTATE", wide: "\tID",
	namespaces: func(b *inspect.Backend) []string { return []string{b.ServiceNS} },
	peers:      func(b *inspect.Backend) []*flows.Peer { return []*flows.Peer{&b.Peer} },
	rows: func(b *inspect.Backend, wide bool) []string {
		row := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", orNone(b.ServiceNS), orNone(b.Service), netip.AddrPortFrom(b.Address, b.Port), b.Protocol, ownerOf(&b.Peer), b.State)
		if wide {
			row += fmt.Sprintf("\t%d", b.ID)
		}
		return []string{row}
	},
}

// ownerOf is whose address it is.
func ownerOf(p *flows.Peer) string {
	switch {
	case p.Pod != "":
		return p.Namespace + "/" + p.Pod
	case p.Node != "":
		return "node/" + p.Node
	}
	return "<none>"
}

var endpointTable = table[inspect.Endpoint]{
	header: "NAMESPACE\tPOD\tADDRESS\tINGRESS\tEGRESS", wide: "\tIFINDEX\tPOD MAC\tHOST MAC",
	namespaces: func(e *inspect.Endpoint) []string { return []string{e.Namespace} },
	peers:      func(e *inspect.Endpoint) []*flows.Peer { return []*flows.Peer{&e.Peer} },
	rows: func(e *inspect.Endpoint, wide bool) []string {
		row := fmt.Sprintf("%s\t%s\t%s\t%s\t%s", orNone(e.Namespace), orNone(e.Pod), e.Address, e.Ingress, e.Egress)
		if wide {
			row += fmt.Sprintf("\t%d\t%s\t%s", e.Ifindex, e.PodMAC, e.HostMAC)
		}
		return []string{row}
	},
}

var policyTable = table[inspect.PolicySet]{
	header: "NAMESPACE\tPOD\tDIRECTION\tPOLICIES\tPEER\tPROTOCOL\tPORTS\tVERDICT", wide: "\tDROPS\tSET",
	namespaces: func(s *inspect.PolicySet) []string { return []string{s.Namespace} },
	peers: func(s *inspect.PolicySet) (out []*flows.Peer) {
		for i := range s.Rules {
			for j := range s.Rules[i].Peers {
				out = append(out, &s.Rules[i].Peers[j])
			}
		}
		return out
	},
	rows: func(s *inspect.PolicySet, wide bool) []string {
		row := func(policies, peer, protocol, ports, verdict string) string {
			r := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s", orNone(s.Namespace), orNone(s.Pod), s.Direction, policies, peer, protocol, ports, verdict)
			if wide {
				r += fmt.Sprintf("\t%d\t%#x", s.Drops, s.Set)
			}
			return r
		}
		policies := orNone(strings.Join(s.Policies, ","))
		switch {
		case s.State == inspect.Open:
			return []string{row("<none>", "anybody", "any", "all", "allow")}
		case s.State == inspect.Closed:
			return []string{row(policies, "nobody ("+s.Why+")", "", "", "")}
		case len(s.Rules) == 0:
			return []string{row(policies, "nobody", "", "", "")}
		}
		var out []string
		for i := range s.Rules {
			r := &s.Rules[i]
			out = append(out, row(policies, rulePeers(r), r.Protocol, rulePorts(r), r.Verdict))
		}
		return out
	},
}

func rulePeers(r *inspect.Rule) string {
	if r.Anybody {
		return "anybody"
	}
	var out []string
	for i := range r.Peers {
		name := ownerOf(&r.Peers[i])
		if name == "<none>" {
			name = r.Peers[i].Address.String()
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for _, b := range r.Blocks {
		out = append(out, b.String())
	}
	return orNone(strings.Join(out, ","))
}

func rulePorts(r *inspect.Rule) string {
	switch {
	case r.First == 0 && r.Last == 65535:
		return "all"
	case r.First == r.Last:
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

var connectionTable = table[inspect.Connection]{
	summary: inspect.Health.Connections,
	header:  "PROTOCOL\tSOURCE\tDESTINATION\tSERVICE\tSTATE\tIDLE", wide: "\tTRANSLATED TO\tFROM",
	namespaces: func(c *inspect.Connection) []string {
		return []string{c.Source.Namespace, c.Destination.Namespace, c.Namespace}
	},
	peers: func(c *inspect.Connection) (out []*flows.Peer) {
		for _, p := range []*flows.Peer{&c.Source, &c.Destination, c.To, c.From} {
			if p != nil {
				out = append(out, p)
			}
		}
		return out
	},
	rows: func(c *inspect.Connection, wide bool) []string {
		if c.Reply && !wide {
			return nil // the other side of a translated connection, which has a row of its own
		}
		service := "<none>"
		if c.Service != "" {
			service = c.Namespace + "/" + c.Service
		}
		row := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", c.Protocol, peerText(&c.Source, wide), peerText(&c.Destination, wide), service, c.State, c.Idle.Round(time.Millisecond))
		if wide {
			to, from := "<none>", "<none>"
			if c.To != nil {
				to = peerText(c.To, true)
			}
			if c.From != nil {
				from = peerText(c.From, true)
			}
			row += "\t" + to + "\t" + from
		}
		return []string{row}
	},
}
