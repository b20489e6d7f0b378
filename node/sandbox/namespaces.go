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
			for _, k := range kinds {
				if !slices.Contains(want, k.name) {
					continue
				}
				pin := filepath.Join(dir, k.name)
				if err := os.WriteFile(pin, nil, 0o444); err != nil {
					return err
				}
				source := fmt.Sprintf("/proc/self/task/%d/ns/%s", unix.Gettid(), k.name)
				if err := unix.Mount(source, pin, "", unix.MS_BIND, ""); err != nil {
					return fmt.Errorf("pin %s namespace at %s: %w", k.name, pin, err)
				}
			}
			return setup()
		}()
	}()
	return <-result
}

// makeShm mounts the pod's /dev/shm: POSIX shared memory is part of what containers of a pod share.
func makeShm(path string) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=65536k"); err != nil {
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
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), flag); err != nil {
			result <- fmt.Errorf("enter %s: %w", path, err)
			return
		}
		result <- f()
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
