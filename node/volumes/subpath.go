// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ContainerMounts says what to mount into a container for its volumeMounts. expand replaces $(NAME) for subPathExpr.
func (v *Volumes) ContainerMounts(pod *corev1.Pod, c *corev1.Container, expand func(string) string) ([]Mount, error) {
	var out []Mount
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		vol := Of(pod, m.Name)
		if vol == nil {
			return nil, fmt.Errorf("container %s mounts volume %q, which pod %s/%s does not have", c.Name, m.Name, pod.Namespace, pod.Name)
		}
		host := v.path(pod.UID, vol)
		sub := m.SubPath
		if m.SubPathExpr != "" {
			sub = expand(m.SubPathExpr)
			if strings.Contains(sub, "$(") {
				return nil, fmt.Errorf("subPathExpr %q of container %s names a variable that is not set", m.SubPathExpr, c.Name)
			}
		}
		if sub != "" {
			var err error
			if host, err = v.subPath(pod.UID, c.Name, i, vol, sub); err != nil {
				return nil, fmt.Errorf("failed to prepare subPath for volumeMount %q of container %q: %w", m.Name, c.Name, err)
			}
		}
		out = append(out, Mount{
			HostPath: host, ContainerPath: containerPath(m.MountPath), Propagation: propagation(m),
			// What shows objects is never writable: an update would throw the writes away.
			ReadOnly:  m.ReadOnly || vol.ConfigMap != nil || vol.Secret != nil || vol.DownwardAPI != nil || vol.Projected != nil || vol.Image != nil || readOnly(vol),
			Recursive: Recursive(m), Volume: vol.Name, Image: vol.Image != nil,
		})
	}
	return out, nil
}

// Recursive reports whether a mount is read-only with all that is mounted below it. Every kernel that skep runs on can
// do that, so "if possible" means it is done.
func Recursive(m *corev1.VolumeMount) bool {
	return m.ReadOnly && m.RecursiveReadOnly != nil && *m.RecursiveReadOnly != corev1.RecursiveReadOnlyDisabled
}

func containerPath(p string) string {
	if !strings.HasPrefix(p, "/") {
		p = "/" + p
	}
	return filepath.Clean(p)
}

func propagation(m *corev1.VolumeMount) corev1.MountPropagationMode {
	if m.MountPropagation != nil {
		return *m.MountPropagation
	}
	return corev1.MountPropagationNone
}

// Of finds a volume of a pod by name; nil if there is none.
func Of(pod *corev1.Pod, name string) *corev1.Volume {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Name == name {
			return &pod.Spec.Volumes[i]
		}
	}
	return nil
}

// subPath binds a part of a volume to a place that containers cannot move, and returns that place. A container that
// shares the volume may put symbolic links in it, at any time: each step is resolved beneath the volume's root by the
// kernel, and what is bound is what was opened, not what the name says later.
func (v *Volumes) subPath(uid types.UID, container string, index int, vol *corev1.Volume, sub string) (string, error) {
	if filepath.IsAbs(sub) || !filepath.IsLocal(sub) {
		return "", fmt.Errorf("subPath %q must stay within the volume", sub)
	}
	fd, err := openBeneath(v.path(uid, vol), sub)
	if err != nil {
		return "", err
	}
	defer func() { _ = unix.Close(fd) }()
	target := filepath.Join(v.podDir(uid), "volume-subpaths", vol.Name, container, strconv.Itoa(index))
	// One that an earlier attempt of the container had is replaced: the file behind the name may be another now.
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return "", fmt.Errorf("unmount %s: %w", target, err)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("stat subPath %q: %w", sub, err)
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(target, 0o750)
	} else {
		err = os.WriteFile(target, nil, 0o640)
	}
	if err != nil {
		return "", err
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(fd), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("bind subPath %q: %w", sub, err)
	}
	return target, nil
}

// openBeneath opens sub within root and makes the directories that are missing. Symbolic links are followed as long as
// they stay within root.
func openBeneath(root, sub string) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, fmt.Errorf("open volume %s: %w", root, err)
	}
	defer func() { _ = unix.Close(dir) }()
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	open := func(p string) (int, error) { return openat2(dir, p, how) }
	fd, err := open(sub)
	if err == nil {
		return fd, nil
	}
	if !errors.Is(err, unix.ENOENT) {
		return -1, fmt.Errorf("subPath %q: %w", sub, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return -1, fmt.Errorf("stat volume %s: %w", root, err)
	}
	parts := strings.Split(filepath.Clean(sub), string(filepath.Separator))
	for i := range parts {
		above, err := open(filepath.Join(append([]string{"."}, parts[:i]...)...))
		if err != nil {
			return -1, fmt.Errorf("subPath %q: %w", sub, err)
		}
		err = makeDir(above, parts[i], st.Mode&0o7777)
		_ = unix.Close(above)
		if err != nil {
			return -1, fmt.Errorf("make subPath %q: %w", sub, err)
		}
	}
	fd, err = open(sub)
	if err != nil {
		return -1, fmt.Errorf("subPath %q: %w", sub, err)
	}
	return fd, nil
}

// openat2 tries again when a rename has raced with the look-up (openat2(2)).
func openat2(dir int, path string, how *unix.OpenHow) (int, error) {
	for {
		fd, err := unix.Openat2(dir, path, how)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		return fd, err
	}
}

// makeDir makes a directory with just that mode, whatever the umask, unless it is there. The mode is set on what was
// opened, which is no symbolic link: the name may have been replaced.
func makeDir(above int, name string, mode uint32) error {
	err := unix.Mkdirat(above, name, mode)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return err
	}
	fd, err := unix.Openat(above, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.Fchmod(fd, mode)
	_ = unix.Close(fd)
	return err
}
