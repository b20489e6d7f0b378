// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/moby/sys/mountinfo"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/csi"
)

// Drivers mount volumes that are theirs. *csi.Drivers implements it.
type Drivers interface {
	Publish(ctx context.Context, v csi.Volume, staging, target string) (csi.Capabilities, error)
	Unpublish(ctx context.Context, driver, handle, target string) error
	Unstage(ctx context.Context, driver, handle, staging string) error
}

// csiKind is the directory of volumes that drivers have mounted, csiRecord beside each says whose it is (kubelet's names).
const (
	csiKind   = "kubernetes.io~csi"
	csiRecord = "vol_data.json"
)

// published is a volume of a driver that a pod has, or is about to have.
type published struct {
	Driver string `json:"driverName"`
	Handle string `json:"volumeHandle"`
}

func csiDir(podDir, volume string) string { return filepath.Join(podDir, "volumes", csiKind, volume) }

// csiTarget is where a driver has mounted a volume of a pod; ok is false if no driver was asked to.
func csiTarget(podDir, volume string) (path string, ok bool) {
	dir := csiDir(podDir, volume)
	_, err := os.Lstat(filepath.Join(dir, csiRecord))
	return filepath.Join(dir, "mount"), err == nil
}

func (v *Volumes) staging(p published) string {
	return csi.Staging(filepath.Join(filepath.Dir(v.cfg.Dir), "plugins"), p.Driver, p.Handle)
}

// publish has a driver mount a volume for a pod. What is to be undone is written down first.
func (v *Volumes) publish(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume, s source) error {
	p := published{Driver: s.csi.Driver, Handle: s.csi.Handle}
	defer v.lockVolume(p)()
	dir := csiDir(v.podDir(pod.UID), vol.Name)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, csiRecord), text, 0o600); err != nil {
		return err
	}
	target := filepath.Join(dir, "mount")
	ask := *s.csi
	ask.ReadOnly = readOnly(vol)
	ask.FSGroup = fsGroup(pod)
	can, err := v.cfg.Drivers.Publish(ctx, ask, v.staging(p), target)
	if err != nil {
		return err
	}
	if group := fsGroup(pod); group != nil && s.owned && !can.MountGroup && !ask.ReadOnly {
		if err := giveTo(target, int(*group), pod.Spec.SecurityContext.FSGroupChangePolicy); err != nil {
			return errors.Join(fmt.Errorf("give volume %s to group %d: %w", p.Handle, *group, err), v.cfg.Drivers.Unpublish(ctx, p.Driver, p.Handle, target))
		}
	}
	return nil
}

// lockVolume keeps a volume from being staged and unstaged at once.
func (v *Volumes) lockVolume(p published) (unlock func()) {
	key := p.Driver + "/" + p.Handle
	v.handles.LockKey(key)
	return func() { _ = v.handles.UnlockKey(key) }
}

// unpublish has drivers undo what they mounted for a pod, and for the node where no other pod has the volume.
func (v *Volumes) unpublish(ctx context.Context, podDir string) error {
	records, err := filepath.Glob(filepath.Join(csiDir(podDir, "*"), csiRecord))
	if err != nil || len(records) == 0 {
		return err
	}
	// Parts of them that containers had are mounted apart.
	if err := unmountBelow(filepath.Join(podDir, "volume-subpaths")); err != nil {
		return err
	}
	var errs []error
	for _, r := range records {
		errs = append(errs, v.unpublishOne(ctx, r))
	}
	return errors.Join(errs...)
}

func (v *Volumes) unpublishOne(ctx context.Context, record string) error {
	p, err := readRecord(record)
	if err != nil {
		return err
	}
	defer v.lockVolume(p)()
	if err := v.cfg.Drivers.Unpublish(ctx, p.Driver, p.Handle, filepath.Join(filepath.Dir(record), "mount")); err != nil {
		return err
	}
	others, err := filepath.Glob(filepath.Join(csiDir(filepath.Join(v.cfg.Dir, "*"), "*"), csiRecord))
	if err != nil {
		return err
	}
	for _, o := range others {
		other, err := readRecord(o)
		if errors.Is(err, fs.ErrNotExist) || o == record {
			continue
		}
		if err != nil {
			return err
		}
		if other == p {
			return os.RemoveAll(filepath.Dir(record))
		}
	}
	if err := v.cfg.Drivers.Unstage(ctx, p.Driver, p.Handle, v.staging(p)); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Dir(record))
}

func readRecord(path string) (published, error) {
	var p published
	text, err := os.ReadFile(path)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// csiSource is the volume of a driver behind a claim, if the cluster can give it to this node.
func (v *Volumes) csiSource(ctx context.Context, pod *corev1.Pod, pv *corev1.PersistentVolume) (source, error) {
	from := pv.Spec.CSI
	driver, err := v.cfg.Client.StorageV1().CSIDrivers().Get(ctx, from.Driver, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return source{}, fmt.Errorf("failed to get CSIDriver %s: %w", from.Driver, err)
	}
	if err != nil || driver.Spec.AttachRequired == nil || *driver.Spec.AttachRequired {
		return source{}, fmt.Errorf("PV %s: driver %s has its volumes attached to nodes, which this cluster does not do: only drivers whose CSIDriver says attachRequired: false can be used: %w", pv.Name, from.Driver, ErrUnsupported)
	}
	s := source{csi: &csi.Volume{
		Driver: from.Driver, Handle: from.VolumeHandle, FSType: from.FSType, AccessMode: corev1.ReadWriteOnce,
		MountOptions: pv.Spec.MountOptions, Attributes: from.VolumeAttributes,
	}}
	if len(pv.Spec.AccessModes) > 0 {
		s.csi.AccessMode = pv.Spec.AccessModes[0]
	}
	policy := storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy
	if driver.Spec.FSGroupPolicy != nil {
		policy = *driver.Spec.FSGroupPolicy
	}
	s.owned = policy == storagev1.FileFSGroupPolicy || policy == storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy && from.FSType != "" && s.csi.AccessMode == corev1.ReadWriteOnce
	if driver.Spec.PodInfoOnMount != nil && *driver.Spec.PodInfoOnMount {
		s.csi.PublishContext = map[string]string{
			"csi.storage.k8s.io/pod.name": pod.Name, "csi.storage.k8s.io/pod.namespace": pod.Namespace, "csi.storage.k8s.io/pod.uid": string(pod.UID),
			"csi.storage.k8s.io/serviceAccount.name": pod.Spec.ServiceAccountName, "csi.storage.k8s.io/ephemeral": strconv.FormatBool(false),
		}
	}
	if s.csi.StageSecrets, err = v.driverSecret(ctx, from.NodeStageSecretRef); err != nil {
		return source{}, err
	}
	s.csi.PublishSecrets, err = v.driverSecret(ctx, from.NodePublishSecretRef)
	return s, err
}

func (v *Volumes) driverSecret(ctx context.Context, ref *corev1.SecretReference) (map[string]string, error) {
	if ref == nil {
		return nil, nil
	}
	secret, err := v.cfg.Client.CoreV1().Secrets(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("fetching secret %s/%s for the driver failed: %w", ref.Namespace, ref.Name, err)
	}
	out := map[string]string{}
	for key, value := range secret.Data {
		out[key] = string(value)
	}
	return out, nil
}

// claimDir is where the volume of a pod's claim is, below the pod's directory.
func claimDir(podDir string, vol *corev1.Volume) string {
	if target, ok := csiTarget(podDir, vol.Name); ok {
		return target
	}
	return filepath.Join(podDir, "volumes", kind(vol), vol.Name)
}

// claimMounted reports whether the volume of a pod's claim is there.
func (v *Volumes) claimMounted(uid types.UID, vol *corev1.Volume) (bool, error) {
	done, err := mountinfo.Mounted(claimDir(v.podDir(uid), vol))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return done, err
}
