// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Stats are what a group has used.
type Stats struct {
	CPUNanos      uint64 // processor time, ns
	MemoryBytes   uint64 // charged, page cache included
	WorkingSet    uint64 // charged less inactive file pages: what eviction looks at
	RSSBytes      uint64 // anonymous memory
	MemoryLimit   uint64 // 0: none
	Pids          uint64
	OOMKills      uint64 // processes the kernel killed for this group's limit
	PageFaults    uint64
	MajorFaults   uint64
	HaveMemory    bool
	HaveProcessor bool
}

// Read reads the group's statistics; what the host's hierarchies do not count stays zero.
func Read(group string) (Stats, error) {
	all, err := Hierarchies()
	if err != nil {
		return Stats{}, err
	}
	var s Stats
	for _, h := range all {
		dir := h.Path(group)
		switch {
		case h.Unified:
			s.readUnified(dir)
		case h.Has("cpuacct"):
			if v, ok := number(filepath.Join(dir, "cpuacct.usage")); ok {
				s.CPUNanos, s.HaveProcessor = v, true
			}
		}
		if h.Has("memory") {
			s.readMemoryV1(dir)
		}
		if h.Has("pids") {
			s.Pids, _ = number(filepath.Join(dir, "pids.current"))
		}
	}
	return s, nil
}

func (s *Stats) readUnified(dir string) {
	if v, ok := number(filepath.Join(dir, "memory.current")); ok {
		s.MemoryBytes, s.HaveMemory = v, true
		stat := table(filepath.Join(dir, "memory.stat"))
		s.WorkingSet = less(v, stat["inactive_file"])
		s.RSSBytes = stat["anon"]
		s.PageFaults, s.MajorFaults = stat["pgfault"], stat["pgmajfault"]
		s.MemoryLimit, _ = number(filepath.Join(dir, "memory.max"))
		s.OOMKills = table(filepath.Join(dir, "memory.events"))["oom_kill"]
	}
	// Hybrid hosts have cpu.stat here too, but the cpuacct hierarchy then counts for the group.
	if !s.HaveProcessor {
		if stat := table(filepath.Join(dir, "cpu.stat")); len(stat) > 0 {
			s.CPUNanos, s.HaveProcessor = stat["usage_usec"]*1000, true
		}
	}
	if v, ok := number(filepath.Join(dir, "pids.current")); ok {
		s.Pids = v
	}
}

func (s *Stats) readMemoryV1(dir string) {
	v, ok := number(filepath.Join(dir, "memory.usage_in_bytes"))
	if !ok {
		return
	}
	s.MemoryBytes, s.HaveMemory = v, true
	stat := table(filepath.Join(dir, "memory.stat"))
	s.WorkingSet = less(v, stat["total_inactive_file"])
	s.RSSBytes = stat["total_rss"]
	s.PageFaults, s.MajorFaults = stat["total_pgfault"], stat["total_pgmajfault"]
	const unlimited = 1 << 62 // version 1 says "no limit" with the largest number of pages
	if limit, ok := number(filepath.Join(dir, "memory.limit_in_bytes")); ok && limit < unlimited {
		s.MemoryLimit = limit
	}
	s.OOMKills = table(filepath.Join(dir, "memory.oom_control"))["oom_kill"]
}

func less(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

func number(path string) (uint64, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return v, err == nil
}

func table(path string) map[string]uint64 {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	t := map[string]uint64{}
	for scan := bufio.NewScanner(f); scan.Scan(); {
		key, value, ok := strings.Cut(scan.Text(), " ")
		if !ok {
			continue
		}
		if v, err := strconv.ParseUint(value, 10, 64); err == nil {
			t[key] = v
		}
	}
	return t
}
