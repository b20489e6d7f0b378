// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// alone puts the test's thread into network and mount namespaces of its own, with a BPF file system.
func alone(t testing.TB) (dir string) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	return filepath.Join("/sys/fs/bpf", fmt.Sprintf("skep-loader-test-%d", time.Now().UnixNano()))
}

func load(t testing.TB, dir string) *Loader {
	t.Helper()
	l, err := Load(Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestClsact: where the kernel has no tcx, filters take its place, are replaced and removed.
func TestClsact(t *testing.T) {
	l := load(t, alone(t))
	defer l.Close()
	for range 2 {
		for program, parent := range map[string]uint32{"from_pod": netlink.HANDLE_MIN_INGRESS, "to_pod": netlink.HANDLE_MIN_EGRESS} {
			if err := l.attachClsact(1, program, parent); err != nil {
				t.Fatal(err)
			}
		}
		if got := filters(t); !slices.Equal(got, []string{"skep_from_pod", "skep_to_pod"}) {
			t.Errorf("filters are %v", got)
		}
	}
	for range 2 {
		if err := l.DetachPod(1); err != nil {
			t.Fatal(err)
		}
		if got := filters(t); len(got) != 0 {
			t.Errorf("filters are %v", got)
		}
	}
	if err := l.DetachPod(9999); err != nil {
		t.Errorf("a device that is gone: %v", err)
	}
}

func filters(t *testing.T) (out []string) {
	t.Helper()
	lo, err := netlink.LinkByIndex(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		list, err := netlink.FilterList(lo, parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			if b, ok := f.(*netlink.BpfFilter); ok {
				out = append(out, b.Name)
			}
		}
	}
	return out
}

// TestAdopt: links are updated in place, and made anew when their target is another.
func TestAdopt(t *testing.T) {
	dir := alone(t)
	first := load(t, dir)
	if err := first.AttachPod(1); err != nil {
		t.Fatal(err)
	}
	if err := first.AttachIngress(); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second := load(t, dir)
	defer second.Close()
	before := pins(t, dir)
	for range 2 {
		if err := second.AttachPod(1); err != nil {
			t.Fatal(err)
		}
		if err := second.AttachIngress(); err != nil {
			t.Fatal(err)
		}
	}
	if after := pins(t, dir); !slices.Equal(before, after) {
		t.Errorf("pins were %v, are %v", before, after)
	}
	if pods, err := second.Pods(); err != nil || !slices.Equal(slices.Compact(pods), []int{1}) && len(pods) == 0 {
		t.Errorf("pods on %v, %v", pods, err)
	}
	if err := Cleanup(dir); err != nil {
		t.Fatal(err)
	}
	if err := Cleanup(dir); err != nil {
		t.Errorf("again: %v", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("pins are left")
	}
}

// pins lists link pins with their inodes: a link that is updated in place keeps its own.
func pins(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "links"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprint(e.Name(), " ", inodeOf(info)))
	}
	return out
}

// TestErrors: what is wrong is said with what to do about it.
func TestErrors(t *testing.T) {
	if err := EnsureBPFFS(filepath.Join(t.TempDir(), "skep")); err == nil || !strings.Contains(err.Error(), "mount") {
		t.Errorf("not a BPF file system: %v", err)
	}
	l := load(t, alone(t))
	defer l.Close()
	if err := l.AttachSockets(t.TempDir()); err == nil || !strings.Contains(err.Error(), "cgroup2") {
		t.Errorf("not a cgroup: %v", err)
	}
	if err := l.AttachPod(9999); err == nil {
		t.Error("a device that is not there")
	}
}

func BenchmarkLoad(b *testing.B) {
	dir := alone(b)
	for range b.N {
		load(b, dir).Close()
		if err := Cleanup(dir); err != nil {
			b.Fatal(err)
		}
	}
}
