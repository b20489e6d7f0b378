// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/api"
)

func newServerCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var o serverOptions
	c := &cobra.Command{
		Use:   "server",
		Short: "Run the control plane and a node on this machine",
		Long: "Run the control plane and a node on this machine, in the foreground.\n\n" +
			"Everything is kept below --data-dir; a second start goes on where the first ended. Pods keep\n" +
			"running, and their connections stay, while the server is stopped or replaced.\n" +
			"`skep reset` takes all of it off the machine.",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := o.prepare(cmd, streams, api.ServerConfigPath)
			if err != nil {
				return err
			}
			h, err := thisHost()
			if err != nil {
				return fail("%w", err)
			}
			settings, err := o.complete(h)
			if err != nil {
				return fail("%w", err)
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			if err := runServer(ctx, settings, log); err != nil {
				return fail("%w", err)
			}
			fmt.Fprintln(streams.ErrOut, "skep: stopped; pods keep running (`skep reset` removes them)")
			return nil
		},
	}
	o.addFlags(c.Flags())
	return c
}
