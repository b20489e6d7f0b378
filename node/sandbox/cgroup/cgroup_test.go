// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
)

func parse(t *testing.T, text string) []*mountinfo.Info {
	t.Helper()
	mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(text), mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		t.Fatal(err)
	}
	return mounts
}

func TestHierarchies(t *testing.T) {
	for name, c := range map[string]struct {
		mounts string
		want   []Hierarchy
	}{
		"v2": {"30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			[]Hierarchy{{Mount: "/sys/fs/cgroup", Unified: true}}},
		"hybrid, mounted over": {
			"31 30 0:27 / /old/memory rw - cgroup cgroup rw,memory\n" +
				"32 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
				"33 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n" +
				"34 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n" +
				"35 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" +
				"36 30 0:31 / /proc rw - proc proc rw\n",
			[]Hierarchy{
				{Mount: "/sys/fs/cgroup/memory", Controllers: []string{"memory"}},
				{Mount: "/sys/fs/cgroup/cpu,cpuacct", Controllers: []string{"cpu", "cpuacct"}},
				{Mount: "/sys/fs/cgroup/systemd", Controllers: []string{"name=systemd"}},
				{Mount: "/sys/fs/cgroup/unified", Unified: true},
			}},
	} {
		if diff := cmp.Diff(c.want, fromMounts(parse(t, c.mounts))); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestWrites(t *testing.T) {
	l := Limits{CPUShares: 1024, CPUQuota: 50000, CPUPeriod: 100000, MemoryBytes: 1 << 20, Pids: 9}
	for _, c := range []struct {
		h    Hierarchy
		want []write
	}{
		{Hierarchy{Unified: true}, []write{{"cpu.weight", "39"}, {"cpu.max", "50000 100000"}, {"memory.max", "1048576"}, {"pids.max", "9"}}},
		{Hierarchy{Controllers: []string{"cpu", "cpuacct"}}, []write{{"cpu.shares", "1024"}, {"cpu.cfs_period_us", "100000"}, {"cpu.cfs_quota_us", "50000"}}},
		{Hierarchy{Controllers: []string{"memory"}}, []write{{"memory.limit_in_bytes", "1048576"}}},
		{Hierarchy{Controllers: []string{"freezer"}}, nil},
	} {
		if got := l.writes(c.h); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c.h, got, c.want)
		}
	}
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 1024: 39, 262144: 10000, 1 << 30: 10000} {
		if got := Weight(shares); got != want {
			t.Errorf("Weight(%d) = %d, want %d", shares, got, want)
		}
	}
}

// TestLife makes a group in this machine's hierarchies, puts a process into it, and removes both.
func TestLife(t *testing.T) {
	group := fmt.Sprintf("skep-test-cgroup-%d/a/b", os.Getpid())
	root, _, _ := strings.Cut(group, "/")
	defer func() { _ = Remove(context.Background(), root) }()
	for range 2 {
		if err := Create(group); err != nil {
			t.Fatal(err)
		}
	}
	if err := Set(group, Limits{CPUShares: 100, MemoryBytes: 64 << 20, Pids: 50}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	all, err := Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		if err := os.WriteFile(h.Path(group)+"/cgroup.procs", []byte(fmt.Sprint(cmd.Process.Pid)), 0); err != nil {
			t.Errorf("%s: %v", h.Path(group), err)
		}
	}
	if pids, err := Processes(root); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("processes %v, %v", pids, err)
	}
	if s, err := Read(group); err != nil || s.MemoryLimit != 64<<20 || s.Pids != 1 {
		t.Errorf("statistics %+v, %v", s, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for range 2 {
		if err := Remove(context.Background(), root); err != nil {
			t.Error(err)
		}
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("process: %v", err)
	}
	for _, h := range all {
		if _, err := os.Stat(h.Path(root)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", h.Path(root), err)
		}
	}
	if Remove(context.Background(), "/../") == nil {
		t.Error("the root may be removed")
	}
}
