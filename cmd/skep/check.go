// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/node/hostcheck"
)

func newCheckCommand(streams genericiooptions.IOStreams) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Say what this host and its kernel lack, and what skep does instead",
		Long: "Say what this host and its kernel lack, and what skep does instead.\n\n" +
			"Nothing is changed. The exit status is 1 if skep could not start here.",
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			results := hostcheck.Run(hostcheck.This())
			w := tabwriter.NewWriter(streams.Out, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "CHECK\tRESULT\tDETAIL\tREMEDY")
			missing := 0
			for _, r := range results {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.Name, r.Outcome, r.Detail, r.Remedy)
				if r.Outcome == hostcheck.Missing {
					missing++
				}
			}
			if err := w.Flush(); err != nil {
				return err
			}
			if missing > 0 {
				return fail("%d of %d checks failed: skep cannot start on this host", missing, len(results))
			}
			return nil
		},
	}
}
