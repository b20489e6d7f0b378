// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// setup is what a node's init needs to know; it travels as JSON in its arguments.
type setup struct {
	Hostname string
	Cgroups  []string // to join, as the machine sees them
	All      []hierarchy
	Data     string // becomes /var/lib/skep; empty for a machine that runs no skep
	Logs     string // becomes /var/log
	Hosts    string // content of /etc/hosts
}

// request asks init to start a process; event is what init has to say.
type request struct {
	Argv []string
	Env  []string
	Out  string // file that gets stdout and stderr
}

type event struct {
	Ready   bool   `json:",omitempty"`
	Started int    `json:",omitempty"` // pid
	Exited  int    `json:",omitempty"` // pid
	Status  string `json:",omitempty"`
	Error   string `json:",omitempty"`
}

// joinMain is stage one. Cgroups come before the namespaces, so that the cgroup namespace's root is
// the node's cgroup; the second exec leaves no thread behind in the old namespaces.
func joinMain(args []string) error {
	var s setup
	if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
		return fmt.Errorf("read setup: %w", err)
	}
	runtime.LockOSThread()
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS
	if len(s.Cgroups) > 0 {
		if err := joinRoots(s.Cgroups); err != nil {
			return err
		}
		flags |= unix.CLONE_NEWCGROUP
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare namespaces (root is needed): %w", err)
	}
	argv := self("init", args[0])
	return fmt.Errorf("exec init: %w", syscall.Exec(argv[0], argv, os.Environ()))
}

// joinRoots joins the node's cgroups with the harness leaf of cgroup2 taken off, which makes the
// node's cgroup, not the leaf, the root of the namespace.
func joinRoots(dirs []string) error {
	var roots []string
	for _, dir := range dirs {
		if filepath.Base(dir) == harnessLeaf {
			dir = filepath.Dir(dir)
		}
		roots = append(roots, dir)
	}
	return joinCgroups(roots)
}

// initMain is stage two: the node's process 1 in all but number.
func initMain(args []string) error {
	var s setup
	if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
		return fmt.Errorf("read setup: %w", err)
	}
	out := json.NewEncoder(os.Stdout)
	if err := furnish(s); err != nil {
		_ = out.Encode(event{Error: err.Error()})
		return err
	}
	// Orphans (shims, and containers whose shim died) become children of this process, as they
	// would of a machine's process 1.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	// What is read from here on are requests; a closed pipe means that the test is over or died.
	var mu sync.Mutex // orders "started" before "exited" of the same process
	say := func(e event) { _ = out.Encode(e) }
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	go func() {
		for range children {
			mu.Lock()
			for {
				var status unix.WaitStatus
				pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
				if err != nil || pid <= 0 {
					break
				}
				say(event{Exited: pid, Status: describe(status)})
			}
			mu.Unlock()
		}
	}()
	say(event{Ready: true})
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			if errors.Is(err, io.EOF) {
				killAll(s.All)
				return nil
			}
			return fmt.Errorf("read request: %w", err)
		}
		mu.Lock()
		pid, err := spawn(r)
		if err != nil {
			say(event{Error: err.Error()})
		} else {
			say(event{Started: pid})
		}
		mu.Unlock()
	}
}

// killAll ends everybody else on the machine, whose test died without doing so.
func killAll(all []hierarchy) {
	for deadline := time.Now().Add(settleLimit); time.Now().Before(deadline); time.Sleep(pollEvery) {
		procs, err := processes(all, "/")
		delete(procs, os.Getpid())
		if err != nil || len(procs) == 0 {
			return
		}
		for pid := range procs {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

func describe(status unix.WaitStatus) string {
	if status.Signaled() {
		return "signal: " + status.Signal().String()
	}
	return fmt.Sprintf("exit status %d", status.ExitStatus())
}

// spawn starts without os/exec, whose Wait would compete with the reaper.
func spawn(r request) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	log, err := os.OpenFile(r.Out, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	pid, err := syscall.ForkExec(r.Argv[0], r.Argv, &syscall.ProcAttr{
		Dir: "/", Env: r.Env,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", r.Argv[0], err)
	}
	return pid, nil
}

// furnish gives the machine its own file systems, name and loopback.
func furnish(s setup) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := freshSys(s); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/srv"} {
		if err := mountFS("tmpfs", dir, "mode=755"); err != nil {
			return err
		}
	}
	// Opened before the overlays, which would otherwise hide a directory below /var.
	binds := map[string]string{"/var/lib/skep": s.Data, "/var/log": s.Logs}
	sources := map[string]string{}
	for target, source := range binds {
		if source == "" {
			continue
		}
		dir, err := os.Open(source)
		if err != nil {
			return fmt.Errorf("open the node's directory: %w", err)
		}
		defer dir.Close()
		sources[target] = fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	}
	for _, dir := range []string{"/etc", "/var"} {
		if err := overlay(dir); err != nil {
			return err
		}
	}
	// Only the overlay loses it: the machine may run a skep of its own.
	if err := os.RemoveAll("/etc/skep"); err != nil {
		return err
	}
	files := map[string]string{
		"/etc/hosts":       s.Hosts,
		"/etc/hostname":    s.Hostname + "\n",
		"/etc/resolv.conf": "# this machine has no name server\n",
		"/etc/machine-id":  fmt.Sprintf("%032x\n", []byte(s.Hostname + "................")[:16]),
	}
	for path, content := range files {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	for target, source := range binds {
		if source == "" {
			continue
		}
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(sources[target], target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s to %s: %w", source, target, err)
		}
	}
	// systemd makes every mount shared; a node must work, and clean up, under that too.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}

// freshSys replaces /sys, which shows the old network namespace, the whole cgroup tree and the
// machine's pinned BPF objects, by this machine's own.
func freshSys(s setup) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter("/sys"))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err)
		}
	}
	if err := mountFS("sysfs", "/sys", ""); err != nil {
		return err
	}
	if err := mountFS("bpf", "/sys/fs/bpf", "mode=700"); err != nil {
		return err
	}
	if len(s.All) == 0 {
		return nil
	}
	if s.All[0].Mount != "/sys/fs/cgroup" {
		if err := mountFS("tmpfs", "/sys/fs/cgroup", "mode=755"); err != nil {
			return err
		}
	}
	for _, h := range s.All {
		if err := os.MkdirAll(h.Mount, 0o755); err != nil {
			return err
		}
		kind := "cgroup"
		if h.V2 {
			kind = "cgroup2"
		}
		if err := mountFS(kind, h.Mount, h.Options); err != nil {
			return err
		}
		if !h.V2 {
			continue
		}
		leaf := filepath.Join(h.Mount, harnessLeaf)
		if err := os.MkdirAll(leaf, 0o755); err != nil {
			return err
		}
		if err := joinCgroups([]string{leaf}); err != nil {
			return err
		}
		delegate(h.Mount)
	}
	return nil
}

// overlay lets a directory be written to without touching the machine's.
func overlay(dir string) error {
	base := "/run/.overlay" + dir
	for _, sub := range []string{"/upper", "/work"} {
		if err := os.MkdirAll(base+sub, 0o755); err != nil {
			return err
		}
	}
	return mountFS("overlay", dir, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", dir, base, base))
}

func mountFS(kind, target, options string) error {
	if err := unix.Mount(kind, target, kind, 0, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}
