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

// idleSection lets a node with one application rest for a minute and looks at what it takes.
func idleSection(ctx context.Context, b *bench) (err error) {
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
	for _, phase := range []string{"settle", "measure"} {
		before, err := use(n)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rest):
		}
		if phase == "settle" {
			continue
		}
		after, err := use(n)
		if err != nil {
			return err
		}
		b.add("idle: resident memory of all processes, shims and pods apart", mebibytes(after.server.RSS),
			"proportional "+mebibytes(after.server.PSS), "", "200 MB")
		b.add("idle: the pod's shim", mebibytes(after.shims.RSS), "proportional "+mebibytes(after.shims.PSS), "", "")
		cpu := after.server.CPU - before.server.CPU
		b.add("idle: processor", fmt.Sprintf("%.2f %% of a core", 100*cpu.Seconds()/rest.Seconds()), "", "", "1.5 %")
	}
	return nil
}

type nodeUse struct{ server, shims cluster.ProcessUse }

func use(n *cluster.Node) (nodeUse, error) {
	var total nodeUse
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
