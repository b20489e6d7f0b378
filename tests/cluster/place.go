// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// place is where enterMain goes.
type place struct {
	Pid     int
	Cgroups []string
	NetOnly bool // the process's network and cgroups, not its files
}

func (p place) String() string {
	raw, _ := json.Marshal(p) // strings and numbers: cannot fail
	return string(raw)
}

// Place names the machine to EnterFrom, as a string that fits an environment variable.
func (m *Machine) Place() string { return place{Pid: m.Pid(), Cgroups: m.cgroups}.String() }

// enterMain runs a command inside: arguments are the place and the command.
func enterMain(args []string) error {
	if len(args) < 2 {
		return errors.New("enter: a place and a command are needed")
	}
	return EnterFrom(args[0], args[1:])
}

// EnterFrom replaces the calling process by a command inside a place. A name of one of this
// package's tools (http, dial, serve, load) runs that.
func EnterFrom(where string, argv []string) error {
	var p place
	if err := json.Unmarshal([]byte(where), &p); err != nil {
		return fmt.Errorf("read place: %w", err)
	}
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	if err := p.enter(); err != nil {
		return err
	}
	// The directory is the same one where both machines have it, as they do for what tests make.
	if err := unix.Chdir(dir); err != nil {
		if err := unix.Chdir("/"); err != nil {
			return err
		}
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("exec %s: %w", path, syscall.Exec(path, argv, os.Environ()))
}

// CommandIn prepares a command inside a place.
func CommandIn(ctx context.Context, where string, argv ...string) *exec.Cmd {
	args := append(self("enter", where), argv...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = os.Environ()
	// A process that ignores its end must not hold the test.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// EnterTool is EnterFrom for one of this package's tools.
func EnterTool(where, role string, args []string) error {
	return EnterFrom(where, self(role, args...))
}

// enter changes the calling thread: cgroups first, by the paths of the machine outside, then
// namespaces. The exec that follows ends all other threads.
func (p place) enter() error {
	if err := joinCgroups(p.Cgroups); err != nil {
		return err
	}
	runtime.LockOSThread()
	kinds := map[string]int{"net": unix.CLONE_NEWNET}
	if !p.NetOnly {
		// A mount namespace can only be joined by a thread that shares its root and directory with nobody.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare fs: %w", err)
		}
		kinds["uts"], kinds["mnt"] = unix.CLONE_NEWUTS, unix.CLONE_NEWNS
		if len(p.Cgroups) > 0 {
			kinds["cgroup"] = unix.CLONE_NEWCGROUP
		}
	}
	opened := map[string]int{}
	for kind := range kinds {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", p.Pid, kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s namespace of %d: %w", kind, p.Pid, err)
		}
		opened[kind] = fd
	}
	for kind, flag := range kinds {
		if err := unix.Setns(opened[kind], flag); err != nil {
			return fmt.Errorf("enter %s namespace: %w", kind, err)
		}
	}
	return nil
}

// podProcess finds a process of a running pod, and its cgroup2.
func (n *Node) podProcess(uid string) (pid int, dir string, err error) {
	for _, h := range n.all {
		if !h.V2 {
			continue
		}
		dirs, err := cgroupDirs(filepath.Join(h.Mount, n.cgroup))
		if err != nil {
			return 0, "", err
		}
		for _, dir := range dirs {
			if !strings.Contains(strings.ReplaceAll(dir, "_", "-"), uid) {
				continue
			}
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				continue
			}
			if _, err := fmt.Sscan(string(procs), &pid); err == nil && pid != 0 {
				return pid, dir, nil
			}
		}
	}
	return 0, "", fmt.Errorf("no process of pod %s in the cgroups of node %s", uid, n.Name)
}

// KillPod ends a container of the pod as a crash of its program would.
func (n *Node) KillPod(uid string) error {
	pid, _, err := n.podProcess(uid)
	if err != nil {
		return err
	}
	return unix.Kill(pid, unix.SIGKILL)
}

// accounted are the controllers whose bookkeeping a socket pays for: who gets the processor, and which
// cgroup a connection's memory is charged to.
var accounted = []string{"cpu", "memory"}

// accounts are the process's cgroups in the v1 hierarchies of the accounted controllers; none on a
// host where cgroup2 has them.
func (n *Node) accounts(pid int) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, controller := range accounted {
		for _, h := range n.all {
			if h.V2 || !slices.Contains(strings.Split(h.Options, ","), controller) {
				continue
			}
			for line := range strings.Lines(string(raw)) {
				fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
				if len(fields) == 3 && slices.Contains(strings.Split(fields[1], ","), controller) {
					dirs = append(dirs, filepath.Join(h.Mount, fields[2]))
				}
			}
		}
	}
	return dirs, nil
}

// PodAccounts are the cgroups that a pod's processor time and memory are accounted to, where those
// are others than the one of its sockets' programs.
func (n *Node) PodAccounts(uid string) ([]string, error) {
	pid, _, err := n.podProcess(uid)
	if err != nil {
		return nil, err
	}
	return n.accounts(pid)
}

// CommandAs prepares a command in the machine's network and in the given cgroups. Its files are the
// caller's.
func (m *Machine) CommandAs(ctx context.Context, cgroups []string, argv ...string) *exec.Cmd {
	p := place{Pid: m.Pid(), NetOnly: true, Cgroups: cgroups}
	args := append(self("enter", p.String()), argv...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// ToolAs is CommandAs for one of package tools' programs.
func (m *Machine) ToolAs(ctx context.Context, cgroups []string, role string, args ...string) *exec.Cmd {
	return m.CommandAs(ctx, cgroups, self(role, args...)...)
}

// PodTool prepares one of this package's tools in the network and cgroup2 of a running pod, accounted
// like its own: a client whose sockets are a pod's.
func (n *Node) PodTool(ctx context.Context, uid, role string, args ...string) (*exec.Cmd, error) {
	pid, dir, err := n.podProcess(uid)
	if err != nil {
		return nil, err
	}
	accounts, err := n.accounts(pid)
	if err != nil {
		return nil, err
	}
	where := place{Pid: pid, Cgroups: append(accounts, dir), NetOnly: true}.String()
	argv := append(self("enter", where), self(role, args...)...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = 5 * time.Second
	return cmd, nil
}
