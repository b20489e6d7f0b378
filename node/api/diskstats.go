// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"skep.io/skep/node/eviction"
)

// podLink is the name of a pod's device, as the pod sees it.
const podLink = "eth0"

// addDisk adds what a pod has on disk. What cannot be measured is left out.
func (s *Server) addDisk(ctx context.Context, p *corev1.Pod, out *stats.PodStats, fs *stats.FsStats, now metav1.Time) {
	if s.cfg.Disk == nil || fs == nil {
		return
	}
	disk, err := s.cfg.Disk(ctx, p)
	if err != nil {
		if ctx.Err() == nil {
			s.cfg.Log.Warn("what a pod has on disk is not known in full", "pod", p.Namespace+"/"+p.Name, "error", err)
		}
		return
	}
	for i := range out.Containers {
		c := &out.Containers[i]
		d := disk.Containers[c.Name]
		c.Rootfs, c.Logs = usedOf(fs, d.Writable, now), usedOf(fs, d.Logs, now)
	}
	for i := range p.Spec.Volumes {
		if t, ok := disk.Volumes[p.Spec.Volumes[i].Name]; ok {
			out.VolumeStats = append(out.VolumeStats, stats.VolumeStats{Name: p.Spec.Volumes[i].Name, FsStats: *usedOf(fs, t, now)})
		}
		if v := &p.Spec.Volumes[i]; v.EmptyDir != nil && v.EmptyDir.Medium == corev1.StorageMediumMemory {
			delete(disk.Volumes, v.Name) // it is on no disk
		}
	}
	out.EphemeralStorage = usedOf(fs, disk.Sum(), now)
}

// usedOf is what a tree uses of a file system.
func usedOf(fs *stats.FsStats, t eviction.Tree, now metav1.Time) *stats.FsStats {
	out := *fs
	bytes, inodes := uint64(max(t.Bytes, 0)), uint64(max(t.Inodes, 0))
	out.Time, out.UsedBytes, out.InodesUsed = now, &bytes, &inodes
	return &out
}

// fileSystem is what the file system of a directory has; nil if that is not known.
func fileSystem(dir string, now metav1.Time) *stats.FsStats {
	var st unix.Statfs_t
	if dir == "" || unix.Statfs(dir, &st) != nil {
		return nil
	}
	size := uint64(st.Bsize)
	available, capacity, used := st.Bavail*size, st.Blocks*size, (st.Blocks-st.Bfree)*size
	files, free := st.Files, st.Ffree
	taken := files - min(free, files)
	return &stats.FsStats{Time: now, AvailableBytes: &available, CapacityBytes: &capacity, UsedBytes: &used, Inodes: &files, InodesFree: &free, InodesUsed: &taken}
}

// limitStats is how many processes and threads there may be, and how many there are.
func limitStats(now metav1.Time) *stats.RlimitStats {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return nil
	}
	raw, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return nil
	}
	most, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return nil
	}
	running := int64(info.Procs)
	return &stats.RlimitStats{Time: now, MaxPID: &most, NumOfRunningProcesses: &running}
}

// networkStats reads the counters of a network namespace's devices (proc_pid_net(5)); nil if they are not known.
func networkStats(path, main string, now metav1.Time) *stats.NetworkStats {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil // the process has ended
	}
	out := &stats.NetworkStats{Time: now, Interfaces: parseDevices(string(raw))}
	if i := slices.IndexFunc(out.Interfaces, func(i stats.InterfaceStats) bool { return i.Name == main }); i >= 0 {
		out.InterfaceStats = out.Interfaces[i]
	}
	return out
}

// parseDevices reads what /proc/net/dev says of each device but loopback and pods' links.
func parseDevices(text string) []stats.InterfaceStats {
	var out []stats.InterfaceStats
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		f := strings.Fields(rest)
		if !ok || len(f) < 11 || name == "lo" || strings.HasPrefix(name, "skep") {
			continue
		}
		var n [4]uint64
		bad := false
		for i, at := range []int{0, 2, 8, 10} { // bytes and errors, received and sent
			v, err := strconv.ParseUint(f[at], 10, 64)
			n[i], bad = v, bad || err != nil
		}
		if !bad {
			out = append(out, stats.InterfaceStats{Name: name, RxBytes: &n[0], RxErrors: &n[1], TxBytes: &n[2], TxErrors: &n[3]})
		}
	}
	return out
}

// defaultLink is the node's device with the default route, or else eth0.
func defaultLink() string {
	raw, err := os.ReadFile("/proc/net/route")
	if err != nil {
		return podLink
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" {
			return f[0]
		}
	}
	return podLink
}
