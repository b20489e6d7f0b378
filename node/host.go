// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/version"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"skep.io/skep/node/sandbox/cgroup"
)

// KubeletVersion is what the node says it runs; the part after + is build metadata, so version checks read 1.36.3.
//
// Tests of version skew set another one when they link.
var KubeletVersion = "v1.36.3+skep"

// hostFacts are what does not change while the agent runs.
type hostFacts struct {
	cpus    int64 // thousandths
	memory  int64 // bytes
	storage int64 // bytes, of the data directory's file system
	huge    map[corev1.ResourceName]int64
	bootID  string
	info    corev1.NodeSystemInfo
	name    string
	pids    int64 // processes and threads that the kernel lets there be
	kept    kept  // from pods
}

func readHost(dataDir string) (hostFacts, error) {
	h := hostFacts{cpus: int64(runtime.NumCPU()) * 1000}
	mem, err := memInfo()
	if err != nil {
		return h, err
	}
	h.memory = mem["MemTotal"]
	h.limitToCgroup()
	if err := os.MkdirAll(dataDir, 0o755); err != nil {
		return h, fmt.Errorf("data directory: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dataDir, &st); err != nil {
		return h, fmt.Errorf("size of %s: %w", dataDir, err)
	}
	h.storage = int64(st.Blocks) * st.Bsize
	h.huge = hugePages("/sys/kernel/mm/hugepages")
	h.bootID = line("/proc/sys/kernel/random/boot_id")
	if h.name, err = os.Hostname(); err != nil {
		return h, fmt.Errorf("host name: %w", err)
	}
	h.pids = mostPids()
	machine := line("/etc/machine-id")
	system := line("/sys/class/dmi/id/product_uuid")
	if system == "" {
		system = machine
	}
	h.info = corev1.NodeSystemInfo{
		MachineID: machine, SystemUUID: system, BootID: h.bootID,
		KernelVersion: line("/proc/sys/kernel/osrelease"), OSImage: osImage(),
		ContainerRuntimeVersion: "containerd://" + strings.TrimSuffix(version.Version, "+unknown"),
		KubeletVersion:          KubeletVersion, OperatingSystem: "linux", Architecture: runtime.GOARCH,
	}
	return h, nil
}

// limitToCgroup lowers memory and processors to what the cgroup of this process may use, for nodes that are containers.
func (h *hostFacts) limitToCgroup() {
	all, err := cgroup.Hierarchies()
	if err != nil {
		return // `skep check` says what is wrong with it
	}
	for _, c := range all {
		root := c.Path("")
		for _, f := range []string{"memory.max", "memory.limit_in_bytes"} {
			if n, err := strconv.ParseInt(line(filepath.Join(root, f)), 10, 64); err == nil && n > 0 && n < h.memory {
				h.memory = n
			}
		}
		quota, period := int64(0), int64(0)
		if f := strings.Fields(line(filepath.Join(root, "cpu.max"))); len(f) == 2 && f[0] != "max" {
			quota, _ = strconv.ParseInt(f[0], 10, 64)
			period, _ = strconv.ParseInt(f[1], 10, 64)
		} else if q, err := strconv.ParseInt(line(filepath.Join(root, "cpu.cfs_quota_us")), 10, 64); err == nil && q > 0 {
			quota = q
			period, _ = strconv.ParseInt(line(filepath.Join(root, "cpu.cfs_period_us")), 10, 64)
		}
		if quota > 0 && period > 0 && quota*1000/period < h.cpus {
			h.cpus = quota * 1000 / period
		}
	}
}

func (h *hostFacts) capacity(maxPods int) corev1.ResourceList {
	l := corev1.ResourceList{
		corev1.ResourceCPU:              *resource.NewMilliQuantity(h.cpus, resource.DecimalSI),
		corev1.ResourceMemory:           *resource.NewQuantity(h.memory, resource.BinarySI),
		corev1.ResourceEphemeralStorage: *resource.NewQuantity(h.storage, resource.BinarySI),
		corev1.ResourcePods:             *resource.NewQuantity(int64(maxPods), resource.DecimalSI),
	}
	for name, n := range h.huge {
		l[name] = *resource.NewQuantity(n, resource.BinarySI)
	}
	return l
}

// memInfo reads /proc/meminfo, in bytes.
func memInfo() (map[string]int64, error) {
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, fmt.Errorf("memory of the host: %w", err)
	}
	return parseMemInfo(raw), nil
}

func parseMemInfo(raw []byte) map[string]int64 {
	out := map[string]int64{}
	for s := bufio.NewScanner(bytes.NewReader(raw)); s.Scan(); {
		name, rest, ok := strings.Cut(s.Text(), ":")
		f := strings.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		n, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			continue
		}
		if len(f) > 1 && f[1] == "kB" {
			n <<= 10
		}
		out[name] = n
	}
	return out
}

// hugePages says how much memory is set aside in pages of each size.
func hugePages(dir string) map[corev1.ResourceName]int64 {
	out := map[corev1.ResourceName]int64{}
	sizes, err := os.ReadDir(dir)
	if err != nil {
		return out
	}
	for _, s := range sizes {
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(s.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(line(filepath.Join(dir, s.Name(), "nr_hugepages")), 10, 64)
		if err != nil {
			continue
		}
		size := resource.NewQuantity(kb<<10, resource.BinarySI)
		out[corev1.ResourceName(corev1.ResourceHugePagesPrefix+size.String())] = n * kb << 10
	}
	return out
}

// line is the content of a file of one line; empty if it cannot be read.
func line(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func osImage() string {
	for _, path := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		for _, l := range strings.Split(line(path), "\n") {
			if v, ok := strings.CutPrefix(l, "PRETTY_NAME="); ok {
				return strings.Trim(v, `"'`)
			}
		}
	}
	return "Linux"
}

// number is the number in a file; 0 if there is none.
func number(path string) int64 {
	n, err := strconv.ParseInt(line(path), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
