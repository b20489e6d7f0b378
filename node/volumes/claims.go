// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/ephemeral"
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

// mountClaim binds the volume of a claim to dir, unless that is done. What it says when it cannot is kubelet's.
func (v *Volumes) mountClaim(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume, dir string) error {
	if done, err := mountinfo.Mounted(dir); err == nil && done {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	source, owned, err := v.claimed(ctx, pod, vol)
	if err != nil {
		return fmt.Errorf("error processing PVC %s/%s: %w", pod.Namespace, claimName(pod, vol), err)
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", source, dir, err)
	}
	readOnly := vol.PersistentVolumeClaim != nil && vol.PersistentVolumeClaim.ReadOnly
	if group := fsGroup(pod); group != nil && owned && !readOnly {
		if err := giveTo(dir, int(*group), pod.Spec.SecurityContext.FSGroupChangePolicy); err != nil {
			// Undone, so that the next attempt does all of it.
			return errors.Join(fmt.Errorf("give %s to group %d: %w", source, *group, err), unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
		}
	}
	return nil
}

// claimed finds the directory of a claim's volume. owned says whether its files may be given to a pod's fsGroup: as with
// kubelet, those of local volumes may, those that are the host's may not.
func (v *Volumes) claimed(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (source string, owned bool, err error) {
	core := v.cfg.Client.CoreV1()
	var claim *corev1.PersistentVolumeClaim
	if err := soon(ctx, func() (err error) {
		claim, err = core.PersistentVolumeClaims(pod.Namespace).Get(ctx, claimName(pod, vol), metav1.GetOptions{})
		return err
	}); err != nil {
		return "", false, fmt.Errorf("failed to fetch PVC from API server: %w", err)
	}
	if vol.Ephemeral != nil {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			return "", false, err
		}
	}
	switch {
	case claim.DeletionTimestamp != nil:
		return "", false, errors.New("PVC is being deleted")
	case claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName == "":
		return "", false, errors.New("PVC is not bound")
	}
	var volume *corev1.PersistentVolume
	if err := soon(ctx, func() (err error) {
		volume, err = core.PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
		return err
	}); err != nil {
		return "", false, fmt.Errorf("failed to get PV %s from API server: %w", claim.Spec.VolumeName, err)
	}
	switch ref := volume.Spec.ClaimRef; {
	case ref == nil || ref.UID != claim.UID:
		return "", false, fmt.Errorf("PV %s is not bound to this PVC", volume.Name)
	case volume.Spec.VolumeMode != nil && *volume.Spec.VolumeMode == corev1.PersistentVolumeBlock:
		return "", false, fmt.Errorf("PV %s is a block device: %w", volume.Name, ErrUnsupported)
	}
	switch s := volume.Spec.PersistentVolumeSource; {
	case s.Local != nil:
		st, err := os.Stat(s.Local.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return "", false, fmt.Errorf("path %q does not exist", s.Local.Path)
		}
		if err != nil {
			return "", false, err
		}
		if !st.IsDir() {
			return "", false, fmt.Errorf("path %q is not a directory: %w", s.Local.Path, ErrUnsupported)
		}
		return s.Local.Path, true, nil
	case s.HostPath != nil:
		if err := hostPath(s.HostPath); err != nil {
			return "", false, err
		}
		st, err := os.Stat(s.HostPath.Path)
		if err == nil && !st.IsDir() {
			err = fmt.Errorf("path %q is not a directory: %w", s.HostPath.Path, ErrUnsupported)
		}
		return s.HostPath.Path, false, err
	}
	return "", false, fmt.Errorf("PV %s: %w", volume.Name, ErrUnsupported)
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
