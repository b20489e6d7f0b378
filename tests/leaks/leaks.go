// SPDX-License-Identifier: Apache-2.0

// Package leaks lists what a run could leave on a machine (links, routes, mounts, pinned and
// attached BPF objects, firewall rules, cgroups, files, descriptors) and tells two such lists apart.
// A test takes one before and one after: whatever is new is a leak, and has a name.
package leaks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// State is what exists, one line a thing, sorted: its kind, then its name.
type State []string

// Scope limits what Take looks at.
type Scope struct {
	// Files are directories of which every entry counts, such as /run/skep.
	Files []string
	// Ignore drops the lines that contain one of these.
	Ignore []string
}

// NodeScope is for a machine that only skep uses: everything counts, but for what iptables and mount leave.
func NodeScope() Scope {
	return Scope{
		Files:  []string{"/run", "/etc/skep", "/var/lib/skep", "/var/log/pods", "/var/log/containers", "/sys/fs/bpf"},
		Ignore: []string{"/run/xtables.lock", "/run/mount", "/run/.overlay"},
	}
}

// Take lists what the calling process's namespaces hold. An error names what could not be read: a
// list with a part missing would hide leaks.
func Take(ctx context.Context, scope Scope) (State, error) {
	var state State
	sources := []struct {
		name string
		list func() ([]string, error)
	}{
		{"mounts", mounts},
		{"links", links},
		{"routes", routes},
		{"rules", rules},
		{"neighbours", neighbours},
		{"programs", attachedPrograms},
		{"cgroups", cgroups},
		{"iptables", func() ([]string, error) { return iptables(ctx, "iptables-save") }},
		{"ip6tables", func() ([]string, error) { return iptables(ctx, "ip6tables-save") }},
		{"files", func() ([]string, error) { return files(scope.Files) }},
	}
	for _, source := range sources {
		lines, err := source.list()
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", source.name, err)
		}
		state = append(state, lines...)
	}
	state = slices.DeleteFunc(state, func(line string) bool {
		return slices.ContainsFunc(scope.Ignore, func(part string) bool { return strings.Contains(line, part) })
	})
	slices.Sort(state)
	return state, nil
}

// New returns what after has and before has not, counting duplicates.
func New(before, after State) []string {
	had := map[string]int{}
	for _, line := range before {
		had[line]++
	}
	var leaked []string
	for _, line := range after {
		if had[line] > 0 {
			had[line]--
			continue
		}
		leaked = append(leaked, line)
	}
	return leaked
}

func mounts() ([]string, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, m := range infos {
		kind := "mount"
		if m.FSType == "nsfs" {
			kind = "namespace" // pinned by a bind mount
		}
		lines = append(lines, fmt.Sprintf("%s %s (%s)", kind, m.Mountpoint, m.FSType))
	}
	return lines, nil
}

func links() ([]string, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range all {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("link %s (%s)", a.Name, l.Type()))
		if a.Xdp != nil && a.Xdp.Attached {
			lines = append(lines, "xdp on "+a.Name)
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, addr := range addrs {
			if addr.IP.IsLinkLocalUnicast() {
				continue // the kernel gives every link one, a moment after it came up
			}
			lines = append(lines, fmt.Sprintf("address %s on %s", addr.IPNet, a.Name))
		}
		qdiscs, err := netlink.QdiscList(l)
		if err != nil {
			return nil, err
		}
		for _, q := range qdiscs {
			if t := q.Type(); t == "clsact" || t == "ingress" {
				lines = append(lines, fmt.Sprintf("qdisc %s on %s", t, a.Name))
			}
		}
	}
	return lines, nil
}

func routes() ([]string, error) {
	var lines []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// An unspecified table asks for all of them.
		list, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			if r.Type == unix.RTN_MULTICAST || r.Type == unix.RTN_ANYCAST || r.Protocol == unix.RTPROT_RA || r.Flags&unix.RTM_F_CLONED != 0 {
				continue // the kernel's own, as traffic comes and forwarding is switched on
			}
			if r.Table == unix.RT_TABLE_LOCAL || r.Dst != nil && r.Dst.IP.IsLinkLocalUnicast() {
				continue // follow the addresses and links, which are compared, a moment after those
			}
			lines = append(lines, fmt.Sprintf("route table %d type %d %s via %s", r.Table, r.Type, r.Dst, r.Gw))
		}
	}
	return lines, nil
}

func rules() ([]string, error) {
	var lines []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RuleList(family)
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			lines = append(lines, fmt.Sprintf("rule family %d %s", family, r))
		}
	}
	return lines, nil
}

// neighbours lists what somebody set; what the kernel learned goes by itself.
func neighbours() ([]string, error) {
	list, err := netlink.NeighList(0, 0)
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, n := range list {
		if n.State&netlink.NUD_PERMANENT != 0 && n.HardwareAddr != nil && !n.IP.IsMulticast() {
			lines = append(lines, fmt.Sprintf("neighbour %s %s", n.IP, n.HardwareAddr))
		}
	}
	return lines, nil
}

// iptables lists rules and the chains that somebody made. Tables and built-in chains come into being
// by looking at them.
func iptables(ctx context.Context, save string) ([]string, error) {
	path, err := exec.LookPath(save)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil // then nobody has made rules with it either
	}
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", save, err, &stderr)
	}
	var lines []string
	table := ""
	for line := range strings.SplitSeq(string(out), "\n") {
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, "-A"), strings.HasPrefix(line, ":") && strings.Contains(line, " - "):
			if i := strings.Index(line, " ["); line[0] == ':' && i > 0 {
				line = line[:i] // without counters
			}
			lines = append(lines, fmt.Sprintf("%s table %s %s", strings.TrimSuffix(save, "-save"), table, line))
		}
	}
	return lines, nil
}

func cgroups() ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, m := range infos {
		found, err := walk(m.Mountpoint, true)
		if err != nil {
			return nil, err
		}
		for _, path := range found {
			lines = append(lines, "cgroup "+path)
		}
	}
	return lines, nil
}

func files(roots []string) ([]string, error) {
	var lines []string
	for _, root := range roots {
		found, err := walk(root, false)
		if err != nil {
			return nil, err
		}
		kind := "file "
		if strings.HasPrefix(root, "/sys/fs/bpf") {
			kind = "pinned bpf object "
		}
		for _, path := range found {
			lines = append(lines, kind+path)
		}
	}
	return lines, nil
}

// walk lists what is below root; a root that does not exist is empty.
func walk(root string, dirsOnly bool) ([]string, error) {
	var found []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		if path != root && (!dirsOnly || entry.IsDir()) {
			found = append(found, path)
		}
		return nil
	})
	return found, err
}

// Descriptors lists what the calling process has open.
func Descriptors() (State, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("list descriptors: %w", err)
	}
	var state State
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if err != nil {
			continue // the listing's own
		}
		state = append(state, "descriptor "+target)
	}
	slices.Sort(state)
	return state, nil
}

// ProcessesIn lists processes of the namespaces whose /proc/PID/ns links read like one of ids, such
// as "net:[4026532281]".
func ProcessesIn(ids ...string) ([]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []string
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		for _, id := range ids {
			kind, _, _ := strings.Cut(id, ":")
			have, err := os.Readlink(filepath.Join("/proc", entry.Name(), "ns", kind))
			if err != nil || have != id {
				continue
			}
			name, _ := os.ReadFile(filepath.Join("/proc", entry.Name(), "comm"))
			found = append(found, fmt.Sprintf("process %s %s in %s", entry.Name(), strings.TrimSpace(string(name)), id))
		}
	}
	return found, nil
}

// MountsBelow lists mounts of the calling process that show dir or lie on or below it.
func MountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var found []string
	for _, m := range infos {
		if m.Mountpoint == dir || strings.HasPrefix(m.Mountpoint, dir+"/") {
			found = append(found, fmt.Sprintf("mount %s (%s)", m.Mountpoint, m.FSType))
		}
	}
	return found, nil
}
