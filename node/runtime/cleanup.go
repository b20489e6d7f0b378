// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Cleanup removes every trace of the containers of an embedded containerd without a running skep: shims
// and the processes of their containers, mounts, state and data.
func Cleanup(ctx context.Context, dataDir, runDir string) error {
	state, data := filepath.Join(runDir, "containerd"), filepath.Join(dataDir, "containerd")
	errs := []error{killContainers(ctx, state), removeAllMapped(filepath.Join(runDir, mappedName))}
	for _, dir := range []string{state, data} {
		errs = append(errs, unmountUnder(dir))
	}
	for _, dir := range []string{state, data, filepath.Join(dataDir, "containers"), filepath.Join(dataDir, "imported.json"),
		filepath.Join(runDir, "attach"), filepath.Join(runDir, "exec")} {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// killContainers ends the init processes named in the bundles, then the shims that serve them.
func killContainers(ctx context.Context, state string) error {
	bundles, err := filepath.Glob(filepath.Join(state, "io.containerd.runtime.v2.task", namespace, "*"))
	if err != nil {
		return err
	}
	var pids []int
	for _, b := range bundles {
		data, err := os.ReadFile(filepath.Join(b, "init.pid"))
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
		// The number may have been given to another process since: only one in the container's mounts is ours.
		if err == nil && isContainer(pid, filepath.Base(b)) {
			pids = append(pids, pid)
		}
	}
	shims, err := shimPids(state)
	if err != nil {
		return err
	}
	for _, pid := range append(pids, shims...) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, pid := range append(pids, shims...) {
		if err := waitGone(ctx, pid); err != nil {
			return err
		}
	}
	return nil
}

// isContainer says whether the process is in the cgroup of the container.
func isContainer(pid int, id string) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && strings.Contains(string(data), id)
}

// shimPids finds shims by their command line, which names the address of the server they were made for. Only
// in this mount namespace does that path mean our server: another machine made of namespaces has the same one.
func shimPids(state string) ([]int, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		args := strings.Split(string(data), "\x00")
		if filepath.Base(args[0]) != shimName || !slices.Contains(args, filepath.Join(state, "containerd.sock")) {
			continue
		}
		if ns, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/mnt")); err == nil && ns == own {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func waitGone(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
			return nil
		}
	}
	return fmt.Errorf("process %d does not end", pid)
}

// unmountUnder removes every mount below dir, the innermost first.
func unmountUnder(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint == dir {
			continue
		}
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, &os.PathError{Op: "unmount", Path: m.Mountpoint, Err: err})
		}
	}
	return errors.Join(errs...)
}
