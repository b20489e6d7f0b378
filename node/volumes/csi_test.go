// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
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
	again := ""
	if v.Again {
		again = " again"
	}
	d.asked = append(d.asked, "publish "+v.Driver+" "+v.Handle+" "+v.PublishContext["csi.storage.k8s.io/pod.name"]+" "+v.PublishSecrets["word"]+again)
	if d.fail != nil || v.Again {
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

func (d *drivers) Usage(_ context.Context, driver, handle, _, _ string) (*csi.Usage, error) {
	d.asked = append(d.asked, "usage "+driver+" "+handle)
	return &csi.Usage{Bytes: csi.Amount{Total: 7}}, d.fail
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

// A volume in a pod's spec is made by a driver that says it makes such, for that pod, with its own name; nothing is staged.
// The driver that wants it is asked again while the pod runs, and what it answers does not take the volume away.
func TestInlineVolumes(t *testing.T) {
	yes, no, policy := true, false, storagev1.FileFSGroupPolicy
	object := &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Spec: storagev1.CSIDriverSpec{
		PodInfoOnMount: &yes, FSGroupPolicy: &policy, VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral}, RequiresRepublish: &yes,
	}}
	b := newBench(t, object, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "s"}, Data: map[string][]byte{"word": []byte("sesame")}})
	d := &drivers{}
	b.cfg.Drivers = d
	p := podWith(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver: "m", ReadOnly: &no, NodePublishSecretRef: &corev1.LocalObjectReference{Name: "s"},
	}}})
	p.Name, p.UID = "one", "uid-one"
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v"}}
	for range 2 {
		if again, err := b.Mount(t.Context(), p); err != nil || again.IsZero() {
			t.Fatalf("%v, %v", again, err)
		}
	}
	d.fail = errors.New("busy")
	if _, err := b.Mount(t.Context(), p); !errors.Is(err, d.fail) {
		t.Errorf("asked again: %v", err)
	}
	d.fail = nil
	mounts, err := b.ContainerMounts(p, &p.Spec.Containers[0], nil)
	if err != nil || len(mounts) != 1 || mounts[0].ReadOnly || mounts[0].HostPath != filepath.Join(b.dir, "uid-one", "volumes", "kubernetes.io~csi", "v", "mount") {
		t.Errorf("mounts %+v, %v", mounts, err)
	}
	if u, err := b.Usage(t.Context(), p.UID, "v"); err != nil || u.Bytes.Total != 7 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if u, err := b.Usage(t.Context(), p.UID, "another"); err != nil || u != nil {
		t.Errorf("usage of no driver's: %+v, %v", u, err)
	}
	if err := b.Unmount(t.Context(), p.UID); err != nil || b.Present(p.UID) {
		t.Error(err)
	}
	handle := fmt.Sprintf("csi-%x", sha256.Sum256([]byte("uid-onev")))
	want := []string{"publish m " + handle + " one sesame", "publish m " + handle + " one sesame again", "publish m " + handle + " one sesame again",
		"usage m " + handle, "unpublish m " + handle, "unstage m " + handle}
	if !slices.Equal(d.asked, want) {
		t.Errorf("asked %q", d.asked)
	}

	// Of what it does not say it makes, and of a driver that the cluster does not know.
	for driver, says := range map[string]string{"m": `volume mode "Ephemeral" not supported by driver m (only supports ["Persistent"])`, "n": "no CSIDriver object"} {
		object.Spec.VolumeLifecycleModes = nil
		if _, err := b.client.StorageV1().CSIDrivers().Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		p.Spec.Volumes[0].CSI.Driver = driver
		if _, err := b.Mount(t.Context(), p); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", driver, err)
		}
	}
}

// A local volume has its mount options, or is refused by the name of one that a directory cannot have.
func TestMountOptions(t *testing.T) {
	for _, c := range []struct {
		options []string
		flags   int64
		says    string
	}{
		{[]string{"noexec", "nosuid", "noatime"}, unix.ST_NOEXEC | unix.ST_NOSUID | unix.ST_NOATIME, ""},
		{[]string{"rw"}, 0, ""},
		{[]string{"ro"}, unix.ST_RDONLY, ""},
		{[]string{"noexec", "discard"}, 0, `PV pv-data: mountOptions: "discard" is not an option of a local volume`},
	} {
		claim, pv := localClaim("data", t.TempDir(), corev1.PersistentVolumeFilesystem)
		pv.Spec.MountOptions = c.options
		b := newBench(t, claim, pv)
		p := podWith(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}})
		p.UID = "uid-one"
		_, err := b.Mount(t.Context(), p)
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q: %v", c.options, err)
			}
			continue
		}
		var st unix.Statfs_t
		if err := errors.Join(err, unix.Statfs(filepath.Join(b.dir, "uid-one", "volumes", "kubernetes.io~local-volume", "v"), &st)); err != nil {
			t.Errorf("%q: %v", c.options, err)
		}
		if got := st.Flags & (unix.ST_NOEXEC | unix.ST_NOSUID | unix.ST_NOATIME | unix.ST_RDONLY); got != c.flags {
			t.Errorf("%q: flags %#x, want %#x", c.options, got, c.flags)
		}
		if err := b.Unmount(t.Context(), p.UID); err != nil {
			t.Error(err)
		}
	}
}
