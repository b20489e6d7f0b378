// SPDX-License-Identifier: Apache-2.0

// Command skep is the whole orchestrator in one binary: `skep server` runs a node with the control
// plane, and kubectl's verbs at the top level talk to it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
)

func main() {
	// Server commands end orderly on the first signal; kubectl's verbs keep its own handling, so
	// the signals are caught only where a command asks for them.
	root := newRootCommand(os.Args, os.Stdin, os.Stdout, os.Stderr)
	if err := cli.RunNoErrOutput(root); err != nil {
		var failed exitError
		if errors.As(err, &failed) {
			if failed.message != "" {
				fmt.Fprintln(os.Stderr, "skep: "+failed.message)
			}
			os.Exit(failed.code)
		}
		cmdutil.CheckErr(err) // prints as kubectl does and exits with kubectl's codes
	}
}

// exitError ends the process with code after printing message, if there is one.
type exitError struct {
	code    int
	message string
}

func (e exitError) Error() string { return e.message }

// fail makes an error that main prints without kubectl's "error: " habits and ends with status 1.
func fail(format string, args ...any) error {
	return exitError{code: 1, message: fmt.Errorf(format, args...).Error()}
}

// untilSignal derives a context that ends with the first SIGINT or SIGTERM. A second signal kills
// the process, because the handler is removed with the first.
func untilSignal(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, stop := signal.NotifyContext(parent, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
