// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

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
	Usage(ctx context.Context, driver, handle, staging, target string) (*csi.Usage, error)
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

// republishEvery is how often a driver that wants it is asked again (kubelet: at each sync of a pod, a minute at least).
const republishEvery = time.Minute

// stays reports whether what a driver has mounted for a pod stays as it is; else the driver is to be asked again.
func (v *Volumes) stays(ctx context.Context, uid types.UID, vol *corev1.Volume) (bool, error) {
	p, err := readRecord(filepath.Join(csiDir(v.podDir(uid), vol.Name), csiRecord))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // no driver's
	}
	if err != nil {
		return false, err
	}
	driver, err := v.cfg.Client.StorageV1().CSIDrivers().Get(ctx, p.Driver, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return false, fmt.Errorf("failed to get CSIDriver %s: %w", p.Driver, err)
	}
	return err != nil || !republishes(driver), nil
}

func republishes(driver *storagev1.CSIDriver) bool {
	return driver.Spec.RequiresRepublish != nil && *driver.Spec.RequiresRepublish
}

// publish has a driver mount a volume for a pod, or asks it again. What is to be undone is written down first.
func (v *Volumes) publish(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume, s source) (again time.Time, err error) {
	p := published{Driver: s.csi.Driver, Handle: s.csi.Handle}
	defer v.lockVolume(p)()
	dir := csiDir(v.podDir(pod.UID), vol.Name)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return time.Time{}, err
	}
	text, err := json.Marshal(p)
	if err != nil {
		return time.Time{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, csiRecord), text, 0o600); err != nil {
		return time.Time{}, err
	}
	target := filepath.Join(dir, "mount")
	ask := *s.csi
	ask.ReadOnly = readOnly(vol)
	ask.FSGroup = fsGroup(pod)
	if ask.Again, err = mountinfo.Mounted(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, err
	}
	can, err := v.cfg.Drivers.Publish(ctx, ask, v.staging(p), target)
	if err != nil {
		return time.Time{}, err
	}
	if group := fsGroup(pod); group != nil && s.owned && !can.MountGroup && !ask.ReadOnly && !ask.Again {
		if err := giveTo(target, int(*group), pod.Spec.SecurityContext.FSGroupChangePolicy); err != nil {
			return time.Time{}, errors.Join(fmt.Errorf("give volume %s to group %d: %w", p.Handle, *group, err), v.cfg.Drivers.Unpublish(ctx, p.Driver, p.Handle, target))
		}
	}
	if s.republish {
		again = time.Now().Add(republishEvery)
	}
	return again, nil
}

// mountInline has a driver make a volume that is in a pod's spec, and lives with the pod.
func (v *Volumes) mountInline(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume, dir string) (again time.Time, err error) {
	done, err := mountinfo.Mounted(dir)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil && done {
		done, err = v.stays(ctx, pod.UID, vol)
	}
	if err != nil || done {
		return time.Time{}, err
	}
	s, err := v.inlineSource(ctx, pod, vol)
	if err != nil {
		return time.Time{}, err
	}
	return v.publish(ctx, pod, vol, s)
}

// inlineSource is what a driver is to make for a pod.
func (v *Volumes) inlineSource(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (source, error) {
	from := vol.CSI
	driver, err := v.driver(ctx, from.Driver)
	if err != nil {
		return source{}, err
	}
	if err := lives(driver, from.Driver, storagev1.VolumeLifecycleEphemeral); err != nil {
		return source{}, err
	}
	s := source{republish: republishes(driver), csi: &csi.Volume{
		// As kubelet names them (csi_plugin.go, makeVolumeHandle): drivers know them by that.
		Driver: from.Driver, Handle: fmt.Sprintf("csi-%x", sha256.Sum256([]byte(string(pod.UID)+vol.Name))),
		AccessMode: corev1.ReadWriteOnce, Attributes: from.VolumeAttributes, Inline: true, PublishContext: podInfo(driver, pod, true),
	}}
	if from.FSType != nil {
		s.csi.FSType = *from.FSType
	}
	s.owned = ownedByGroup(driver, s.csi)
	if from.NodePublishSecretRef != nil {
		s.csi.PublishSecrets, err = v.driverSecret(ctx, &corev1.SecretReference{Namespace: pod.Namespace, Name: from.NodePublishSecretRef.Name})
	}
	return s, err
}

// driver is what the cluster says of a driver; nil if it says nothing.
func (v *Volumes) driver(ctx context.Context, name string) (*storagev1.CSIDriver, error) {
	driver, err := v.cfg.Client.StorageV1().CSIDrivers().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("failed to get CSIDriver %s: %w", name, err)
	}
	return driver, nil
}

// lives refuses a volume of a kind that a driver does not say it has.
func lives(driver *storagev1.CSIDriver, name string, mode storagev1.VolumeLifecycleMode) error {
	if driver == nil {
		return fmt.Errorf("volume mode %q not supported by driver %s (no CSIDriver object)", mode, name)
	}
	modes := driver.Spec.VolumeLifecycleModes
	if len(modes) == 0 {
		modes = []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent}
	}
	if !slices.Contains(modes, mode) {
		return fmt.Errorf("volume mode %q not supported by driver %s (only supports %q)", mode, name, modes)
	}
	return nil
}

// podInfo says to a driver that wants to know for which pod a volume is.
func podInfo(driver *storagev1.CSIDriver, pod *corev1.Pod, inline bool) map[string]string {
	if driver.Spec.PodInfoOnMount == nil || !*driver.Spec.PodInfoOnMount {
		return nil
	}
	return map[string]string{
		"csi.storage.k8s.io/pod.name": pod.Name, "csi.storage.k8s.io/pod.namespace": pod.Namespace, "csi.storage.k8s.io/pod.uid": string(pod.UID),
		"csi.storage.k8s.io/serviceAccount.name": pod.Spec.ServiceAccountName, "csi.storage.k8s.io/ephemeral": strconv.FormatBool(inline),
	}
}

// ownedByGroup reports whether a volume's files are given to a pod's fsGroup.
func ownedByGroup(driver *storagev1.CSIDriver, volume *csi.Volume) bool {
	policy := storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy
	if driver.Spec.FSGroupPolicy != nil {
		policy = *driver.Spec.FSGroupPolicy
	}
	return policy == storagev1.FileFSGroupPolicy || policy == storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy && volume.FSType != "" && volume.AccessMode == corev1.ReadWriteOnce
}

// Usage asks the driver of a pod's volume how full it is; nil if it does not tell, or the volume is no driver's.
func (v *Volumes) Usage(ctx context.Context, uid types.UID, volume string) (*csi.Usage, error) {
	dir := csiDir(v.podDir(uid), volume)
	p, err := readRecord(filepath.Join(dir, csiRecord))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return v.cfg.Drivers.Usage(ctx, p.Driver, p.Handle, v.staging(p), filepath.Join(dir, "mount"))
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
	driver, err := v.driver(ctx, from.Driver)
	if err != nil {
		return source{}, err
	}
	if driver == nil || driver.Spec.AttachRequired == nil || *driver.Spec.AttachRequired {
		return source{}, fmt.Errorf("PV %s: driver %s has its volumes attached to nodes, which this cluster does not do: only drivers whose CSIDriver says attachRequired: false can be used: %w", pv.Name, from.Driver, ErrUnsupported)
	}
	if err := lives(driver, from.Driver, storagev1.VolumeLifecyclePersistent); err != nil {
		return source{}, err
	}
	s := source{republish: republishes(driver), csi: &csi.Volume{
		Driver: from.Driver, Handle: from.VolumeHandle, FSType: from.FSType, AccessMode: corev1.ReadWriteOnce,
		MountOptions: pv.Spec.MountOptions, Attributes: from.VolumeAttributes, PublishContext: podInfo(driver, pod, false),
	}}
	if len(pv.Spec.AccessModes) > 0 {
		s.csi.AccessMode = pv.Spec.AccessModes[0]
	}
	s.owned = ownedByGroup(driver, s.csi)
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
