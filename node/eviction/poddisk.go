// SPDX-License-Identifier: Apache-2.0

package eviction

// PodDisk is what a pod has on disk.
type PodDisk struct {
	Containers map[string]ContainerDisk
	// Volumes are those whose files belong to the pod, by name: not directories of the host or of claims.
	Volumes map[string]Tree
}

// ContainerDisk is what all attempts of one container have on disk.
type ContainerDisk struct {
	Writable Tree // what they wrote to their root file systems
	Logs     Tree
}

// Sum adds up all of it.
func (d PodDisk) Sum() Tree {
	var t Tree
	for _, c := range d.Containers {
		t.Bytes += c.Writable.Bytes + c.Logs.Bytes
		t.Inodes += c.Writable.Inodes + c.Logs.Inodes
	}
	for _, v := range d.Volumes {
		t.Bytes += v.Bytes
		t.Inodes += v.Inodes
	}
	return t
}
