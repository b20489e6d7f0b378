// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"skep.io/skep/tests/cluster"
)

// idleSection lets a node with one application rest for a minute and looks at what it takes. In the
// same minute upstream's control plane rests beside it, with neither node nor application.
func idleSection(ctx context.Context, b *bench) (err error) {
	theirs, err := b.newUpstream(ctx, "idle-upstream")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, theirs.stop()) }()
	if _, _, err := theirs.start(ctx); err != nil {
		return err
	}
	n, err := b.node(ctx, "idle")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	if err := deployWeb(ctx, n); err != nil {
		return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
	}
	rest := time.Minute
	if b.quick {
		rest = 5 * time.Second
	}
	// The minute before counts: what starting left behind has settled after it.
	if err := pause(ctx, rest); err != nil {
		return err
	}
	before, err := use(n, theirs)
	if err != nil {
		return err
	}
	if err := pause(ctx, rest); err != nil {
		return err
	}
	after, err := use(n, theirs)
	if err != nil {
		return err
	}
	const alone = "upstream's control plane alone "
	b.add("idle: resident memory of all processes, shims and pods apart", mebibytes(after.server.RSS),
		alone+mebibytes(after.upstream.RSS), ratio(after.server.RSS, after.upstream.RSS), "200 MB")
	b.add("the same, what is shared counted once (PSS)", mebibytes(after.server.PSS),
		alone+mebibytes(after.upstream.PSS), ratio(after.server.PSS, after.upstream.PSS), "")
	b.add("idle: the pod's shim", mebibytes(after.shims.RSS), "proportional "+mebibytes(after.shims.PSS), "", "")
	ours, other := after.server.CPU-before.server.CPU, after.upstream.CPU-before.upstream.CPU
	share := func(cpu time.Duration) string {
		return fmt.Sprintf("%.2f %% of a core", 100*cpu.Seconds()/rest.Seconds())
	}
	b.add("idle: processor", share(ours), alone+share(other), ratio(ours, other), "1.5 %")
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

type nodeUse struct{ server, shims, upstream cluster.ProcessUse }

func use(n *cluster.Node, beside *upstream) (total nodeUse, err error) {
	if total.upstream, err = beside.use(); err != nil {
		return total, err
	}
	procs, err := n.Processes()
	if err != nil {
		return total, err
	}
	for _, p := range procs {
		sum := &total.server
		switch {
		case strings.Contains(p.Command, "containerd-shim"):
			sum = &total.shims
		case !strings.Contains(p.Command, "skep"):
			continue // a pod's
		}
		sum.RSS += p.RSS
		sum.PSS += p.PSS
		sum.CPU += p.CPU
	}
	return total, nil
}
