// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/robfig/cron/v3"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/snapshot"
	"skep.io/skep/controlplane/store"
)

// snapshotOptions are the flags about snapshots that a server takes by itself.
type snapshotOptions struct {
	dir       string
	schedule  string
	retention int
}

func (o *snapshotOptions) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.dir, "snapshot-dir", "", "Where snapshots are kept; another disk is a better place (default: DATA-DIR/snapshots)")
	f.StringVar(&o.schedule, "snapshot-schedule", "0 */12 * * *", "When snapshots are taken, as in a CronJob and in this host's time zone; \"\": never")
	f.IntVar(&o.retention, "snapshot-retention", 5, "How many scheduled snapshots are kept; those that somebody asked for stay")
}

// snapshotSettings are snapshotOptions once they have been checked.
type snapshotSettings struct {
	dir       string
	schedule  cron.Schedule // nil: never
	retention int
}

func snapshotDir(dir, dataDir string) string {
	return cmp.Or(dir, filepath.Join(dataDir, "snapshots"))
}

func (o *snapshotOptions) complete(dataDir string, bad func(flag, format string, args ...any)) snapshotSettings {
	s := snapshotSettings{retention: o.retention}
	var err error
	if s.dir, err = filepath.Abs(snapshotDir(o.dir, dataDir)); err != nil {
		bad("snapshot-dir", "%w", err)
	}
	if o.schedule != "" {
		if s.schedule, err = snapshot.ParseSchedule(o.schedule); err != nil {
			bad("snapshot-schedule", "%w", err)
		}
	}
	if o.retention < 1 {
		bad("snapshot-retention", "%d: at least one is kept (--snapshot-schedule=\"\" takes none)", o.retention)
	}
	return s
}

// removeLimit bounds the wait for enough servers to be connected.
const removeLimit = 30 * time.Second

// localParts are what a server does with its own disk: snapshots, and the socket by which it is told to.
func (p *process) localParts(etcd *store.Store) []part {
	log := p.log.With("part", "snapshots")
	taker := &snapshot.Taker{Dir: p.settings.snapshots.dir, Store: etcd, Keys: p.authority.Lasting, Node: p.settings.nodeName, Version: skepVersion}
	orders := http.NewServeMux()
	orders.HandleFunc("POST /snapshots", control(func(ctx context.Context, name string) (snapshot.Taken, error) {
		taken, err := taker.Take(ctx, name, snapshot.OnDemand, time.Now())
		if err == nil {
			log.Info("snapshot taken", "snapshot", taken.Name, "revision", taken.Revision, "bytes", taken.Size)
		}
		return taken, err
	}))
	orders.HandleFunc("POST /members/list", control(func(ctx context.Context, _ string) ([]store.Member, error) { return etcd.Members(ctx) }))
	orders.HandleFunc("POST /members/remove", control(func(ctx context.Context, name string) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, removeLimit)
		defer cancel()
		return true, etcd.Remove(ctx, name)
	}))
	p.secretsOrders(etcd, orders)
	profileOrders(orders)
	if p.agreed != nil {
		p.authorityOrders(etcd, orders)
	}
	parts := []part{{"control socket", func(ctx context.Context) error {
		return serveControl(ctx, controlSocket, orders, p.log.With("part", "control"))
	}}}
	if p.member != nil {
		parts = append(parts, part{"certificate for other servers", p.renewPeer}, part{"agreement with other servers", p.keepAgreed})
	}
	if schedule := p.settings.snapshots.schedule; schedule != nil && p.settings.servers.etcd == nil {
		parts = append(parts, part{"snapshots", func(ctx context.Context) error {
			return taker.Run(ctx, schedule, p.settings.snapshots.retention, log)
		}})
	}
	return parts
}

func newSnapshotCommand(streams genericiooptions.IOStreams) *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Save, list and restore snapshots of the control plane: all objects, and the cluster's keys",
		Long: "Save, list and restore snapshots of the control plane. A snapshot has all objects, and the keys that\n" +
			"machines and pods know the cluster by; who has it has the cluster. Contents of volumes are not in it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(newSnapshotSaveCommand(streams), newSnapshotListCommand(streams), newSnapshotRestoreCommand(streams))
	return c
}

func newSnapshotSaveCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:   "save",
		Short: "Take a snapshot on this server, and print where it is",
		Long: "Take a snapshot on this server, and print where it is: in the server's --snapshot-dir. It holds every\n" +
			"write that was acknowledged before. Copy it to another machine: it is of use when this one is lost.",
		Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name != "" {
				if err := snapshot.CheckName(name); err != nil {
					return fail("--name: %w", err)
				}
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			taken, err := order[snapshot.Taken](ctx, http.MethodPost, "/snapshots", name)
			if err != nil {
				return fail("%w", err)
			}
			fmt.Fprintln(streams.Out, taken.Path)
			return nil
		},
	}
	c.Flags().StringVar(&name, "name", "", "What to call it (default: on-demand-NODE-SECONDS)")
	return c
}

func newSnapshotListCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var dir, dataDir string
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List the snapshots on this machine, the oldest first",
		Args:  cobra.NoArgs, SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error {
			all, err := snapshot.List(snapshotDir(dir, dataDir))
			if err != nil {
				return fail("list snapshots: %w", err)
			}
			return printSnapshots(streams.Out, all, time.Now())
		},
	}
	addSnapshotPlaces(c.Flags(), &dir, &dataDir)
	return c
}

func addSnapshotPlaces(f *pflag.FlagSet, dir, dataDir *string) {
	f.StringVar(dir, "snapshot-dir", "", "The server's --snapshot-dir (default: DATA-DIR/snapshots)")
	f.StringVar(dataDir, "data-dir", api.DefaultDataDir, "The server's --data-dir")
}

func printSnapshots(out io.Writer, all []snapshot.Taken, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tAGE\tSIZE\tREVISION\tNODE\tVERSION")
	for _, s := range all {
		size := resource.NewQuantity(s.Size>>10<<10, resource.BinarySI)
		if s.Err != nil {
			fmt.Fprintf(w, "%s\t-\t%s\t-\t-\t%s\n", s.Name, size, s.Err)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", s.Name, duration.HumanDuration(now.Sub(s.Created)), size, s.Revision, s.Node, s.Version)
	}
	return w.Flush()
}

func newSnapshotRestoreCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var dir, dataDir string
	var replace bool
	c := &cobra.Command{
		Use:   "restore NAME|FILE",
		Short: "Make this machine's control plane what a snapshot has; no server may run",
		Long: "Make this machine's control plane what a snapshot has; no server may run here. The snapshot is checked\n" +
			"as a whole before anything is changed. Then `skep server` goes on from it: agents reconnect, pods that\n" +
			"the snapshot knows stay, others end. Objects that were made after the snapshot are gone.",
		Args: cobra.ExactArgs(1), SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			release, err := claimHost()
			if err != nil {
				return fail("%w", err)
			}
			defer release()
			if isAgentsDir(dataDir) {
				return fail("%s is an agent's: this machine has joined another server's cluster; `skep reset` takes it out", dataDir)
			}
			file, err := snapshot.Find(snapshotDir(dir, dataDir), args[0])
			if err != nil {
				return fail("%w", err)
			}
			if err := os.MkdirAll(dataDir, 0o755); err != nil {
				return fail("%w", err)
			}
			ctx, stop := untilSignal(cmd)
			defer stop()
			done, err := snapshot.Restore(ctx, file, snapshot.Target{
				DataDir: dataDir, Replace: replace, Now: time.Now(), Log: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				return fail("%w", err)
			}
			fmt.Fprintf(streams.Out, "restored what node %s had at %s (revision %d); start the server with the flags it had\n",
				done.Node, done.Created.Format(time.RFC3339), done.Revision)
			if done.Aside != "" {
				fmt.Fprintf(streams.Out, "what was there before is in %s\n", done.Aside)
			}
			return nil
		},
	}
	addSnapshotPlaces(c.Flags(), &dir, &dataDir)
	c.Flags().BoolVar(&replace, "replace", false, "Replace the control plane that is in --data-dir; it is kept under another name")
	return c
}
