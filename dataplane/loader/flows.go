// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"skep.io/skep/dataplane/conntrack"
	"skep.io/skep/dataplane/maps"
)

// Flows lists every tracked flow.
func (l *Loader) Flows() (map[maps.Tuple]maps.Flow, error) { return l.maps.Flows() }

// Tally is what the programs noted and forgot.
func (l *Loader) Tally() (t conntrack.Tally, err error) {
	counters, err := l.maps.Counters()
	if err != nil {
		return t, fmt.Errorf("flows: %w", err)
	}
	two := func(first int) conntrack.ByProtocol {
		return conntrack.ByProtocol{TCP: counters[first], UDP: counters[first+1]}
	}
	return conntrack.Tally{Added: two(maps.CountFlowsAdded), Removed: two(maps.CountFlowsRemoved), Failed: two(maps.CountFlowsFailed)}, nil
}

// Forget deletes a flow only if no packet came since lastSeen was read. A program compares and
// deletes, as no system call does both.
func (l *Loader) Forget(t maps.Tuple, lastSeen uint64) error {
	ctx := struct {
		Tuple    maps.Tuple
		LastSeen uint64
	}{t, lastSeen}
	if _, err := l.programs["forget_flow"].Run(&ebpf.RunOptions{Context: ctx}); err != nil {
		return fmt.Errorf("forgetting a flow: %w", err)
	}
	return nil
}
