// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/http"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/node"
)

// shutdownOrders are what the node agent is told on its control socket.
func shutdownOrders(n *node.Agent) http.Handler {
	orders := http.NewServeMux()
	orders.HandleFunc("POST /shutdown/begin", control(func(ctx context.Context, _ bool) (bool, error) {
		// Whoever asked may go: what was begun is finished.
		return true, n.EndPods(context.WithoutCancel(ctx))
	}))
	orders.HandleFunc("POST /shutdown/cancel", control(func(context.Context, bool) (bool, error) { return true, n.Resume() }))
	return orders
}

func newShutdownCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var cancel bool
	c := &cobra.Command{
		Use:   "shutdown",
		Short: "End this node's pods in order, before its machine is shut down",
		Long: "End this node's pods in order, before its machine is shut down: critical and static ones last, within the\n" +
			"node's --shutdown-grace-period. The node says that it is not ready and takes no pods until it starts anew,\n" +
			"or until --cancel. The service that `skep install` makes does this by itself when the machine stops; on other\n" +
			"hosts it belongs before the command that stops the machine.",
		Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			path, done := "/shutdown/begin", "the node's pods have ended"
			if cancel {
				path, done = "/shutdown/cancel", "the node takes pods again"
			}
			if _, err := orderAt[bool](ctx, nodeSocket, http.MethodPost, path, true); err != nil {
				return fail("%w", err)
			}
			fmt.Fprintln(streams.Out, done)
			return nil
		},
	}
	c.Flags().BoolVar(&cancel, "cancel", false, "The machine is not shut down after all: take pods again")
	return c
}
