// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/idmap"
)

// ownUsers makes the container one of a pod with user and group ids of its own. runc needs to be told the mapping of a
// namespace that it joins, and only a root of that namespace may change the settings of those that belong to it.
func ownUsers(s *specs.Spec, c ContainerSpec) error {
	for _, id := range append([]uint32{s.Process.User.UID, s.Process.User.GID}, s.Process.User.AdditionalGids...) {
		if id >= idmap.Length {
			return fmt.Errorf("%w: container %s runs with the user or group id %d, but with hostUsers: false the pod has the ids 0 to %d only", ErrStart, c.Name, id, idmap.Length-1)
		}
	}
	ids := []specs.LinuxIDMapping{{HostID: c.Sandbox.FirstID, Size: idmap.Length}}
	s.Linux.UIDMappings, s.Linux.GIDMappings, s.Linux.Sysctl = ids, slices.Clone(ids), c.Sysctls
	return nil
}

// mapSnapshot adds the labels by which the overlay snapshotter shows an image's files with the owners they have there.
func (r *Runtime) mapSnapshot(labels map[string]string, first uint32) error {
	if r.snapshotter != "overlayfs" {
		return fmt.Errorf("a pod with hostUsers: false needs the kernel's overlay file system, and this node has snapshots of kind %s: load the kernel module overlay", r.snapshotter)
	}
	ids := fmt.Sprintf("0:%d:%d", first, idmap.Length)
	labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping] = ids, ids
	return nil
}

// passable makes a directory, in which the root file systems of containers are mounted, one that the root of a pod with
// user ids of its own can pass through, who is nobody there.
func passable(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	return os.Chmod(dir, st.Mode().Perm()|0o111)
}

// rootMounts are the mounts of a root file system as its owner needs them. Of one without layers the directory belongs to
// the pod's root already (overlay.go, "chown only this bound directory"): to map that as well would make it nobody's.
func rootMounts(mounts []mount.Mount) []mount.Mount {
	out := slices.Clone(mounts)
	for i := range out {
		if out[i].Type == "bind" {
			out[i].Options = slices.DeleteFunc(slices.Clone(out[i].Options), func(o string) bool {
				return strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=")
			})
		}
	}
	return out
}

// mappedMount is a mount of a container that shows the owners of files to a user namespace. It is made just before the
// container's task, and taken away once that has it: nothing stays on the host that could be left over.
type mappedMount struct {
	source, target string
	volume         string // of the pod; empty for the node's own files
	propagation    uint64
}

// mappedName is the directory of such mounts, below the one of the runtime's state.
const mappedName = "mapped"

func (r *Runtime) mappedRoot() string { return filepath.Join(r.cfg.RunDir, mappedName) }

func (r *Runtime) mappedDir(id string) string { return filepath.Join(r.mappedRoot(), id) }

// mapMounts has a container's mounts come from below dir, where mountMapped makes them.
func mapMounts(spec ContainerSpec, dir string) (ContainerSpec, []mappedMount, error) {
	spec.Mounts, spec.lockedFlags = slices.Clone(spec.Mounts), make([][]string, len(spec.Mounts))
	var mapped []mappedMount
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if m.HostPath == "" {
			continue // refused later
		}
		var st unix.Statfs_t
		if err := unix.Statfs(m.HostPath, &st); err != nil {
			return spec, nil, &os.PathError{Op: "statfs", Path: m.HostPath, Err: err}
		}
		spec.lockedFlags[i] = lockedFlags(st.Flags)
		if m.Image && st.Type == unix.OVERLAYFS_SUPER_MAGIC {
			continue // the kernel maps no overlay of layers: the files seem to be nobody's
		}
		to := mappedMount{source: m.HostPath, volume: m.Volume, target: filepath.Join(dir, strconv.Itoa(i)), propagation: unix.MS_PRIVATE}
		if m.Propagation == corev1.MountPropagationHostToContainer || m.Propagation == corev1.MountPropagationBidirectional {
			// What is mounted in a user namespace never shows on the host.
			to.propagation = unix.MS_SLAVE
		}
		m.HostPath = to.target
		mapped = append(mapped, to)
	}
	return spec, mapped, nil
}

// lockedFlags are the options of a mount, by its flags from statfs(2), which a user namespace has to keep
// (mount_namespaces(7)). runc does not look for them itself.
func lockedFlags(flags int64) []string {
	var locked []string
	for _, f := range []struct {
		bit  int64
		name string
	}{{unix.ST_RDONLY, "ro"}, {unix.ST_NOSUID, "nosuid"}, {unix.ST_NODEV, "nodev"}, {unix.ST_NOEXEC, "noexec"}} {
		if flags&f.bit != 0 {
			locked = append(locked, f.name)
		}
	}
	return locked
}

// mountMapped makes the mounts of mapMounts in dir.
func mountMapped(dir, userNS string, mounts []mappedMount) error {
	if len(mounts) == 0 {
		return nil
	}
	namespace, err := os.Open(userNS)
	if err != nil {
		return err
	}
	defer namespace.Close()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, m := range mounts {
		st, err := os.Stat(m.source)
		if err != nil {
			return err
		}
		if st.IsDir() {
			err = os.Mkdir(m.target, 0o700)
		} else {
			err = os.WriteFile(m.target, nil, 0o600)
		}
		if err != nil {
			return err
		}
		if err := idmap.Mount(m.source, m.target, namespace, m.propagation); err != nil {
			if m.volume != "" {
				err = fmt.Errorf("volume %q: %w", m.volume, err)
			}
			return err
		}
	}
	return nil
}

// removeMapped takes away what mountMapped has made for one container.
func removeMapped(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		// What is mounted below goes with it: not even root could pass through to that, being nobody there.
		at := filepath.Join(dir, e.Name())
		if err := unmounted(at); err != nil {
			return fmt.Errorf("unmount %s: %w", at, err)
		}
		if err := os.Remove(at); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

// removeAllMapped is removeMapped for all containers, below root.
func removeAllMapped(root string) error {
	entries, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := removeMapped(filepath.Join(root, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(root)
}
