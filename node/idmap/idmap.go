// SPDX-License-Identifier: Apache-2.0

// Package idmap gives a pod user and group ids of its own (KEP-127): a user namespace in which the ids from 0 on are
// others on the host, and mounts that show files in it with the owners that they have on disk (mount_setattr(2), Linux
// 5.12; tmpfs since 6.3).
package idmap

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Length is how many ids a pod has. It is as many as a process without a user namespace may want: 0 to 65535.
const Length = 65536

// With makes a user namespace whose ids from 0 on are the host's from first on, and with it the namespaces that flags
// (CLONE_NEW*) name, which belong to it. use gets the directory of their files (/proc/PID/ns), and pins what shall stay:
// everything else goes when it returns.
func With(first uint32, flags uintptr, use func(dir string) error) error {
	// The child is stopped before its first instruction for as long as this thread, which traces it, wants.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ids := []syscall.SysProcIDMap{{HostID: int(first), Size: Length}}
	holder, err := os.StartProcess("/proc/self/exe", []string{"skep[user-namespace]"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | flags, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}})
	if err != nil {
		return fmt.Errorf("make a user namespace: %w", err)
	}
	err = use(fmt.Sprintf("/proc/%d/ns", holder.Pid))
	_ = holder.Kill()
	_, _ = holder.Wait()
	return err
}

// Mount shows the files at source at target, which is there, with the owners that they have for a user namespace. What is
// mounted below source comes along as it is, so that its files seem to be nobody's. propagation is MS_PRIVATE or
// MS_SLAVE: whether later mounts below source are seen too.
func Mount(source, target string, namespace *os.File, propagation uint64) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("open %s: %w", source, err)
	}
	defer func() { _ = unix.Close(tree) }()
	if err := mapIDs(tree, namespace); err != nil {
		return fmt.Errorf("the files of %s cannot be shown to a pod with hostUsers: false: this kernel does not map the owners of files on %s: %w", source, fileSystem(source), err)
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Propagation: propagation}); err != nil {
		return fmt.Errorf("propagation of mounts below %s: %w", source, err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, target, err)
	}
	return nil
}

func mapIDs(tree int, namespace *os.File) error {
	return unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())})
}

// fileSystem names the type of file system that a path is on, for people.
func fileSystem(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil || len(mounts) == 0 {
		return "this file system"
	}
	deepest := mounts[0]
	for _, m := range mounts {
		if len(m.Mountpoint) >= len(deepest.Mountpoint) {
			deepest = m
		}
	}
	return deepest.FSType
}

// Supported is nil if pods of this host can have ids of their own.
func Supported() error {
	if most, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(most))); err == nil && n == 0 {
			return errors.New("the sysctl user.max_user_namespaces is 0")
		}
	}
	return With(Length, 0, func(dir string) error {
		namespace, err := os.Open(filepath.Join(dir, "user"))
		if err != nil {
			return err
		}
		defer namespace.Close()
		// tmpfs was the last of the file systems that pods need.
		fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return fmt.Errorf("fsopen tmpfs: %w", err)
		}
		defer func() { _ = unix.Close(fs) }()
		if err := unix.FsconfigCreate(fs); err != nil {
			return fmt.Errorf("make a tmpfs: %w", err)
		}
		mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("fsmount tmpfs: %w", err)
		}
		defer func() { _ = unix.Close(mount) }()
		if err := mapIDs(mount, namespace); err != nil {
			return fmt.Errorf("this kernel does not map the owners of files on tmpfs (Linux 6.3 does): %w", err)
		}
		return nil
	})
}
