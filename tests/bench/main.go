// SPDX-License-Identifier: Apache-2.0

// Command bench measures skep on this machine and prints tables for docs/benchmarks.md. What it is
// compared with is measured in the same run, in turn; a time on a shared machine says little else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/tests/cluster"
)

func main() {
	cluster.Helper()
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is what the measurements share.
type bench struct {
	built cluster.Built
	dir   string
	quick bool
	out   io.Writer
	rows  []row
}

// row is one line of the table.
type row struct{ what, skep, beside, ratio, goal string }

// sections in the order in which they run and print: the place to add one.
var sections = []struct {
	name string
	run  func(context.Context, *bench) error
}{
	{"start", startSection},
	{"pods", podsSection},
	{"idle", idleSection},
	{"connections", connectionsSection},
	{"service", serviceSection},
	{"nodes", nodesSection},
	{"machines", machinesSection},
	{"dataplane", dataplaneSection},
	{"control", controlSection},
}

func run(args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "sections to run, separated by commas (default: all)")
	quick := flags.Bool("quick", false, "few samples: to see whether it works")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	b := &bench{out: out, quick: *quick}
	if b.dir, err = os.MkdirTemp("", "skep-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.built, err = cluster.Build(ctx, filepath.Join(".build", "e2e")); err != nil {
		return err
	}
	var failures []error
	for _, section := range sections {
		if *only != "" && !contains(*only, section.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format(time.TimeOnly), section.name)
		if err := section.run(ctx, b); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", section.name, err))
		}
	}
	b.print()
	return errors.Join(failures...)
}

func contains(list, name string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if one == name {
			return true
		}
	}
	return false
}

func (b *bench) add(what, skep, beside, ratio, goal string) {
	b.rows = append(b.rows, row{what, skep, beside, ratio, goal})
	fmt.Fprintf(os.Stderr, "  %s: %s %s\n", what, skep, ratio)
}

func (b *bench) print() {
	fmt.Fprintf(b.out, "Measured %s on Linux %s, %d cores, %s.\n\n",
		time.Now().UTC().Format("2006-01-02 15:04 MST"), release(), runtime.NumCPU(), runtime.Version())
	fmt.Fprintln(b.out, "| what | skep | beside it, in the same run | ratio | goal |")
	fmt.Fprintln(b.out, "|---|---|---|---|---|")
	for _, r := range b.rows {
		fmt.Fprintf(b.out, "| %s | %s | %s | %s | %s |\n", r.what, r.skep, r.beside, r.ratio, r.goal)
	}
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "?"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// samples is n, or few of them.
func (b *bench) samples(n int) int {
	if b.quick {
		return max(2, n/10)
	}
	return n
}

// node makes one with its server running and Ready.
func (b *bench) node(ctx context.Context, name string, args ...string) (*cluster.Node, error) {
	n, err := b.machineOf(ctx, name, cluster.Options{Args: args})
	if err != nil {
		return nil, err
	}
	ready, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := n.Restart(ready); err != nil {
		return nil, errors.Join(err, n.Discard(ctx))
	}
	return n, nil
}

func (b *bench) machine(ctx context.Context, name, images string) (*cluster.Node, error) {
	return b.machineWith(ctx, name, cluster.Options{ImagesDir: images})
}

// machineOf makes one that has the images.
func (b *bench) machineOf(ctx context.Context, name string, o cluster.Options) (*cluster.Node, error) {
	o.ImagesDir = b.built.Images
	return b.machineWith(ctx, name, o)
}

func (b *bench) machineWith(ctx context.Context, name string, o cluster.Options) (*cluster.Node, error) {
	o.Name, o.Dir, o.Bin = fmt.Sprintf("bench-%s-%d", name, os.Getpid()), filepath.Join(b.dir, name), b.built.Bin
	return cluster.NewNode(ctx, o)
}
