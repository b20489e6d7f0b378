// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/api"
	"skep.io/skep/dataplane"
	"skep.io/skep/node/pods"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/volumes"
)

func newResetCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var yes bool
	dataDir := api.DefaultDataDir
	c := &cobra.Command{
		Use:   "reset",
		Short: "Take every trace of skep off this machine: containers, devices, programs, rules, data",
		Long: "Take every trace of skep off this machine: it stops the server, kills all containers, and removes\n" +
			"namespaces, devices, routes, mounts, pinned programs, iptables rules, cgroups and all data.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return fail("reset removes what only root can remove: run it with sudo")
			}
			if !yes && !confirmed(streams, dataDir) {
				return fail("nothing was removed")
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			return runReset(ctx, streams, dataDir)
		},
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "Do not ask")
	c.Flags().StringVar(&dataDir, "data-dir", dataDir, "The server's --data-dir")
	return c
}

func confirmed(streams genericiooptions.IOStreams, dataDir string) bool {
	fmt.Fprintf(streams.Out, "This stops skep on this machine, kills all of its containers, and deletes %s with all objects.\nType yes to go on: ", dataDir)
	line, _ := bufio.NewReader(streams.In).ReadString('\n') // an end of input is not a yes
	return strings.TrimSpace(line) == "yes"
}

// A resetStep takes one kind of trace off the machine. Steps are idempotent, and a later one does
// not need an earlier one to have succeeded.
type resetStep struct {
	what string
	do   func(context.Context) error
}

func resetSteps(dataDir string) []resetStep {
	return []resetStep{
		{"server", func(context.Context) error {
			pid, err := runningServer()
			if err != nil || pid == 0 {
				return err
			}
			return stopProcess(pid)
		}},
		{"containers", func(ctx context.Context) error { return runtime.Cleanup(ctx, dataDir, api.RunDir) }},
		{"pods' namespaces, devices and cgroups", func(ctx context.Context) error { return sandbox.Cleanup(ctx, api.RunDir, "kubepods") }},
		{"pods' files and logs", func(ctx context.Context) error {
			return pods.Cleanup(ctx, filepath.Join(dataDir, "pods"), api.PodLogsDir)
		}},
		{"volumes", func(ctx context.Context) error { return volumes.Cleanup(ctx, filepath.Join(dataDir, "pods")) }},
		{"eBPF programs, routes and iptables rules", func(ctx context.Context) error { return dataplane.Cleanup(ctx, api.BPFDir) }},
		{"files", func(context.Context) error { return removeFiles(dataDir) }},
	}
}

func runReset(ctx context.Context, streams genericiooptions.IOStreams, dataDir string) error {
	if err := refuseForeign(dataDir); err != nil {
		return fail("%w", err)
	}
	var errs []error
	for _, step := range resetSteps(dataDir) {
		if err := step.do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", step.what, err))
			fmt.Fprintf(streams.ErrOut, "  ✗ %s: %v\n", step.what, err)
			continue
		}
		fmt.Fprintf(streams.Out, "  ✓ %s\n", step.what)
	}
	if err := errors.Join(errs...); err != nil {
		return fail("some traces remain (above); `skep reset` can be run again")
	}
	fmt.Fprintln(streams.Out, "skep has left this machine.")
	return nil
}

// refuseForeign protects directories that are not skep's from a mistyped --data-dir.
func refuseForeign(dataDir string) error {
	entries, err := os.ReadDir(dataDir)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	for _, own := range []string{"server", "agent", "containerd", "images", "pods"} {
		if _, err := os.Stat(filepath.Join(dataDir, own)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s does not look like skep's data directory: nothing was removed", dataDir)
}

// removeFiles deletes what is on disk. It empties directories that are mount points themselves.
func removeFiles(dataDir string) error {
	errs := []error{emptyAndRemove(dataDir), emptyAndRemove(api.RunDir), os.RemoveAll(api.KubeconfigPath)}
	// The directory goes only if nothing of the administrator's is left in it.
	if err := os.Remove(api.ConfigDir); err != nil && !errors.Is(err, os.ErrNotExist) && !isNotEmptyOrBusy(err) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func emptyAndRemove(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	if err := os.Remove(dir); err != nil && !isNotEmptyOrBusy(err) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
