// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// Mount mounts an image's files read-only at dir, as a volume of a pod. One that is mounted there already stays. Errors:
// ErrImageNotFound.
func (s ImageStore) Mount(ctx context.Context, imageID string, pod types.UID, volume, dir string) error {
	r, ctx := s.r, s.r.in(ctx)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if done, err := mountinfo.Mounted(dir); err != nil || done {
		return err
	}
	info, err := r.images.find(imageID)
	if err != nil {
		return err
	}
	mounts, err := r.view(ctx, info, viewKey(pod, volume), snapshots.WithLabels(map[string]string{rootLabel: "volume", labelPodUID: string(pod)}))
	if err != nil {
		return fmt.Errorf("files of image %s: %w", imageID, err)
	}
	if err := mount.All(mounts, dir); err != nil {
		return fmt.Errorf("mount image %s at %s: %w", imageID, dir, errors.Join(err, unmounted(dir)))
	}
	return nil
}

// viewKey names the snapshot that a volume shows.
func viewKey(pod types.UID, volume string) string { return "volume-" + string(pod) + "-" + volume }

// view makes a snapshot that shows an image's files, in place of what had that name.
func (r *Runtime) view(ctx context.Context, info *imageInfo, key string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	sn := r.client.SnapshotService(r.snapshotter)
	view := func() ([]mount.Mount, error) {
		_ = sn.Remove(ctx, key)
		return sn.View(ctx, key, info.chainID, opts...)
	}
	mounts, err := view()
	if errdefs.IsNotFound(err) {
		// The image's layers were not unpacked, or were collected.
		if err = r.unpack(ctx, info); err == nil {
			mounts, err = view()
		}
	}
	return mounts, err
}

// unmounted undoes what of several mounts was made.
func unmounted(dir string) error {
	for {
		switch err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); {
		case errors.Is(err, unix.EINVAL): // nothing is mounted there any more
			return nil
		case err != nil:
			return err
		}
	}
}

// Release gives up what Mount has kept for the volumes of a pod. They must not be mounted any more.
func (s ImageStore) Release(ctx context.Context, pod types.UID) error {
	r, ctx := s.r, s.r.in(ctx)
	sn := r.client.SnapshotService(r.snapshotter)
	var keys []string
	err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindView && info.Labels[labelPodUID] == string(pod) {
			keys = append(keys, info.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	for _, key := range keys {
		if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove snapshot %s: %w", key, err)
		}
	}
	return nil
}
