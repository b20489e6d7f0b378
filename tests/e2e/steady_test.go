// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// descriptorSlack is how many more descriptors a server may have after the same work: connections to it
// and timers come and go. What leaks, leaks once a pod, of which scripts make more.
const descriptorSlack = 10

func snapshotCommand(ts *testscript.TestScript, neg bool, _ []string) {
	positive(ts, neg)
	s := state(ts)
	var err error
	s.snapshot, err = s.node.Snapshot(context.Background())
	ts.Check(err)
}

func steadyCommand(ts *testscript.TestScript, neg bool, _ []string) {
	positive(ts, neg)
	s := state(ts)
	for deadline := time.Now().Add(stepLimit); ; time.Sleep(200 * time.Millisecond) {
		now, err := s.node.Snapshot(context.Background())
		ts.Check(err)
		grown := now.Since(s.snapshot)
		more := now.Descriptors - s.snapshot.Descriptors
		if len(grown) == 0 && more <= descriptorSlack {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d more descriptors than the %d before, and left over:\n%s", more, s.snapshot.Descriptors, strings.Join(grown, "\n"))
		}
	}
}
