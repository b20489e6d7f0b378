// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"skep.io/skep/node/idmap"
)

// namespace kinds: the name of the pin, the clone flag, and the file under /proc/thread-self/ns.
var kinds = []struct {
	name string
	flag int
}{
	{"net", unix.CLONE_NEWNET},
	{"ipc", unix.CLONE_NEWIPC},
	{"uts", unix.CLONE_NEWUTS},
}

// userKind is the name of the pin of a user namespace, and of its file under /proc.
const userKind = "user"

// makeNamespaces creates new namespaces of the given kinds, pins them under dir, and runs setup
// inside them. Everything happens on a thread of its own, which ends afterwards: a thread that has
// left the process's namespaces must never run anything else.
func makeNamespaces(dir string, want []string, setup func() error) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with this goroutine
		result <- func() error {
			flags := 0
			for _, k := range kinds {
				if slices.Contains(want, k.name) {
					flags |= k.flag
				}
			}
			if err := unix.Unshare(flags); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := pin(dir, want, fmt.Sprintf("/proc/self/task/%d/ns", unix.Gettid())); err != nil {
				return err
			}
			return setup()
		}()
	}()
	return <-result
}

// pin keeps the namespaces in from, of a process or thread, under dir.
func pin(dir string, want []string, from string) error {
	for _, kind := range want {
		at := filepath.Join(dir, kind)
		if err := os.WriteFile(at, nil, 0o444); err != nil {
			return err
		}
		if err := unix.Mount(filepath.Join(from, kind), at, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin %s namespace at %s: %w", kind, at, err)
		}
	}
	return nil
}

// makeOwned is makeNamespaces for namespaces that belong to a new user namespace, which is pinned too. A process with
// threads cannot enter one, so that setup runs as the host's root, who may do in the others what theirs may.
func makeOwned(dir string, want []string, first uint32, setup func() error) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	flags := 0
	for _, k := range kinds {
		if slices.Contains(want, k.name) {
			flags |= k.flag
		}
	}
	err := idmap.With(first, uintptr(flags), func(from string) error { return pin(dir, append([]string{userKind}, want...), from) })
	if err != nil {
		return err
	}
	enter := setup
	for _, k := range kinds {
		if slices.Contains(want, k.name) {
			inner, at := enter, filepath.Join(dir, k.name)
			enter = func() error { return setns(at, k.flag, inner) }
		}
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, as in makeNamespaces
		result <- enter()
	}()
	return <-result
}

// setns runs f after this thread has entered a pinned namespace, which it never leaves.
func setns(at string, flag int, f func() error) error {
	ns, err := os.Open(at)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), flag); err != nil {
		return fmt.Errorf("enter %s: %w", at, err)
	}
	return f()
}

// makeShm mounts the pod's /dev/shm, which belongs to owner: POSIX shared memory is part of what containers of a pod share.
func makeShm(path string, owner uint32) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=65536k,uid=%d,gid=%d", owner, owner)); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// InNetNS runs f on a thread inside the pod's network namespace. Sockets that f opens stay there; f must
// not start goroutines that open some.
func (s *Sandbox) InNetNS(f func() error) error {
	if s.NetNS == "" {
		return f()
	}
	return inNamespace(s.NetNS, unix.CLONE_NEWNET, f)
}

// inNamespace runs f on a thread of its own inside a pinned namespace.
func inNamespace(path string, flag int, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		result <- setns(path, flag, f)
	}()
	return <-result
}

// unpin removes a directory of pinned namespaces; the kernel ends each with its last user.
func unpin(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		pin := filepath.Join(dir, e.Name())
		// A pin may be mounted over by an earlier try.
		for {
			if err := unix.Unmount(pin, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
					break
				}
				return &os.PathError{Op: "unmount", Path: pin, Err: err}
			}
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(dir)
}

// pinned says whether path is a pinned namespace and not an empty file.
func pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}
