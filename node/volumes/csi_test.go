// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/csi"
)

// drivers mount memory, and note what they are asked.
type drivers struct {
	asked []string
	fail  error
}

func (d *drivers) Publish(_ context.Context, v csi.Volume, _, target string) (csi.Capabilities, error) {
	d.asked = append(d.asked, "publish "+v.Driver+" "+v.Handle+" "+v.PublishContext["csi.storage.k8s.io/pod.name"]+" "+v.PublishSecrets["word"])
	if d.fail != nil {
		return csi.Capabilities{}, d.fail
	}
	if err := os.Mkdir(target, 0o755); err != nil {
		return csi.Capabilities{}, err
	}
	return csi.Capabilities{Stages: true}, unix.Mount("tmpfs", target, "tmpfs", 0, "size=1m")
}

func (d *drivers) Unpublish(_ context.Context, driver, handle, target string) error {
	d.asked = append(d.asked, "unpublish "+driver+" "+handle)
	if d.fail != nil {
		return d.fail
	}
	return errors.Join(unix.Unmount(target, 0), os.Remove(target))
}

func (d *drivers) Unstage(_ context.Context, driver, handle, _ string) error {
	d.asked = append(d.asked, "unstage "+driver+" "+handle)
	return d.fail
}

func driverClaim(driver string) (*corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
	claim, pv := localClaim("data", "", corev1.PersistentVolumeFilesystem)
	pv.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
		Driver: driver, VolumeHandle: "h", NodePublishSecretRef: &corev1.SecretReference{Namespace: "hive", Name: "s"},
	}}
	return claim, pv
}

// TestDrivers: two pods share a driver's volume, which is given back for the node with the second; what a driver cannot
// undo stays noted.
func TestDrivers(t *testing.T) {
	claim, pv := driverClaim("m")
	yes, no, policy := true, false, storagev1.FileFSGroupPolicy
	b := newBench(t, claim, pv,
		&storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Spec: storagev1.CSIDriverSpec{AttachRequired: &no, PodInfoOnMount: &yes, FSGroupPolicy: &policy}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "hive", Name: "s"}, Data: map[string][]byte{"word": []byte("sesame")}})
	d := &drivers{}
	b.cfg.Drivers = d
	group := int64(4242)
	var pods []*corev1.Pod
	for _, name := range []string{"one", "two"} {
		p := podWith(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}})
		p.Name, p.UID = name, types.UID("uid-"+name)
		p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &group}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v"}, {Name: "v", MountPath: "/part", SubPath: "part"}}
		pods = append(pods, p)
		for range 2 {
			b.mount(t, p)
		}
		mounts, err := b.ContainerMounts(p, &p.Spec.Containers[0], nil)
		if err != nil || len(mounts) != 2 || mounts[0].HostPath != filepath.Join(b.dir, string(p.UID), "volumes", "kubernetes.io~csi", "v", "mount") {
			t.Errorf("mounts %+v, %v", mounts, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(mounts[0].HostPath, &st); err != nil || st.Gid != 4242 {
			t.Errorf("group %d, %v", st.Gid, err)
		}
	}
	d.fail = errors.New("busy")
	if err := b.Unmount(t.Context(), "uid-one"); !errors.Is(err, d.fail) || !b.Present("uid-one") {
		t.Errorf("a driver that fails: %v", err)
	}
	d.fail = nil
	for _, p := range pods {
		for range 2 {
			if err := b.Unmount(t.Context(), p.UID); err != nil || b.Present(p.UID) {
				t.Errorf("%s: %v", p.Name, err)
			}
		}
	}
	want := []string{"publish m h one sesame", "publish m h two sesame", "unpublish m h", "unpublish m h", "unpublish m h", "unstage m h"}
	if !slices.Equal(d.asked, want) {
		t.Errorf("asked %q", d.asked)
	}
}

// A driver that has its volumes attached is refused by name, as is one of which nothing is known.
func TestDriversThatAttach(t *testing.T) {
	for _, known := range []bool{true, false} {
		claim, pv := driverClaim("m")
		b := newBench(t, claim, pv)
		if known {
			if _, err := b.client.StorageV1().CSIDrivers().Create(t.Context(), &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "m"}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		d := &drivers{}
		b.cfg.Drivers = d
		p := podWith(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}})
		if _, err := b.Mount(t.Context(), p); err == nil || !strings.Contains(err.Error(), "attachRequired: false") || len(d.asked) > 0 {
			t.Errorf("known %v: %v, asked %q", known, err, d.asked)
		}
	}
}
