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

// TestConntrackMax: as many flows fit as is asked for, also when an earlier process had room for more or fewer.
func TestConntrackMax(t *testing.T) {
	dir := alone(t)
	for _, size := range []uint32{2048, 4096, 2048} {
		l, err := Load(Config{Dir: dir, ConntrackMax: size, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"conntrack_tcp", "conntrack_udp"} {
			if got := l.Maps().Capacity()[name]; got != size {
				t.Errorf("%s has room for %d, want %d", name, got, size)
			}
		}
		if err := l.RemoveOldMaps(); err != nil {
			t.Error(err)
		}
		l.Close()
	}
}

// TestParseNodePortMode: every mode has a name, and nothing else is one.
func TestParseNodePortMode(t *testing.T) {
	for text, want := range map[string]NodePortMode{"": SNAT, "snat": SNAT, "dsr": DSR, "hybrid": Hybrid, "DSR": ""} {
		if got, err := ParseNodePortMode(text); got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", text, got, err)
		}
	}
}

// TestXDPModes: which modes are tried, and that a device has one at a time, which goes when it is to.
func TestXDPModes(t *testing.T) {
	for _, c := range []struct {
		mode XDPMode
		kind string
		want []XDPMode
	}{
		{XDPAuto, "device", []XDPMode{XDPNative, XDPGeneric}}, {XDPAuto, "veth", []XDPMode{XDPGeneric}},
		{XDPNative, "veth", []XDPMode{XDPNative}}, {XDPGeneric, "device", []XDPMode{XDPGeneric}}, {XDPOff, "device", nil},
	} {
		if got := c.mode.tries(c.kind); !slices.Equal(got, c.want) {
			t.Errorf("%s on a %s: %v", c.mode, c.kind, got)
		}
	}
	dir := alone(t)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0", TxQLen: -1}, PeerName: "veth1"}); err != nil {
		t.Fatal(err)
	}
	veth, err := netlink.LinkByName("veth0")
	if err != nil {
		t.Fatal(err)
	}
	index := veth.Attrs().Index
	for _, c := range []struct{ mode, took XDPMode }{{XDPAuto, XDPGeneric}, {XDPNative, XDPNative}, {XDPNative, XDPNative}, {XDPGeneric, XDPGeneric}, {XDPOff, XDPOff}} {
		l, err := Load(Config{Dir: dir, XDP: c.mode, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		took, err := l.AttachXDP(index)
		if err != nil || took != c.took {
			t.Errorf("%s took %s, %v", c.mode, took, err)
		}
		used, err := XDPDevices(dir)
		if err != nil || used[index] != c.took && c.took != XDPOff || (c.took == XDPOff) != (len(used) == 0) {
			t.Errorf("%s: used are %v, %v", c.mode, used, err)
		}
		l.Close()
	}
	// The loopback device has no driver's mode: to ask for it is an error that says what to do.
	l, err := Load(Config{Dir: dir, XDP: XDPNative, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.AttachXDP(1); err == nil || !strings.Contains(err.Error(), "--xdp=off") {
		t.Errorf("native on lo: %v", err)
	}
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
