// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/csi"
	"skep.io/skep/node/eviction"
	"skep.io/skep/node/volumes"
)

// VolumeUsage is how full a pod's volume is, if the driver whose it is tells.
func (a *Agent) VolumeUsage(ctx context.Context, pod types.UID, volume string) (*csi.Usage, error) {
	return a.volumes.Load().Usage(ctx, pod, volume)
}

// PodDisk measures what a pod has on disk. Its trees are walked: that takes as long as they have files. With an error it
// holds what could be read.
func (a *Agent) PodDisk(ctx context.Context, p *corev1.Pod) (eviction.PodDisk, error) {
	out := eviction.PodDisk{Containers: map[string]eviction.ContainerDisk{}, Volumes: map[string]eviction.Tree{}}
	var errs []error
	containers, err := a.runtime.ListPod(ctx, p.UID)
	errs = append(errs, err)
	for _, c := range containers {
		one := out.Containers[c.Name]
		bytes, inodes, err := a.runtime.DiskUsage(ctx, c.ID)
		errs = append(errs, err)
		one.Writable.Bytes += bytes
		one.Writable.Inodes += inodes
		out.Containers[c.Name] = one
	}
	set := a.set.Load()
	for name, one := range out.Containers {
		one.Logs, err = eviction.DiskUsage(ctx, filepath.Dir(set.LogPath(p, name, 0)))
		errs = append(errs, err)
		out.Containers[name] = one
	}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		dir, own := volumes.OwnFiles(filepath.Join(a.cfg.DataDir, "pods"), p.UID, v)
		if !own {
			continue
		}
		tree, err := eviction.DiskUsage(ctx, dir)
		errs = append(errs, err)
		out.Volumes[v.Name] = tree
	}
	return out, errors.Join(errs...)
}
