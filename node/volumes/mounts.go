// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// device is the file system a path is on.
func device(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Dev, nil
}

// isMount reports whether another file system begins at path.
func isMount(path string) (bool, error) {
	own, err := device(path)
	if err != nil {
		return false, err
	}
	above, err := device(filepath.Dir(path))
	if err != nil {
		return false, err
	}
	return own != above, nil
}

// tmpfs mounts memory at dir, which exists, unless that is done already.
func tmpfs(dir string, size int64) error {
	if done, err := isMount(dir); err != nil || done {
		return err
	}
	options := ""
	if size > 0 {
		options = "size=" + strconv.FormatInt(size, 10)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount memory at %s: %w", dir, err)
	}
	return nil
}

// unmountBelow undoes every mount at or under dir, the deepest first.
func unmountBelow(dir string) error {
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	// In the order of mountinfo a mount comes after what it is mounted on.
	slices.Reverse(list)
	var errs []error
	for _, m := range list {
		if err := unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW); err != nil {
			if errors.Is(err, unix.EBUSY) {
				// A process that is about to end still looks at it; detached, it goes with that process.
				err = unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
			}
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeHere deletes a tree, but only if nothing is mounted in it any more: it refuses instead.
func removeHere(path string) error {
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	if len(list) > 0 {
		return fmt.Errorf("%s is still mounted: unmount it, so that what is there is not deleted", list[0].Mountpoint)
	}
	return os.RemoveAll(path)
}

// emptyDir makes an empty directory, in memory if so wished, and leaves one that is there as it is.
func emptyDir(dir string, source *corev1.EmptyDirVolumeSource, group *int64) error {
	switch source.Medium {
	case corev1.StorageMediumDefault, corev1.StorageMediumMemory:
	default:
		return fmt.Errorf("emptyDir of medium %q: %w", source.Medium, ErrUnsupported)
	}
	_, err := os.Lstat(dir)
	if err == nil {
		if source.Medium != corev1.StorageMediumMemory {
			return nil
		}
		if done, err := isMount(dir); err != nil || done {
			return err
		}
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if source.Medium == corev1.StorageMediumMemory {
		var size int64
		if source.SizeLimit != nil {
			size = source.SizeLimit.Value()
		}
		if err := tmpfs(dir, size); err != nil {
			return err
		}
	}
	// Whoever the containers run as may write here (kubelet: empty_dir.go, perm 0777).
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	if group == nil {
		return nil
	}
	if err := os.Lchown(dir, -1, int(*group)); err != nil {
		return err
	}
	return os.Chmod(dir, 0o777|fs.ModeSetgid)
}

// hostPath checks, or makes, what a hostPath volume names.
func hostPath(source *corev1.HostPathVolumeSource) error {
	want := corev1.HostPathUnset
	if source.Type != nil {
		want = *source.Type
	}
	st, err := os.Stat(source.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	mismatch := func(what string, ok bool) error {
		if missing || !ok {
			return fmt.Errorf("hostPath type check failed: %s is not a %s", source.Path, what)
		}
		return nil
	}
	mode := fs.FileMode(0)
	if st != nil {
		mode = st.Mode()
	}
	switch want {
	case corev1.HostPathUnset:
		if missing {
			// As container runtimes do for the source of a bind mount that is not there.
			return os.MkdirAll(source.Path, 0o755)
		}
		return nil
	case corev1.HostPathDirectoryOrCreate:
		if missing {
			return os.MkdirAll(source.Path, 0o755)
		}
		return mismatch("directory", mode.IsDir())
	case corev1.HostPathDirectory:
		return mismatch("directory", mode.IsDir())
	case corev1.HostPathFileOrCreate:
		if missing {
			f, err := os.OpenFile(source.Path, os.O_CREATE, 0o644)
			if err != nil {
				return err
			}
			return f.Close()
		}
		return mismatch("file", mode.IsRegular())
	case corev1.HostPathFile:
		return mismatch("file", mode.IsRegular())
	case corev1.HostPathSocket:
		return mismatch("socket file", mode&fs.ModeSocket != 0)
	case corev1.HostPathCharDev:
		return mismatch("character device", mode&fs.ModeCharDevice != 0)
	case corev1.HostPathBlockDev:
		return mismatch("block device", mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0)
	default:
		return fmt.Errorf("hostPath type %q is unknown", want)
	}
}
