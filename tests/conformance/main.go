// SPDX-License-Identifier: Apache-2.0

// Command conformance runs Kubernetes' own conformance suite against a cluster of two nodes of the harness.
//
// The suite, the programs of its images, kubectl and Ginkgo come from module ./suite, at the version of Kubernetes that
// skep serves. Nothing is pulled: the images are made here and imported by each node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/tests/cluster"
)

func main() {
	cluster.Helper()
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	focus, skip, dir, place string
	procs                   int
	timeout                 time.Duration
	buildOnly               bool
}

func parse(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("conformance", flag.ContinueOnError)
	f.StringVar(&o.focus, "focus", `\[Conformance\]`, "regular expression of the tests to run")
	f.StringVar(&o.skip, "skip", "", "regular expression of the tests not to run")
	f.StringVar(&o.dir, "dir", ".build/conformance", "for the suite, its images and its reports")
	f.StringVar(&o.place, "place", "", "file with the place of a node of a running cluster (skep-cluster writes it), instead of a new cluster")
	f.IntVar(&o.procs, "procs", 1, "how many tests may run at once; more than one leaves out [Serial] ones")
	f.DurationVar(&o.timeout, "timeout", 10*time.Hour, "for the whole suite")
	f.BoolVar(&o.buildOnly, "build-only", false, "build the suite and its images, and run nothing")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %s", f.Arg(0))
	}
	var err error
	o.dir, err = filepath.Abs(o.dir)
	return o, err
}

func run(args []string, out io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	images := filepath.Join(o.dir, "images")
	if o.place == "" {
		if err := build(ctx, o.dir, images); err != nil || o.buildOnly {
			return err
		}
	}
	reports := filepath.Join(o.dir, "reports", time.Now().UTC().Format("20060102T150405"))
	if err := os.MkdirAll(reports, 0o755); err != nil {
		return err
	}
	if o.place != "" {
		where, err := os.ReadFile(o.place)
		if err != nil {
			return err
		}
		return report(out, reports, suite(cluster.CommandIn(ctx, string(where), o.ginkgo(reports)...), o.dir, reports))
	}
	nodes, err := start(ctx, images)
	if err == nil {
		err = report(out, reports, suite(nodes[0].Exec(ctx, o.ginkgo(reports)...), o.dir, reports))
	}
	for _, n := range slices.Backward(nodes) { // the server's LAN ends with it
		err = errors.Join(err, n.Discard(context.WithoutCancel(ctx)))
	}
	return err
}

// ginkgo is the command that runs the suite.
func (o options) ginkgo(reports string) []string {
	skip := o.skip
	if o.procs > 1 {
		skip = strings.Trim(`\[Serial\]|`+skip, "|")
	}
	return []string{
		filepath.Join(o.dir, "ginkgo"), "--no-color", "--timeout=" + o.timeout.String(), fmt.Sprintf("--procs=%d", o.procs),
		"--focus=" + o.focus, "--skip=" + skip, filepath.Join(o.dir, "e2e.test"), "--",
		"--kubeconfig=/etc/skep/kubeconfig", "--provider=skeleton", "--report-dir=" + reports, "--disable-log-dump",
		"--kubectl-path=" + filepath.Join(o.dir, "kubectl"), "--delete-namespace-on-failure=true",
	}
}

// suite runs it; all that it says is in suite.log.
func suite(cmd *exec.Cmd, dir, reports string) error {
	log, err := os.Create(filepath.Join(reports, "suite.log"))
	if err != nil {
		return err
	}
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	return errors.Join(cmd.Run(), log.Close())
}

// report prints what the suite's report says. ran is how its process ended: not well if a test failed.
func report(out io.Writer, reports string, ran error) error {
	f, err := os.Open(filepath.Join(reports, "junit_01.xml"))
	if err != nil {
		return fmt.Errorf("the suite did not come to its report, see %s/suite.log: %w", reports, errors.Join(ran, err))
	}
	defer f.Close()
	groups, err := read(f)
	if err != nil {
		return err
	}
	failed := summarize(out, groups)
	if failed > 0 || ran != nil {
		return fmt.Errorf("%d tests failed (%w); see %s", failed, ran, reports)
	}
	return nil
}

// start makes the cluster: a server and an agent, both of which run pods. What there is of it is returned with an error, too.
func start(ctx context.Context, images string) ([]*cluster.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	built, err := cluster.Build(ctx, ".build/e2e")
	if err != nil {
		return nil, err
	}
	data, err := os.MkdirTemp("", "skep-conformance-")
	if err != nil {
		return nil, err
	}
	server, err := cluster.Start(ctx, cluster.Options{Name: "conf", Dir: filepath.Join(data, "server"), Bin: built.Bin, ImagesDir: images})
	if err != nil {
		return nil, err
	}
	nodes := []*cluster.Node{server}
	if err := server.WaitReady(ctx); err != nil {
		return nodes, err
	}
	token, err := server.Token(ctx)
	if err != nil {
		return nodes, err
	}
	agent, err := cluster.Start(ctx, cluster.Options{
		Name: "conf-agent", Dir: filepath.Join(data, "agent"), Bin: built.Bin, ImagesDir: images, Of: server, Args: []string{"--token", token},
	})
	if err != nil {
		return nodes, err
	}
	nodes = append(nodes, agent)
	return nodes, agent.WaitReady(ctx)
}
