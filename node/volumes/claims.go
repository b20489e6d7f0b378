// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/ephemeral"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/csi"
)

// claimName names the claim behind a volume; empty for a volume without.
func claimName(pod *corev1.Pod, vol *corev1.Volume) string {
	switch {
	case vol.PersistentVolumeClaim != nil:
		return vol.PersistentVolumeClaim.ClaimName
	case vol.Ephemeral != nil:
		return ephemeral.VolumeClaimName(pod, vol)
	}
	return ""
}

// mountClaim binds the volume of a claim to dir, unless that is done; a claim of a block device becomes a link to it. What
// it says when it cannot is kubelet's.
func (v *Volumes) mountClaim(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume, dir string) (again time.Time, err error) {
	link := v.deviceLink(pod.UID, vol)
	if _, err := os.Lstat(link); err == nil {
		return time.Time{}, nil
	}
	done, err := v.claimMounted(pod.UID, vol)
	if err == nil && done {
		done, err = v.stays(ctx, pod.UID, vol)
	}
	if err != nil || done {
		return time.Time{}, err
	}
	source, err := v.claimed(ctx, pod, vol)
	if err != nil {
		return time.Time{}, fmt.Errorf("error processing PVC %s/%s: %w", pod.Namespace, claimName(pod, vol), err)
	}
	if source.csi != nil {
		return v.publish(ctx, pod, vol, source)
	}
	return time.Time{}, v.bindClaim(pod, vol, source, link, dir)
}

// bindClaim shows at dir what is behind a claim on this host, or links to the device that it is.
func (v *Volumes) bindClaim(pod *corev1.Pod, vol *corev1.Volume, source source, link, dir string) error {
	if source.block {
		if err := os.MkdirAll(filepath.Dir(link), 0o750); err != nil {
			return err
		}
		return os.Symlink(source.path, link)
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if err := unix.Mount(source.path, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", source.path, dir, err)
	}
	if source.flags != 0 {
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_set: source.flags, Attr_clr: clears(source.flags)}); err != nil {
			return errors.Join(fmt.Errorf("mount options of %s: %w", source.path, err), unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
		}
	}
	if group := fsGroup(pod); group != nil && source.owned && !readOnly(vol) {
		if err := giveTo(dir, int(*group), pod.Spec.SecurityContext.FSGroupChangePolicy); err != nil {
			// Undone, so that the next attempt does all of it.
			return errors.Join(fmt.Errorf("give %s to group %d: %w", source.path, *group, err), unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
		}
	}
	return nil
}

func readOnly(vol *corev1.Volume) bool {
	return vol.PersistentVolumeClaim != nil && vol.PersistentVolumeClaim.ReadOnly || vol.CSI != nil && vol.CSI.ReadOnly != nil && *vol.CSI.ReadOnly
}

// source is what is behind a claim.
type source struct {
	path string
	// owned: its files may be given to a pod's fsGroup. As with kubelet, those of local volumes may, the host's may not.
	owned bool
	block bool        // a device, not a directory
	flags uint64      // MOUNT_ATTR_* of the volume's mount options
	csi   *csi.Volume // a driver's; nil for a path
	// republish: the driver wants to be asked again from time to time.
	republish bool
}

// claimed finds what is behind a claim.
func (v *Volumes) claimed(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (source, error) {
	core := v.cfg.Client.CoreV1()
	var claim *corev1.PersistentVolumeClaim
	if err := soon(ctx, func() (err error) {
		claim, err = core.PersistentVolumeClaims(pod.Namespace).Get(ctx, claimName(pod, vol), metav1.GetOptions{})
		return err
	}); err != nil {
		return source{}, fmt.Errorf("failed to fetch PVC from API server: %w", err)
	}
	if vol.Ephemeral != nil {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			return source{}, err
		}
	}
	switch {
	case claim.DeletionTimestamp != nil:
		return source{}, errors.New("PVC is being deleted")
	case claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName == "":
		return source{}, errors.New("PVC is not bound")
	}
	var volume *corev1.PersistentVolume
	if err := soon(ctx, func() (err error) {
		volume, err = core.PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
		return err
	}); err != nil {
		return source{}, fmt.Errorf("failed to get PV %s from API server: %w", claim.Spec.VolumeName, err)
	}
	if ref := volume.Spec.ClaimRef; ref == nil || ref.UID != claim.UID {
		return source{}, fmt.Errorf("PV %s is not bound to this PVC", volume.Name)
	}
	block := volume.Spec.VolumeMode != nil && *volume.Spec.VolumeMode == corev1.PersistentVolumeBlock
	if err := usedAs(pod, vol, block); err != nil {
		return source{}, err
	}
	switch s := volume.Spec.PersistentVolumeSource; {
	case s.CSI != nil && !block:
		return v.csiSource(ctx, pod, volume)
	case s.Local != nil:
		flags, err := mountFlags(volume.Spec.MountOptions)
		if err != nil {
			return source{}, fmt.Errorf("PV %s: %w", volume.Name, err)
		}
		out, err := localSource(s.Local.Path, block)
		out.flags = flags
		return out, err
	case s.HostPath != nil && !block:
		if len(volume.Spec.MountOptions) > 0 {
			return source{}, fmt.Errorf("PV %s: mountOptions %q: a directory of the host has the options of its own mount: leave them out, or make it a local volume", volume.Name, volume.Spec.MountOptions)
		}
		if err := hostPath(s.HostPath); err != nil {
			return source{}, err
		}
		st, err := os.Stat(s.HostPath.Path)
		if err == nil && !st.IsDir() {
			err = fmt.Errorf("path %q is not a directory: %w", s.HostPath.Path, ErrUnsupported)
		}
		return source{path: s.HostPath.Path}, err
	}
	return source{}, fmt.Errorf("PV %s: %w", volume.Name, ErrUnsupported)
}

// mountFlags are the mount options that a directory can have apart from the file system it is on.
func mountFlags(options []string) (uint64, error) {
	var flags uint64
	for _, o := range options {
		f, ok := map[string]uint64{
			"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
			"noatime": unix.MOUNT_ATTR_NOATIME, "nodiratime": unix.MOUNT_ATTR_NODIRATIME, "nosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW, "rw": 0, "relatime": 0,
		}[o]
		if !ok {
			return 0, fmt.Errorf("mountOptions: %q is not an option of a local volume: ro, nosuid, nodev, noexec, noatime, nodiratime, nosymfollow are", o)
		}
		flags |= f
	}
	return flags, nil
}

// clears are the attributes that others stand in place of (mount_setattr(2): "MOUNT_ATTR__ATIME").
func clears(flags uint64) uint64 {
	if flags&unix.MOUNT_ATTR_NOATIME != 0 {
		return unix.MOUNT_ATTR__ATIME
	}
	return 0
}

// localSource is what a local volume names, which must be of the volume's mode.
func localSource(path string, block bool) (source, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return source{}, fmt.Errorf("path %q does not exist", path)
	case err != nil:
		return source{}, err
	case block && st.Mode()&fs.ModeType != fs.ModeDevice:
		return source{}, fmt.Errorf("path %q is not a block device, which the volume's mode Block asks for", path)
	case !block && !st.IsDir():
		return source{}, fmt.Errorf("path %q is not a directory: %w", path, ErrUnsupported)
	}
	if block {
		if path, err = filepath.EvalSymlinks(path); err != nil { // disks are best named by links
			return source{}, err
		}
	}
	return source{path: path, owned: !block, block: block}, nil
}

// usedAs refuses a device that a container mounts, and a file system that one uses as a device (kubelet:
// desired_state_of_world_populator.go).
func usedAs(pod *corev1.Pod, vol *corev1.Volume, block bool) error {
	for c := range podutil.ContainerIter(&pod.Spec, podutil.AllContainers) {
		if block && slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == vol.Name }) {
			return fmt.Errorf("volume %s has volumeMode Block, but is specified in volumeMounts", vol.Name)
		}
		if !block && slices.ContainsFunc(c.VolumeDevices, func(d corev1.VolumeDevice) bool { return d.Name == vol.Name }) {
			return fmt.Errorf("volume %s has volumeMode Filesystem, but is specified in volumeDevices", vol.Name)
		}
	}
	return nil
}

// giveTo lets a group read and write all that is in dir, and owns by it what will be made there (kubelet:
// volume_linux.go). With policy OnRootMismatch nothing is done if dir itself is so already.
func giveTo(dir string, group int, policy *corev1.PodFSGroupChangePolicy) error {
	const files, dirs = 0o660, 0o770 | fs.ModeSetgid
	if policy != nil && *policy == corev1.FSGroupChangeOnRootMismatch {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return err
		}
		if int(st.Gid) == group && st.Mode&0o770 == 0o770 && st.Mode&unix.S_ISGID != 0 {
			return nil
		}
	}
	// Another pod may share the volume and move links about: nothing is followed out of the root.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	err = fs.WalkDir(root.FS(), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err == nil {
			err = root.Lchown(path, -1, group)
		}
		if err == nil && info.Mode()&fs.ModeSymlink == 0 {
			want := fs.FileMode(files)
			if info.IsDir() {
				want = dirs
			}
			err = root.Chmod(path, info.Mode()&^fs.ModeType|want)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // who shares the volume has removed it
		}
		return err
	})
	return errors.Join(err, root.Close())
}
