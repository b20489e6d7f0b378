// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Limits of a group; zero values leave the kernel's defaults.
type Limits struct {
	CPUShares   uint64 // weight in version 1's units, 2 to 262144
	CPUQuota    int64  // µs of processor time a period
	CPUPeriod   uint64 // µs
	MemoryBytes int64
	Pids        int64
}

// Set writes the limits to the hierarchies that have the controllers.
func Set(group string, l Limits) error {
	all, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		for _, w := range l.writes(h) {
			if err := put(filepath.Join(h.Path(group), w.file), w.value); err != nil {
				if h.Unified && errors.Is(err, os.ErrNotExist) {
					continue // the controller is not on in this tree: a hybrid host, or not delegated
				}
				return fmt.Errorf("cgroup %s: %s to %s: %w", group, w.value, w.file, err)
			}
		}
	}
	return nil
}

// ErrInUse means that a group uses more memory already than it is to have.
var ErrInUse = errors.New("cannot decrease memory limits")

// CheckMemory is nil if the group can be limited to that many bytes without a loss: where the new limit is lower than
// the one it has, and not above what the group uses, it is ErrInUse. Version 2 would end processes of the group to reach
// the limit, version 1 would refuse it. 0 bytes are no limit.
func CheckMemory(group string, bytes int64) error {
	if bytes <= 0 {
		return nil
	}
	s, err := Read(group)
	if err != nil {
		return err
	}
	if (s.MemoryLimit == 0 || uint64(bytes) < s.MemoryLimit) && s.MemoryBytes >= uint64(bytes) {
		return fmt.Errorf("%w: attempting to set memory limit (%d) below current usage (%d)", ErrInUse, bytes, s.MemoryBytes)
	}
	return nil
}

// put writes to a file that must exist: cgroupfs answers a try to create one with "permission denied".
func put(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

type write struct{ file, value string }

func (l Limits) writes(h Hierarchy) []write {
	var w []write
	add := func(file string, value int64) { w = append(w, write{file, strconv.FormatInt(value, 10)}) }
	if h.Unified {
		if l.CPUShares > 0 {
			add("cpu.weight", int64(Weight(l.CPUShares)))
		}
		if l.CPUQuota > 0 && l.CPUPeriod > 0 {
			w = append(w, write{"cpu.max", fmt.Sprintf("%d %d", l.CPUQuota, l.CPUPeriod)})
		}
		if l.MemoryBytes > 0 {
			add("memory.max", l.MemoryBytes)
		}
		if l.Pids > 0 {
			add("pids.max", l.Pids)
		}
		return w
	}
	if h.Has("cpu") {
		if l.CPUShares > 0 {
			add("cpu.shares", int64(l.CPUShares))
		}
		if l.CPUQuota > 0 && l.CPUPeriod > 0 {
			add("cpu.cfs_period_us", int64(l.CPUPeriod))
			add("cpu.cfs_quota_us", l.CPUQuota)
		}
	}
	if h.Has("memory") && l.MemoryBytes > 0 {
		add("memory.limit_in_bytes", l.MemoryBytes)
	}
	if h.Has("pids") && l.Pids > 0 {
		add("pids.max", l.Pids)
	}
	return w
}

// Weight converts version 1's shares [2, 262144] to version 2's weight [1, 10000], as runc does.
func Weight(shares uint64) uint64 {
	if shares < 2 {
		shares = 2
	}
	if shares > 262144 {
		shares = 262144
	}
	return 1 + (shares-2)*9999/262142
}
