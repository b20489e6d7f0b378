// SPDX-License-Identifier: Apache-2.0

// Package hostcheck finds out what this host and its kernel lack before anything is started.
package hostcheck

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/node/idmap"
)

// Outcome of one check.
type Outcome int

// Outcomes, from good to bad.
const (
	OK      Outcome = iota
	Reduced         // skep works without it, in the way that Result.Detail says
	Missing         // skep cannot start
)

func (o Outcome) String() string {
	return [...]string{"ok", "reduced", "MISSING"}[o]
}

// Result of one check.
type Result struct {
	Name    string
	Outcome Outcome
	Detail  string // what was found, or what skep does instead
	Remedy  string // what to do about it; empty when Outcome is OK
}

// Host is what the checks look at; tests replace it.
type Host struct {
	Root       string // of the file system: "/"
	EUID       int
	LookPath   func(name string) (string, error)
	ProbeBPF   func(f BPFFeature) error // nil, ebpf.ErrNotSupported, or a failure to find out
	KernelName func() (string, error)
	OwnUsers   func() error           // nil if pods can have user ids of their own
	XDP        func() (string, error) // which devices have the program for the driver now, and how; empty: none
}

// BPFFeature is one thing that the data plane asks of the kernel.
type BPFFeature struct {
	Name     string
	Program  ebpf.ProgramType // with Helper, or alone
	Helper   asm.BuiltinFunc
	Map      ebpf.MapType
	Required bool
	Instead  string // what skep does without it
}

// This returns the machine this process runs on.
func This() Host {
	return Host{
		Root:     "/",
		EUID:     os.Geteuid(),
		LookPath: exec.LookPath,
		ProbeBPF: probeBPF,
		KernelName: func() (string, error) {
			var u unix.Utsname
			if err := unix.Uname(&u); err != nil {
				return "", err
			}
			return unix.ByteSliceToString(u.Release[:]), nil
		},
		OwnUsers: idmap.Supported,
		XDP:      xdpDevices,
	}
}

// Run performs every check in order.
func Run(h Host) []Result {
	results := []Result{h.user(), h.kernel()}
	if h.EUID == 0 {
		for _, f := range bpfFeatures() {
			results = append(results, h.bpf(f))
		}
		results = append(results, h.ownUsers())
	}
	return append(results, h.cgroups(), h.cgroup2(), h.overlay(), h.ipv6(), h.runc(), h.iptables(), h.resourceLimits())
}

// Err joins everything that keeps skep from starting, each with its remedy; nil if nothing does.
func Err(results []Result) error {
	var errs []error
	for _, r := range results {
		if r.Outcome == Missing {
			errs = append(errs, fmt.Errorf("%s: %s: %s", r.Name, r.Detail, r.Remedy))
		}
	}
	return errors.Join(errs...)
}

func (h Host) user() Result {
	if h.EUID == 0 {
		return Result{Name: "user", Detail: "root"}
	}
	return Result{Name: "user", Outcome: Missing, Detail: fmt.Sprintf("user id %d", h.EUID),
		Remedy: "namespaces and eBPF need root: run this with sudo"}
}

func (h Host) kernel() Result {
	name, err := h.KernelName()
	if err != nil {
		return Result{Name: "kernel", Outcome: Missing, Detail: err.Error(), Remedy: "skep runs on Linux"}
	}
	var major, minor int
	_, _ = fmt.Sscanf(name, "%d.%d", &major, &minor)
	// 5.18 has what the programs cannot do without: redirect_peer and redirect_neigh (5.10), the
	// cookie of a network namespace (5.14), bpf_set_retval (5.18).
	if major < 5 || major == 5 && minor < 18 {
		return Result{Name: "kernel", Outcome: Missing, Detail: name, Remedy: "install Linux 5.18 or newer"}
	}
	return Result{Name: "kernel", Detail: name}
}

// bpfFeatures lists what the data plane uses of the kernel.
func bpfFeatures() []BPFFeature {
	return []BPFFeature{
		{Name: "eBPF socket hooks", Program: ebpf.CGroupSockAddr, Required: true},
		{Name: "eBPF socket storage", Program: ebpf.CGroupSockAddr, Helper: asm.FnSkStorageGet, Required: true},
		{Name: "eBPF refusal of connections", Program: ebpf.CGroupSockAddr, Helper: asm.FnSetRetval, Required: true},
		{Name: "eBPF on devices", Program: ebpf.SchedCLS, Required: true},
		{Name: "eBPF redirect to pods", Program: ebpf.SchedCLS, Helper: asm.FnRedirectPeer, Required: true},
		{Name: "eBPF redirect to neighbours", Program: ebpf.SchedCLS, Helper: asm.FnRedirectNeigh, Required: true},
		{Name: "eBPF socket lookup", Program: ebpf.SkLookup, Required: true},
		{Name: "eBPF LRU maps", Map: ebpf.LRUHash, Required: true},
		{Name: "eBPF ring buffer", Map: ebpf.RingBuf, Required: true},
		{Name: "eBPF at the driver (XDP)", Program: ebpf.XDP, Instead: "NodePorts are served at the traffic control hook"},
	}
}

func (h Host) xdp() string {
	used, err := h.XDP()
	switch {
	case err != nil:
		return "whether it is used is not known: " + err.Error()
	case used == "":
		return "not used: NodePorts are served at the traffic control hook"
	}
	return "used on " + used
}

// xdpDevices reads what a data plane has pinned.
func xdpDevices() (string, error) {
	modes, err := loader.XDPDevices(api.BPFDir)
	if err != nil {
		return "", err
	}
	var out []string
	for _, index := range slices.Sorted(maps.Keys(modes)) {
		device, err := net.InterfaceByIndex(index)
		if err != nil {
			continue // it has gone, and its pin goes when the agent sees that
		}
		out = append(out, fmt.Sprintf("%s (%s)", device.Name, modes[index]))
	}
	return strings.Join(out, ", "), nil
}

func probeBPF(f BPFFeature) error {
	switch {
	case f.Helper != 0:
		return features.HaveProgramHelper(f.Program, f.Helper)
	case f.Program != ebpf.UnspecifiedProgram:
		return features.HaveProgramType(f.Program)
	default:
		return features.HaveMapType(f.Map)
	}
}

func (h Host) bpf(f BPFFeature) Result {
	err := h.ProbeBPF(f)
	switch {
	case err == nil && f.Program == ebpf.XDP:
		return Result{Name: f.Name, Detail: "available; " + h.xdp()}
	case err == nil:
		return Result{Name: f.Name, Detail: "available"}
	case f.Required:
		return Result{Name: f.Name, Outcome: Missing, Detail: err.Error(),
			Remedy: "use a kernel with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_NET_CLS_BPF, and a container or lockdown policy that allows bpf()"}
	default:
		return Result{Name: f.Name, Outcome: Reduced, Detail: f.Instead, Remedy: "a newer kernel has it"}
	}
}

// cgroups looks for the controllers that resource limits need, in either version's hierarchy.
func (h Host) cgroups() Result {
	have := map[string]bool{}
	for _, line := range h.lines("proc/self/mountinfo") {
		fields := strings.Fields(line)
		sep := slices.Index(fields, "-")
		if sep < 0 || len(fields) < sep+4 || len(fields) < 5 {
			continue
		}
		switch fields[sep+1] {
		case "cgroup":
			for option := range strings.SplitSeq(fields[sep+3], ",") {
				have[option] = true
			}
		case "cgroup2":
			for _, controller := range strings.Fields(strings.Join(h.lines(filepath.Join(fields[4], "cgroup.controllers")), " ")) {
				have[controller] = true
			}
		}
	}
	var lacking []string
	for _, controller := range []string{"cpu", "memory", "pids"} {
		if !have[controller] {
			lacking = append(lacking, controller)
		}
	}
	if len(lacking) > 0 {
		return Result{Name: "cgroup controllers", Outcome: Missing, Detail: "not mounted: " + strings.Join(lacking, ", "),
			Remedy: "mount cgroup2 at /sys/fs/cgroup, and on boards that switch it off boot with cgroup_enable=memory"}
	}
	return Result{Name: "cgroup controllers", Detail: "cpu, memory, pids"}
}

func (h Host) cgroup2() Result {
	for _, line := range h.lines("proc/self/mountinfo") {
		if strings.Contains(line, " - cgroup2 ") {
			return Result{Name: "cgroup v2 hierarchy", Detail: strings.Fields(line)[4]}
		}
	}
	return Result{Name: "cgroup v2 hierarchy", Outcome: Missing, Detail: "not mounted",
		Remedy: "socket hooks attach to it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"}
}

func (h Host) overlay() Result {
	for _, line := range h.lines("proc/filesystems") {
		if strings.TrimSpace(strings.TrimPrefix(line, "nodev")) == "overlay" {
			return Result{Name: "overlay file system", Detail: "available"}
		}
	}
	if matches, _ := filepath.Glob(filepath.Join(h.Root, "lib/modules/*/kernel/fs/overlayfs/overlay.ko*")); len(matches) > 0 {
		return Result{Name: "overlay file system", Detail: "loaded when needed"}
	}
	return Result{Name: "overlay file system", Outcome: Reduced, Detail: "image layers are copied for each container",
		Remedy: "load the kernel module overlay"}
}

func (h Host) ownUsers() Result {
	const name = "user namespaces"
	if err := h.OwnUsers(); err != nil {
		return Result{Name: name, Outcome: Reduced, Detail: "pods with hostUsers: false do not start: " + err.Error(),
			Remedy: "use Linux 6.3 or newer, with user.max_user_namespaces above 0"}
	}
	return Result{Name: name, Detail: "available"}
}

func (h Host) ipv6() Result {
	lines := h.lines("proc/sys/net/ipv6/conf/all/disable_ipv6")
	if len(lines) > 0 && strings.TrimSpace(lines[0]) == "0" {
		return Result{Name: "IPv6", Detail: "enabled"}
	}
	return Result{Name: "IPv6", Outcome: Reduced, Detail: "pods and services get IPv4 addresses only",
		Remedy: "sysctl -w net.ipv6.conf.all.disable_ipv6=0"}
}

func (h Host) runc() Result {
	if path, err := h.LookPath("runc"); err == nil {
		return Result{Name: "runc", Detail: path}
	}
	return Result{Name: "runc", Outcome: Missing, Detail: "not found in PATH", Remedy: "apt-get install runc"}
}

func (h Host) iptables() Result {
	if path, err := h.LookPath("iptables"); err == nil {
		return Result{Name: "iptables", Detail: path}
	}
	return Result{Name: "iptables", Outcome: Missing, Detail: "not found in PATH: pods could not reach the world",
		Remedy: "apt-get install iptables"}
}

// resourceLimits looks for CAP_SYS_RESOURCE (number 24 in capability.h).
func (h Host) resourceLimits() Result {
	const name, sysResource = "raising resource limits", 24
	for _, line := range h.lines("proc/self/status") {
		hex, found := strings.CutPrefix(line, "CapEff:")
		if !found {
			continue
		}
		var bits uint64
		if _, err := fmt.Sscanf(strings.TrimSpace(hex), "%x", &bits); err == nil && bits&(1<<sysResource) != 0 {
			return Result{Name: name, Detail: "allowed"}
		}
	}
	return Result{Name: name, Outcome: Reduced, Detail: "limits and OOM scores of containers are clamped to this process's own",
		Remedy: "give this process CAP_SYS_RESOURCE"}
}

// lines reads a small file below Root; a file that cannot be read has none.
func (h Host) lines(path string) []string {
	b, err := os.ReadFile(filepath.Join(h.Root, path))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\n"), "\n")
}
