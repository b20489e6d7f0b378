// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// harnessLeaf is where a node's own processes live in cgroup2, because a cgroup that hands
// controllers to its children may hold no process itself.
const harnessLeaf = "harness"

// hierarchy is one mounted cgroup file system.
type hierarchy struct {
	Mount   string // where the machine mounts it
	V2      bool
	Options string // to mount it again: the controllers or the name
}

// hierarchies reads what the machine has: cgroup v1, cgroup2 or both.
func hierarchies() ([]hierarchy, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("list cgroup mounts: %w", err)
	}
	var all []hierarchy
	for _, m := range mounts {
		h := hierarchy{Mount: m.Mountpoint, V2: m.FSType == "cgroup2"}
		if !h.V2 {
			var options []string
			for option := range strings.SplitSeq(m.VFSOptions, ",") {
				if option != "rw" && option != "ro" && option != "xattr" && !strings.HasPrefix(option, "release_agent=") {
					options = append(options, option)
				}
			}
			h.Options = strings.Join(options, ",")
			if strings.HasPrefix(h.Options, "name=") {
				h.Options = "none," + h.Options
			}
		}
		all = append(all, h)
	}
	if len(all) == 0 {
		return nil, errors.New("no cgroup file system is mounted")
	}
	return all, nil
}

// makeCgroups makes the cgroup called name in every hierarchy and returns those directories that
// a process of the node joins.
func makeCgroups(all []hierarchy, name string) ([]string, error) {
	var join []string
	for _, h := range all {
		dir := filepath.Join(h.Mount, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		if h.V2 {
			delegate(h.Mount)
			dir = filepath.Join(dir, harnessLeaf)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, fmt.Errorf("make cgroup: %w", err)
			}
		} else if strings.Contains(h.Options, "cpuset") {
			// A new v1 cpuset has no processors and takes no process until it is given some.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				all, err := os.ReadFile(filepath.Join(h.Mount, file))
				if err != nil {
					return nil, fmt.Errorf("read cpuset: %w", err)
				}
				if err := os.WriteFile(filepath.Join(dir, file), all, 0); err != nil {
					return nil, fmt.Errorf("give cpuset its processors: %w", err)
				}
			}
		}
		join = append(join, dir)
	}
	return join, nil
}

// delegate lets the children of dir use every controller that dir has. What fails stays off: the
// hybrid layout has no controllers in cgroup2.
func delegate(dir string) {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for c := range strings.FieldsSeq(string(controllers)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// joinCgroups moves the calling process.
func joinCgroups(dirs []string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// cgroupDirs lists dir and everything below it, children last.
func cgroupDirs(dir string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	return dirs, err
}

// processes lists who is in the cgroup called name of any hierarchy, or below it.
func processes(all []hierarchy, name string) (map[int]string, error) {
	found := map[int]string{}
	for _, h := range all {
		dirs, err := cgroupDirs(filepath.Join(h.Mount, name))
		if err != nil {
			return nil, fmt.Errorf("list cgroup %s: %w", name, err)
		}
		for _, dir := range dirs {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				continue // removed meanwhile, or a threaded cgroup
			}
			for field := range strings.FieldsSeq(string(procs)) {
				pid, err := strconv.Atoi(field)
				if err != nil || pid == 0 {
					continue
				}
				found[pid] = commandLine(pid)
			}
		}
	}
	return found, nil
}

// commandLine of a process, or its name in brackets once it is a zombie.
func commandLine(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err == nil && len(raw) > 0 {
		return strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " "))
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return "[" + strings.TrimSpace(string(name)) + "]"
}

// removeCgroups kills whoever is left and removes the cgroup called name from every hierarchy.
// It only returns once every process is gone.
func removeCgroups(all []hierarchy, name string, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		procs, err := processes(all, name)
		if err != nil {
			return err
		}
		for pid := range procs {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		var last error
		for _, h := range all {
			dirs, err := cgroupDirs(filepath.Join(h.Mount, name))
			if err != nil {
				return err
			}
			for i := len(dirs) - 1; i >= 0; i-- {
				if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, unix.ENOENT) {
					last = fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
				}
			}
		}
		if last == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w, still in it: %v", last, procs)
		}
		time.Sleep(pollEvery) // the kernel tells nobody when a v1 cgroup empties
	}
}
