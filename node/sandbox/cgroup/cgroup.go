// SPDX-License-Identifier: Apache-2.0

// Package cgroup makes, reads and removes control groups by path in every hierarchy that is
// mounted: version 1, version 2, or both (hybrid). Paths are relative to each hierarchy's mount,
// which makes them right inside a cgroup namespace too.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// Hierarchy is one mounted tree of control groups.
type Hierarchy struct {
	Mount       string
	Unified     bool     // cgroup2
	Controllers []string // of version 1; a named hierarchy without controllers has "name=..."
}

// Has says whether a version 1 hierarchy carries the controller.
func (h Hierarchy) Has(controller string) bool { return slices.Contains(h.Controllers, controller) }

// Hierarchies reads what is mounted now.
func Hierarchies() ([]Hierarchy, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	return fromMounts(mounts), nil
}

var v1Controllers = []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory",
	"misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}

// fromMounts keeps one mount of each hierarchy: the last, since it hides those before it.
func fromMounts(mounts []*mountinfo.Info) []Hierarchy {
	var found []Hierarchy
	seen := map[string]int{}
	for _, m := range mounts {
		h := Hierarchy{Mount: m.Mountpoint, Unified: m.FSType == "cgroup2"}
		key := "unified"
		if !h.Unified {
			for _, o := range strings.Split(m.VFSOptions, ",") {
				if slices.Contains(v1Controllers, o) || strings.HasPrefix(o, "name=") {
					h.Controllers = append(h.Controllers, o)
				}
			}
			key = strings.Join(h.Controllers, ",")
		}
		if i, ok := seen[key]; ok {
			found[i] = h
			continue
		}
		seen[key] = len(found)
		found = append(found, h)
	}
	return found
}

// Path is the directory of the group in h.
func (h Hierarchy) Path(group string) string {
	return filepath.Join(h.Mount, filepath.Clean("/"+group))
}

// Create makes the group and its parents in every hierarchy, so that processes can be put into it
// and limits set on it.
func Create(group string) error {
	all, err := Hierarchies()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return errors.New("no cgroup hierarchy is mounted: mount cgroup2 at /sys/fs/cgroup")
	}
	for _, h := range all {
		if err := h.create(group); err != nil {
			return fmt.Errorf("cgroup %s: %w", group, err)
		}
	}
	return nil
}

func (h Hierarchy) create(group string) error {
	dir := h.Mount
	for _, part := range strings.Split(strings.Trim(filepath.Clean("/"+group), "/"), "/") {
		if part == "" {
			continue
		}
		parent := dir
		dir = filepath.Join(dir, part)
		if h.Unified {
			delegate(parent)
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if h.Has("cpuset") {
			// A new cpuset is empty and takes no process before it has CPUs and memory nodes.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(filepath.Join(parent, file), filepath.Join(dir, file)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// delegate switches the parent's controllers on for its children, each by itself: one that the
// kernel refuses (cpu with real-time processes, say) must not cost the others.
func delegate(dir string) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	on, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	have := strings.Fields(string(on))
	for _, c := range strings.Fields(string(data)) {
		if !slices.Contains(have, c) {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		}
	}
}

func inherit(from, to string) error {
	have, err := os.ReadFile(to)
	if err != nil {
		return err
	}
	if len(strings.TrimSpace(string(have))) > 0 {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0)
}

// Processes lists the processes of the group and of those below it.
func Processes(group string) ([]int, error) {
	all, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	pids := map[int]bool{}
	for _, h := range all {
		err := filepath.WalkDir(h.Path(group), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return skipGone(err)
			}
			data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			if err != nil {
				return skipGone(err)
			}
			for _, line := range strings.Fields(string(data)) {
				var pid int
				if _, err := fmt.Sscan(line, &pid); err == nil && pid > 0 {
					pids[pid] = true
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	list := make([]int, 0, len(pids))
	for pid := range pids {
		list = append(list, pid)
	}
	slices.Sort(list)
	return list, nil
}

func skipGone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrInvalid) {
		return nil
	}
	return err
}
