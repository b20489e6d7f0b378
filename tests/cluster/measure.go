// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// ProcessUse is what one process takes.
type ProcessUse struct {
	Pid      int
	Command  string
	RSS, PSS int64         // bytes
	CPU      time.Duration // user and system, since it started
}

// Processes lists who runs on the node, the harness's own init apart.
func (n *Node) Processes() ([]ProcessUse, error) {
	procs, err := processes(n.all, n.cgroup)
	if err != nil {
		return nil, err
	}
	delete(procs, n.Pid())
	var all []ProcessUse
	for pid, command := range procs {
		use, err := UseOf(pid)
		if errors.Is(err, os.ErrNotExist) {
			continue // ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		use.Command = command
		all = append(all, use)
	}
	return all, nil
}

// UseOf is what the process takes; its Command stays empty.
func UseOf(pid int) (ProcessUse, error) {
	use := ProcessUse{Pid: pid}
	rollup, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return use, err
	}
	defer rollup.Close()
	raw, err := io.ReadAll(rollup)
	if err != nil {
		return use, err
	}
	use.RSS, use.PSS = field(raw, "Rss:")<<10, field(raw, "Pss:")<<10
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return use, err
	}
	use.CPU = cpuTime(stat)
	return use, nil
}
