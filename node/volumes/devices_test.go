// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// localClaim is a claim that is bound to a local volume.
func localClaim(name, path string, mode corev1.PersistentVolumeMode) (*corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "claim-uid"},
		Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: "pv-" + name, VolumeMode: &mode},
		Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
	}
	return claim, &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "pv-" + name},
		Spec: corev1.PersistentVolumeSpec{
			VolumeMode: &mode, ClaimRef: &corev1.ObjectReference{Namespace: "ns", Name: name, UID: "claim-uid"},
			PersistentVolumeSource: corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: path}},
		},
	}
}

// A claim of a device is no mount but a device, and is what its mode and the containers say that it is, or refused.
func TestBlockDevices(t *testing.T) {
	dir := t.TempDir()
	disk, link, file := filepath.Join(dir, "disk"), filepath.Join(dir, "link"), filepath.Join(dir, "file")
	if err := unix.Mknod(disk, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(disk, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path     string
		mode     corev1.PersistentVolumeMode
		readOnly bool
		mounted  bool // the container mounts it, too
		want     Device
		err      string
	}{
		"a device":                {path: disk, mode: corev1.PersistentVolumeBlock, want: Device{HostPath: disk, ContainerPath: "/dev/data"}},
		"by a link, read-only":    {path: link, mode: corev1.PersistentVolumeBlock, readOnly: true, want: Device{HostPath: disk, ContainerPath: "/dev/data", ReadOnly: true}},
		"a file":                  {path: file, mode: corev1.PersistentVolumeBlock, err: "is not a block device"},
		"nothing":                 {path: dir + "/none", mode: corev1.PersistentVolumeBlock, err: "does not exist"},
		"mounted":                 {path: disk, mode: corev1.PersistentVolumeBlock, mounted: true, err: "volume v has volumeMode Block, but is specified in volumeMounts"},
		"a directory as a device": {path: dir, mode: corev1.PersistentVolumeFilesystem, err: "volume v has volumeMode Filesystem, but is specified in volumeDevices"},
	} {
		t.Run(name, func(t *testing.T) {
			claim, pv := localClaim("data", c.path, c.mode)
			b := newBench(t, claim, pv)
			p := podWith(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data", ReadOnly: c.readOnly},
			}})
			p.Spec.Containers[0].VolumeDevices = []corev1.VolumeDevice{{Name: "v", DevicePath: "/dev/data"}}
			if c.mounted {
				p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v"}}
			}
			for range 2 {
				_, err := b.Mount(t.Context(), p)
				if (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
					t.Fatalf("mount: %v", err)
				}
			}
			got, err := b.ContainerDevices(p, &p.Spec.Containers[0])
			if c.err != "" {
				if err == nil {
					t.Errorf("devices %v", got)
				}
				return
			}
			if err != nil || !slices.Equal(got, []Device{c.want}) {
				t.Errorf("devices %v, %v", got, err)
			}
			if !b.Present(p.UID) {
				t.Error("nothing is there to unmount")
			}
			if err := b.Unmount(t.Context(), p.UID); err != nil || b.Present(p.UID) {
				t.Errorf("unmount: %v", err)
			}
			if _, err := os.Stat(disk); err != nil {
				t.Error(err)
			}
		})
	}
}
