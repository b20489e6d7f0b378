// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"sigs.k8s.io/yaml"

	"skep.io/skep/api"
)

// binaries are what a node needs of this repository; they lie side by side wherever skep is.
var binaries = []string{"skep", "containerd-shim-runc-v2"}

// places are where install puts things, below root (which is / but in tests and when an image is made).
type places struct{ root, bin string }

func (p places) path(name string) string { return filepath.Join(p.root, name) }

func (p places) binary(name string) string { return p.path(filepath.Join(p.bin, name)) }

func (p places) unit(role string) string {
	return p.path("/etc/systemd/system/skep-" + role + ".service")
}

func (p places) config(role string) string {
	if role == "server" {
		return p.path(api.ServerConfigPath)
	}
	return p.path(api.AgentConfigPath)
}

var roles = []string{"server", "agent"}

func newInstallCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "install server|agent [flags of that command]",
		Short: "Install skep on this machine as a service that systemd starts",
		Long: "Install skep on this machine as a service that systemd starts: the two binaries into --bin-dir, a unit,\n" +
			"and the given flags of `skep server` or `skep agent` as keys of its YAML file. Done again, it replaces\n" +
			"binaries and unit, and the configuration only if flags are given: this is how a machine is upgraded.\n" +
			"Pods keep running meanwhile. `skep uninstall` takes it away again.",
		Example: "  skep install server --tls-san skep.example.org\n  skep install agent --server https://HOST:6443 --token \"$TOKEN\"",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, role := range roles {
		c.AddCommand(newInstallRole(role, streams))
	}
	return c
}

func newInstallRole(role string, streams genericiooptions.IOStreams) *cobra.Command {
	p := places{}
	noStart := false
	given := pflag.NewFlagSet(role, pflag.ContinueOnError)
	if role == "server" {
		(&serverOptions{}).addFlags(given)
	} else {
		(&agentOptions{}).addFlags(given)
	}
	c := &cobra.Command{
		Use: role, Short: "Install `skep " + role + "`", Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 && p.root == "/" {
				return fail("install writes where only root may: run it with sudo")
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			if err := install(ctx, p, role, given, !noStart, streams.Out); err != nil {
				return fail("%w", err)
			}
			return nil
		},
	}
	given.VisitAll(func(f *pflag.Flag) {
		if f.Name != "config" { // it is what is written
			c.Flags().AddFlag(f)
		}
	})
	c.Flags().StringVar(&p.root, "root", "/", "Where the file system is that is installed to; another than / is not started")
	c.Flags().StringVar(&p.bin, "bin-dir", "/usr/local/bin", "Where the binaries go")
	c.Flags().BoolVar(&noStart, "no-start", false, "Enable the service, but do not start it")
	return c
}

// install puts everything in place, the unit last, and starts the service.
func install(ctx context.Context, p places, role string, given *pflag.FlagSet, start bool, out io.Writer) error {
	for _, other := range roles {
		if _, err := os.Stat(p.unit(other)); err == nil && other != role {
			return fmt.Errorf("this machine is installed as %s (%s): `skep uninstall` first; a server is a node, too", other, p.unit(other))
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, name := range binaries {
		from := filepath.Join(filepath.Dir(self), name)
		if name == "skep" {
			from = self
		}
		if err := copyBinary(from, p.binary(name)); err != nil {
			return fmt.Errorf("install %s: %w", name, err)
		}
		fmt.Fprintf(out, "  ✓ %s\n", p.binary(name))
	}
	if values := givenFlags(given); len(values) > 0 {
		data, err := yaml.Marshal(values)
		if err != nil {
			return err
		}
		if err := replaceFile(p.config(role), data, 0o600); err != nil { // it may hold a token
			return err
		}
		fmt.Fprintf(out, "  ✓ %s\n", p.config(role))
	}
	if err := replaceFile(p.unit(role), []byte(unitFile(role, filepath.Join(p.bin, "skep"))), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "  ✓ %s\n", p.unit(role))
	service := "skep-" + role + ".service"
	if !p.hasSystemd() {
		fmt.Fprintf(out, "systemd does not run here: the service starts with the next boot of a system that has it, or by hand: skep %s\n", role)
		return enableOffline(p, service)
	}
	steps := [][]string{{"daemon-reload"}, {"enable", service}}
	if start {
		steps = append(steps, []string{"restart", service})
	}
	return systemctl(ctx, steps)
}

// givenFlags are the flags that were set, as the YAML file names them. Not Visit, which knows only what this
// very set has parsed: the command's own set parses these flags.
func givenFlags(flags *pflag.FlagSet) map[string]any {
	values := map[string]any{}
	flags.VisitAll(func(f *pflag.Flag) {
		if !f.Changed {
			return
		}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values[f.Name] = list.GetSlice()
			return
		}
		values[f.Name] = f.Value.String()
	})
	return values
}

// hasSystemd as sd_booted(3) finds it out.
func (p places) hasSystemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return p.root == "/" && err == nil
}

// enableOffline does what `systemctl enable` does, where no systemd runs.
func enableOffline(p places, service string) error {
	link := p.path("/etc/systemd/system/multi-user.target.wants/" + service)
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("../"+service, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func systemctl(ctx context.Context, steps [][]string) error {
	for _, args := range steps {
		if out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

func newUninstallCommand(streams genericiooptions.IOStreams) *cobra.Command {
	p := places{}
	yes, keep := false, false
	dataDir := api.DefaultDataDir
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Undo `skep install`: stop the service, remove unit, configuration and binaries, and reset the machine",
		Args:  cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 && p.root == "/" {
				return fail("uninstall removes what only root may: run it with sudo")
			}
			if !keep && !yes && !confirmed(streams, dataDir) {
				return fail("nothing was removed")
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			if err := uninstall(ctx, p, streams.Out); err != nil {
				return fail("%w", err)
			}
			if keep || p.root != "/" {
				return nil
			}
			return runReset(ctx, streams, dataDir)
		},
	}
	c.Flags().StringVar(&p.root, "root", "/", "Where the file system is that was installed to")
	c.Flags().StringVar(&p.bin, "bin-dir", "/usr/local/bin", "Where the binaries are")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "Do not ask")
	c.Flags().BoolVar(&keep, "keep-data", false, "Leave pods and data as they are")
	c.Flags().StringVar(&dataDir, "data-dir", dataDir, "The --data-dir of server or agent")
	return c
}

// uninstall removes what install put in place, the unit first.
func uninstall(ctx context.Context, p places, out io.Writer) error {
	var files []string
	for _, role := range roles {
		service := "skep-" + role + ".service"
		if _, err := os.Stat(p.unit(role)); err == nil && p.hasSystemd() {
			if err := systemctl(ctx, [][]string{{"disable", "--now", service}}); err != nil {
				return err
			}
		}
		files = append(files, p.path("/etc/systemd/system/multi-user.target.wants/"+service), p.unit(role), p.config(role))
	}
	for _, name := range slices.Backward(binaries) {
		files = append(files, p.binary(name))
	}
	var errs []error
	for _, file := range files {
		switch err := os.Remove(file); {
		case err == nil:
			fmt.Fprintf(out, "  ✓ %s\n", file)
		case !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, err)
		}
	}
	if p.hasSystemd() {
		errs = append(errs, systemctl(ctx, [][]string{{"daemon-reload"}}))
	}
	return errors.Join(errs...)
}

// copyBinary replaces to by from in one step, so that a running one keeps its file.
func copyBinary(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("%w: unpack the whole archive, its binaries belong together", err)
	}
	defer in.Close()
	if a, err := in.Stat(); err == nil {
		if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
			return nil // it is the installed one that runs
		}
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = io.Copy(tmp, in)
	if err = errors.Join(err, tmp.Chmod(0o755), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), to)
}

// replaceFile writes a file in one step.
func replaceFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}
