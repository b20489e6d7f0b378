// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/node/join"
)

const (
	restartServer  = "Restart the server now (systemctl restart skep)"
	restartServers = "Restart every server now, one after the other (systemctl restart skep)"
)

func newCACommand(streams genericiooptions.IOStreams) *cobra.Command {
	dataDir := api.DefaultDataDir
	force := false
	c := &cobra.Command{
		Use:   "ca",
		Short: "Replace the cluster's certificate authority, in three steps, while everything runs",
		Long: "Replace the cluster's certificate authority, in three steps, while everything runs. Each step takes effect when\n" +
			"the server is started again, with several servers each of them; pods and their connections stay. A step is\n" +
			"refused until every node and server is ready for it, which `skep ca status` shows. Run it where a server runs.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.PersistentFlags().StringVar(&dataDir, "data-dir", dataDir, "The server's --data-dir")
	dir := func() string { return filepath.Join(dataDir, "server", "tls") }
	status := &cobra.Command{
		Use: "status", Short: "Show how far this is, whom each node trusts, and who signed its certificate",
		Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := lookAtAuthorities(cmd, dir())
			if err != nil {
				return fail("%w", err)
			}
			return s.print(streams.Out)
		},
	}
	step := func(name, short string, to pki.Stage, do func(string) error, next string) *cobra.Command {
		c := &cobra.Command{
			Use: name, Short: short, Args: cobra.NoArgs, SilenceUsage: true,
			RunE: func(cmd *cobra.Command, _ []string) error {
				s, err := lookAtAuthorities(cmd, dir())
				if err != nil {
					return fail("%w", err)
				}
				if waiting := s.waiting(); len(waiting) > 0 && !force {
					return fail("these nodes are not ready for it: %s. See `skep ca status`; with --force those that are not have to join again", strings.Join(waiting, ", "))
				}
				restart := restartServer
				if s.several {
					restart = restartServers
					ctx, stop := untilSignal(cmd)
					defer stop()
					_, err = order[bool](ctx, http.MethodPost, "/authority/step", to)
				} else {
					err = do(dir())
				}
				if err != nil {
					return fail("%w", err)
				}
				fmt.Fprintln(streams.Out, restart+next)
				return nil
			},
		}
		c.Flags().BoolVar(&force, "force", false, "Do not wait for nodes")
		return c
	}
	c.AddCommand(status,
		step("prepare", "First step: make the next authority, and trust it beside the one that signs", pki.Prepared, pki.Prepare,
			". When every node trusts it (skep ca status): skep ca switch"),
		step("switch", "Second step: let the next authority sign", pki.Switched, pki.Switch,
			". Tokens made before are of no use then, and kubeconfig files have to be made anew. When every node has a new certificate (skep ca status): skep ca finish"),
		step("finish", "Third step: trust the authority before no more", pki.Settled, pki.Finish,
			". Only the new authority is trusted then."))
	return c
}

// authorityStatus is how far the change of authorities is.
type authorityStatus struct {
	stage             pki.Stage
	several           bool   // several servers have agreed on it
	signs, next, left string // in short; next and left are empty where there is none
	nodes             []authorityNode
}

type authorityNode struct {
	name, trusts, signedBy string
	server                 bool // its node is in the server's process, which has all files
	behind                 bool // a server that has not taken the last step
}

// waiting are the nodes that the next step would lock out.
func (s authorityStatus) waiting() []string {
	var out []string
	for _, n := range s.nodes {
		ready := n.server && !n.behind || !n.server && (s.stage == pki.Settled ||
			s.stage == pki.Prepared && slices.Contains(strings.Split(n.trusts, ","), s.next) ||
			s.stage == pki.Switched && n.signedBy == s.signs)
		if !ready {
			out = append(out, n.name)
		}
	}
	return out
}

func (s authorityStatus) print(out io.Writer) error {
	steps := map[pki.Stage]string{pki.Settled: "prepare", pki.Prepared: "switch", pki.Switched: "finish"}
	fmt.Fprintf(out, "Authority %s signs; the next step is `skep ca %s`.\n", s.signs, steps[s.stage])
	switch s.stage {
	case pki.Prepared:
		fmt.Fprintf(out, "Authority %s is to follow.\n", s.next)
	case pki.Switched:
		fmt.Fprintf(out, "Authority %s came before, and is trusted still.\n", s.left)
	}
	waiting := s.waiting()
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NODE\tTRUSTS\tSIGNED BY\tREADY FOR THE NEXT STEP")
	for _, n := range s.nodes {
		ready := "yes"
		if slices.Contains(waiting, n.name) {
			ready = "no"
		}
		if n.server {
			n.trusts, n.signedBy = "(server)", "(server)"
			if n.behind {
				n.signedBy = "(restart it)"
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", n.name, cmp.Or(n.trusts, "-"), cmp.Or(n.signedBy, "-"), ready)
	}
	return w.Flush()
}

func lookAtAuthorities(cmd *cobra.Command, dir string) (s authorityStatus, err error) {
	ctx, stop := untilSignal(cmd)
	defer stop()
	var c pki.Change
	var now authorityAnswer
	if _, statErr := os.Stat(membershipFile(filepath.Dir(dir))); statErr == nil {
		s.several = true
		now, err = order[authorityAnswer](ctx, http.MethodPost, "/authority/status", "")
		c = now.Change
	} else if c, err = pki.ReadChange(dir); err != nil {
		err = fmt.Errorf("no server keeps its authority here (--data-dir says where): %w", err)
	}
	if err != nil {
		return s, err
	}
	signs, next, left, err := c.Certificates()
	if err != nil {
		return s, err
	}
	s.stage = c.Stage()
	for ca, short := range map[*x509.Certificate]*string{signs: &s.signs, next: &s.next, left: &s.left} {
		if ca != nil {
			*short = join.ShortPin(ca)
		}
	}
	if s.nodes, err = authorityNodes(ctx, cmd); err != nil || !s.several {
		return s, err
	}
	s.nodes = withServers(s.nodes, now.Servers, now.Behind)
	return s, nil
}

// withServers says of nodes which of them are servers, and adds those that are no node at the moment.
func withServers(nodes []authorityNode, servers, behind []string) []authorityNode {
	for i := range nodes {
		nodes[i].server = slices.Contains(servers, nodes[i].name)
		nodes[i].behind = slices.Contains(behind, nodes[i].name)
	}
	for _, name := range servers {
		if !slices.ContainsFunc(nodes, func(n authorityNode) bool { return n.name == name }) {
			nodes = append(nodes, authorityNode{name: cmp.Or(name, "(a server that is joining)"), server: true, behind: slices.Contains(behind, name)})
		}
	}
	return nodes
}

func authorityNodes(ctx context.Context, cmd *cobra.Command) ([]authorityNode, error) {
	client, _, err := tokenClient(cmd)
	if err != nil {
		return nil, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	slice, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("list servers: %w", err)
	}
	var servers []string
	for _, e := range slice.Endpoints {
		servers = append(servers, e.Addresses...)
	}
	var out []authorityNode
	for i := range nodes.Items {
		n := &nodes.Items[i]
		out = append(out, authorityNode{
			name: n.Name, trusts: n.Annotations[api.TrustedAuthoritiesAnnotation], signedBy: n.Annotations[api.AuthorityAnnotation],
			server: slices.ContainsFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool { return slices.Contains(servers, a.Address) }),
		})
	}
	return out, nil
}
