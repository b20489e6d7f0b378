// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/http"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/controlplane/store"
)

func newMemberCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "member",
		Short: "List the servers of the cluster, and remove one that is gone for good",
		Long: "List the servers of the cluster, and remove one that is gone for good. Of three servers one may be away,\n" +
			"of five two: with fewer than a majority nothing can be changed until enough are back.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	list := &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List the servers of the cluster; run it on one of them",
		Args:  cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			all, err := order[[]store.Member](ctx, http.MethodPost, "/members/list", "")
			if err != nil {
				return fail("%w", err)
			}
			return printMembers(streams.Out, all)
		},
	}
	remove := &cobra.Command{
		Use: "remove NAME", Aliases: []string{"rm"},
		Short: "Remove a server from the cluster; run it on another one",
		Long: "Remove a server from the cluster; run it on another one. The removed server stops if it runs. Its node\n" +
			"stays as an object until `skep delete node NAME`, and the machine is clean after `skep reset` there.",
		Args: cobra.ExactArgs(1), SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			if _, err := order[bool](ctx, http.MethodPost, "/members/remove", args[0]); err != nil {
				return fail("%w", err)
			}
			fmt.Fprintf(streams.Out, "server %s is removed\n", args[0])
			return nil
		},
	}
	c.AddCommand(list, remove)
	return c
}

func printMembers(out io.Writer, all []store.Member) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tROLE\tURL")
	for _, m := range all {
		role, name := "voter", m.Name
		switch {
		case m.Name == "":
			role, name = "not started", "-"
		case m.Leader:
			role = "leader"
		case m.Learner:
			role = "learner"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", name, role, m.URL)
	}
	return w.Flush()
}
