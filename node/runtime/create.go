// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"strconv"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skep.io/skep/node/steps"
)

// rootLabel keeps containerd's garbage collector off a snapshot, as a lease would, without the two
// transactions of one.
const rootLabel = "containerd.io/gc.root"

// Create prepares a container: its root file system and its definition. No process is made.
func (r *Runtime) Create(ctx context.Context, spec ContainerSpec) (string, error) {
	ctx = r.in(ctx)
	image, users := r.pauseImage(), userDB{}
	if spec.Name == PauseName {
		spec.Mounts = append(spec.Mounts, Mount{HostPath: r.cfg.ShimPath, ContainerPath: pausePath, ReadOnly: true})
	} else {
		var err error
		if image, err = r.images.find(spec.ImageID); err != nil {
			return "", err
		}
		if users, err = r.users(ctx, image); err != nil {
			return "", fmt.Errorf("users of image %s: %w", spec.Image, err)
		}
	}
	random := make([]byte, 32)
	if _, err := rand.Read(random); err != nil {
		return "", err
	}
	id := hex.EncodeToString(random)
	var mapped []mappedMount
	if spec.Sandbox != nil && spec.Sandbox.UserNS != "" {
		var err error
		if spec, mapped, err = mapMounts(spec, r.mappedDir(id)); err != nil {
			return "", err
		}
	}
	s, err := buildSpec(specInput{
		id: id, spec: spec, image: image.config, users: users, host: r.host, seccom: r.seccompProfile, device: hostDevices, lookup: hostDevice,
	})
	if err != nil {
		return "", err
	}
	def := definition{
		PodUID: spec.PodUID, PodNamespace: spec.PodNamespace, PodName: spec.PodName, Name: spec.Name, Attempt: spec.Attempt,
		Image: spec.Image, ImageID: image.public().Digest, CreatedAt: time.Now(), LogPath: spec.LogPath, Annotations: maps.Clone(spec.Annotations),
		TTY: spec.TTY, Stdin: spec.Stdin, StdinOnce: spec.StdinOnce, StopSignal: image.config.StopSignal,
		Cgroup: path.Join("/", spec.CgroupParent, id), User: userOf(s.Process.User), Resources: spec.Resources.DeepCopy(),
	}
	if spec.Sandbox != nil {
		def.NetNS, def.UserNS, def.FirstID = spec.Sandbox.NetNS, spec.Sandbox.UserNS, spec.Sandbox.FirstID
	}
	if err := r.record(ctx, id, image, s, def); err != nil {
		return "", fmt.Errorf("create container %s of pod %s/%s: %w", spec.Name, spec.PodNamespace, spec.PodName, err)
	}
	c := &container{id: id, def: def, ready: spec.Ready, mapped: mapped, done: make(chan struct{}), status: status{State: Created}}
	r.mu.Lock()
	r.containers[id] = c
	r.mu.Unlock()
	return id, nil
}

func userOf(u specs.User) *User {
	out := &User{UID: int64(u.UID), GID: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		out.Groups = append(out.Groups, int64(g))
	}
	return out
}

// record writes snapshot and container to containerd.
func (r *Runtime) record(ctx context.Context, id string, image *imageInfo, s *specs.Spec, def definition) (err error) {
	specAny, err := typeurl.MarshalAny(s)
	if err != nil {
		return err
	}
	runtimeOptions, err := typeurl.MarshalAny(&options.Options{BinaryName: r.cfg.RuncPath, Root: r.runcRoot(), IoUid: def.FirstID, IoGid: def.FirstID})
	if err != nil {
		return err
	}
	extension, err := def.encode()
	if err != nil {
		return err
	}
	sn := r.client.SnapshotService(r.snapshotter)
	labels := map[string]string{rootLabel: def.CreatedAt.UTC().Format(time.RFC3339)}
	if def.UserNS != "" {
		if err := r.mapSnapshot(labels, def.FirstID); err != nil {
			return err
		}
	}
	label := snapshots.WithLabels(labels)
	if _, err := sn.Prepare(ctx, id, image.chainID, label); err != nil {
		if !errdefs.IsNotFound(err) {
			return fmt.Errorf("root file system: %w", err)
		}
		// The image's layers were not unpacked, or were collected.
		if err := r.unpack(ctx, image); err != nil {
			return fmt.Errorf("unpack image: %w", err)
		}
		if _, err := sn.Prepare(ctx, id, image.chainID, label); err != nil {
			return fmt.Errorf("root file system: %w", err)
		}
	}
	steps.Passed(ctx, "container: root file system prepared")
	defer func() {
		if err != nil {
			_ = sn.Remove(context.WithoutCancel(ctx), id)
		}
	}()
	_, err = r.client.ContainerService().Create(ctx, containers.Container{
		ID:    id,
		Image: image.target.String(),
		Labels: map[string]string{
			labelPodUID: string(def.PodUID), labelNamespace: def.PodNamespace, labelPod: def.PodName,
			labelContainer: def.Name, labelAttempt: strconv.Itoa(def.Attempt),
		},
		Runtime:     containers.RuntimeInfo{Name: r.cfg.ShimPath, Options: runtimeOptions},
		Spec:        specAny,
		SnapshotKey: id,
		Snapshotter: r.snapshotter,
		Extensions:  map[string]typeurl.Any{extensionKey: extension},
	})
	return err
}

// hostDevice describes one device of the host.
func hostDevice(path string) (*specs.LinuxDevice, error) {
	d, err := oci.DeviceFromPath(path)
	if err != nil {
		return nil, err
	}
	if d.FileMode != nil {
		mode := *d.FileMode &^ unix.S_IFMT
		d.FileMode = &mode
	}
	return d, nil
}

// hostDevices are all devices of the host, for a privileged container.
func hostDevices() ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	devices, err := oci.HostDevices()
	if err != nil {
		return nil, nil, fmt.Errorf("devices of the host: %w", err)
	}
	rules := make([]specs.LinuxDeviceCgroup, 0, len(devices))
	for i := range devices {
		d := &devices[i]
		if d.FileMode != nil {
			mode := *d.FileMode &^ unix.S_IFMT
			d.FileMode = &mode
		}
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: "rwm"})
	}
	return devices, rules, nil
}
