// SPDX-License-Identifier: Apache-2.0

// Package volumes mounts what the containers of a pod see of the world: emptyDir, hostPath, configMap, secret,
// downwardAPI and projected volumes, the last with service account tokens that it renews in time, and the local and
// hostPath volumes of claims. It also keeps the directories of volumes of class local-path.
//
// Under the data directory it keeps what kubelet keeps, under the same names:
//
//	pods/UID/volumes/kubernetes.io~KIND/NAME
//	pods/UID/volume-subpaths/NAME/CONTAINER/INDEX
//	pods/UID/volumeDevices/kubernetes.io~KIND/NAME
//	plugins/kubernetes.io/csi/DRIVER/HASH/globalmount
package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/keymutex"

	"skep.io/skep/node/steps"
)

// ErrUnsupported is for kinds of volumes that this node cannot mount.
var ErrUnsupported = errors.New("this kind of volume is not supported by this node")

// Config of Volumes. All fields are needed.
type Config struct {
	Dir         string // DATA/pods
	Client      kubernetes.Interface
	Objects     *Objects
	NodeIPs     []string
	Allocatable corev1.ResourceList
	Images      Images
	Drivers     Drivers
	Log         *slog.Logger
}

// Images makes volumes of images. runtime.ImageStore implements it.
type Images interface {
	// Mount mounts an image's files read-only at dir, which it makes.
	Mount(ctx context.Context, imageID string, pod types.UID, volume, dir string) error
	// Release gives up what Mount has kept for the volumes of a pod, once they are unmounted.
	Release(ctx context.Context, pod types.UID) error
}

// Volumes of this node's pods.
type Volumes struct {
	cfg Config

	mu     sync.Mutex
	tokens map[tokenKey]*token

	handles keymutex.KeyMutex // of drivers' volumes
}

// Mount is a place on the host that a container sees.
type Mount struct {
	HostPath      string
	ContainerPath string
	ReadOnly      bool
	Recursive     bool // read-only with all that is mounted below
	Propagation   corev1.MountPropagationMode
	Volume        string // of the pod
	Image         bool   // the volume is an image
}

// New returns Volumes that have mounted nothing yet.
func New(cfg Config) (*Volumes, error) {
	if err := os.MkdirAll(cfg.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("directory of pods: %w", err)
	}
	// Mounts are listed by their real paths.
	dir, err := filepath.EvalSymlinks(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("directory of pods: %w", err)
	}
	if cfg.Dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("directory of pods: %w", err)
	}
	return &Volumes{cfg: cfg, tokens: map[tokenKey]*token{}, handles: keymutex.NewHashed(0)}, nil
}

// imageKind is the directory of volumes that show an image.
const imageKind = "kubernetes.io~image"

// kind names the plugin directory of a volume, as kubelet does; empty for a kind that is not supported.
func kind(v *corev1.Volume) string {
	switch {
	case v.EmptyDir != nil:
		return "kubernetes.io~empty-dir"
	case v.HostPath != nil:
		return "kubernetes.io~host-path"
	case v.ConfigMap != nil:
		return "kubernetes.io~configmap"
	case v.Secret != nil:
		return "kubernetes.io~secret"
	case v.DownwardAPI != nil:
		return "kubernetes.io~downward-api"
	case v.Projected != nil:
		return "kubernetes.io~projected"
	case v.Image != nil:
		return imageKind
	case v.CSI != nil:
		return csiKind
	case v.PersistentVolumeClaim != nil, v.Ephemeral != nil:
		return "kubernetes.io~local-volume"
	default:
		return ""
	}
}

func (v *Volumes) podDir(uid types.UID) string { return filepath.Join(v.cfg.Dir, string(uid)) }

// path is where a volume of a pod is on the host.
func (v *Volumes) path(uid types.UID, vol *corev1.Volume) string {
	if vol.HostPath != nil {
		return vol.HostPath.Path
	}
	if vol.PersistentVolumeClaim != nil || vol.Ephemeral != nil {
		return claimDir(v.podDir(uid), vol)
	}
	if vol.CSI != nil {
		return filepath.Join(csiDir(v.podDir(uid), vol.Name), "mount")
	}
	return filepath.Join(v.podDir(uid), "volumes", kind(vol), vol.Name)
}

// OwnFiles is where the files of a volume are that belong to a pod and go with it, below the directory of all pods; own
// is false for a volume whose files are somebody else's.
func OwnFiles(pods string, uid types.UID, vol *corev1.Volume) (dir string, own bool) {
	k := kind(vol)
	if k == "" || vol.HostPath != nil || vol.Image != nil || vol.PersistentVolumeClaim != nil || vol.Ephemeral != nil || vol.CSI != nil {
		return "", false
	}
	return filepath.Join(pods, string(uid), "volumes", k, vol.Name), true
}

// Claim is where the volume of a pod's claim is mounted, below the directory of all pods; the name is empty for a volume
// that is none.
func Claim(pods string, pod *corev1.Pod, vol *corev1.Volume) (dir, name string) {
	return claimDir(filepath.Join(pods, string(pod.UID)), vol), claimName(pod, vol)
}

// Mount makes all volumes of a pod at the same time, or brings them up to date. The error joins one for each volume that
// failed, worded like kubelet's event. refresh is when a token needs renewing; zero for never.
func (v *Volumes) Mount(ctx context.Context, pod *corev1.Pod) (refresh time.Time, err error) {
	v.cfg.Objects.Track(pod)
	errs := make([]error, len(pod.Spec.Volumes))
	dues := make([]time.Time, len(pod.Spec.Volumes))
	var wg sync.WaitGroup
	for i := range pod.Spec.Volumes {
		wg.Go(func() {
			vol := &pod.Spec.Volumes[i]
			due, err := v.mountOne(ctx, pod, vol)
			steps.Passed(ctx, "volume: "+kind(vol))
			if err != nil {
				errs[i] = fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", vol.Name, err)
			}
			dues[i] = due
		})
	}
	wg.Wait()
	for _, d := range dues {
		if !d.IsZero() && (refresh.IsZero() || d.Before(refresh)) {
			refresh = d
		}
	}
	return refresh, errors.Join(errs...)
}

func (v *Volumes) mountOne(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (refresh time.Time, err error) {
	dir := v.path(pod.UID, vol)
	switch {
	case vol.EmptyDir != nil:
		return time.Time{}, emptyDir(dir, vol.EmptyDir, fsGroup(pod))
	case vol.HostPath != nil:
		return time.Time{}, hostPath(vol.HostPath)
	case vol.Image != nil:
		return time.Time{}, nil // MountImage makes it, once the image is here
	case kind(vol) == "":
		return time.Time{}, ErrUnsupported
	case claimName(pod, vol) != "":
		return v.mountClaim(ctx, pod, vol, dir)
	case vol.CSI != nil:
		return v.mountInline(ctx, pod, vol, dir)
	}
	files, refresh, err := v.files(ctx, pod, vol)
	if err != nil {
		return time.Time{}, err
	}
	return refresh, writeFiles(dir, vol, files, fsGroup(pod), v.cfg.Log)
}

// MountImage makes a volume of an image that is here.
func (v *Volumes) MountImage(ctx context.Context, pod *corev1.Pod, volume, imageID string) error {
	vol := Of(pod, volume)
	if vol == nil || vol.Image == nil {
		return fmt.Errorf("pod %s/%s has no volume %q of an image", pod.Namespace, pod.Name, volume)
	}
	return v.cfg.Images.Mount(ctx, imageID, pod.UID, volume, v.path(pod.UID, vol))
}

func fsGroup(pod *corev1.Pod) *int64 {
	if sc := pod.Spec.SecurityContext; sc != nil {
		return sc.FSGroup
	}
	return nil
}

// Present reports whether a pod has volumes on disk.
func (v *Volumes) Present(uid types.UID) bool {
	for _, d := range []string{"volumes", "volume-subpaths", deviceDir} {
		if _, err := os.Lstat(filepath.Join(v.podDir(uid), d)); err == nil {
			return true
		}
	}
	return false
}

// List names the pods that have a directory.
func (v *Volumes) List() ([]types.UID, error) {
	dirs, err := os.ReadDir(v.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("directory of pods: %w", err)
	}
	out := make([]types.UID, 0, len(dirs))
	for _, d := range dirs {
		out = append(out, types.UID(d.Name()))
	}
	return out, nil
}

// Unmount takes away a pod's volumes: mounts first, and only what is on the same file system as the pod's directory is
// deleted, so that a mount which cannot be undone loses nothing.
func (v *Volumes) Unmount(ctx context.Context, uid types.UID) error {
	v.forget(uid)
	if uid == "" {
		return errors.New("unmount the volumes of a pod without uid")
	}
	dir := v.podDir(uid)
	if err := v.unpublish(ctx, dir); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, "volumes", imageKind)); err == nil {
		// Released before the directory goes, which says that there is something to release.
		if err := unmountBelow(dir); err != nil {
			return err
		}
		if err := v.cfg.Images.Release(ctx, uid); err != nil {
			return err
		}
	}
	return clear(dir)
}

// Cleanup removes every trace that Volumes leave under dir, without a running node.
func Cleanup(_ context.Context, dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("directory of pods: %w", err)
	}
	pods, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("directory of pods: %w", err)
	}
	var errs []error
	for _, p := range pods {
		at := filepath.Join(dir, p.Name())
		if err := clear(at); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, removeHere(at))
	}
	return errors.Join(errs...)
}

func clear(podDir string) error {
	if err := unmountBelow(podDir); err != nil {
		return err
	}
	var errs []error
	for _, d := range []string{"volume-subpaths", deviceDir, "volumes"} {
		errs = append(errs, removeHere(filepath.Join(podDir, d)))
	}
	return errors.Join(errs...)
}
