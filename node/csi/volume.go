// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
)

// callLimit bounds what a driver is asked to do with a volume (kubelet: csiTimeout).
const callLimit = 2 * time.Minute

// usageLimit bounds how long a driver may think about how full a volume is: whoever asks for statistics waits for it.
const usageLimit = 10 * time.Second

// Volume is a volume of a driver, as a pod mounts it.
type Volume struct {
	Driver, Handle string
	ReadOnly       bool
	FSType         string
	AccessMode     corev1.PersistentVolumeAccessMode
	MountOptions   []string
	Attributes     map[string]string // for both steps
	PublishContext map[string]string // attributes of one publication: whose pod it is
	StageSecrets   map[string]string
	PublishSecrets map[string]string
	FSGroup        *int64 // for drivers that set it themselves; nil for none
	Inline         bool   // it is one pod's and lives with it: there is no step for the node
	Again          bool   // it is published already, and the driver wants to be asked again: the step for the node is done
}

// Capabilities are what a driver does beside mounting.
type Capabilities struct {
	Stages     bool // it has a step for the node, before that for each pod
	MountGroup bool // it gives files to a pod's fsGroup itself
	Usage      bool // it tells how full a volume is
}

// Staging is where a volume is staged for all pods of the node, below the directory of plugins (as kubelet has it).
func Staging(plugins, driver, handle string) string {
	return filepath.Join(plugins, "kubernetes.io", "csi", driver, fmt.Sprintf("%x", sha256.Sum256([]byte(handle))), "globalmount")
}

// call connects to a driver and asks it something.
func (d *Drivers) call(ctx context.Context, name string, ask func(ctx context.Context, c spec.NodeClient) error) error {
	f, err := d.find(name)
	if err != nil {
		return err
	}
	conn, err := dial(f.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return ask(ctx, spec.NewNodeClient(conn))
}

func capabilities(ctx context.Context, c spec.NodeClient) (Capabilities, error) {
	answer, err := c.NodeGetCapabilities(ctx, &spec.NodeGetCapabilitiesRequest{})
	if err != nil {
		return Capabilities{}, fmt.Errorf("NodeGetCapabilities: %w", err)
	}
	has := func(want spec.NodeServiceCapability_RPC_Type) bool {
		return slices.ContainsFunc(answer.Capabilities, func(c *spec.NodeServiceCapability) bool { return c.GetRpc().GetType() == want })
	}
	return Capabilities{
		Stages: has(spec.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME), MountGroup: has(spec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP),
		Usage: has(spec.NodeServiceCapability_RPC_GET_VOLUME_STATS),
	}, nil
}

// Publish has a driver mount a volume at target, after it was staged where that is a step of its own. Both may be asked
// for again.
func (d *Drivers) Publish(ctx context.Context, v Volume, staging, target string) (Capabilities, error) {
	var can Capabilities
	err := d.call(ctx, v.Driver, func(ctx context.Context, c spec.NodeClient) (err error) {
		if can, err = capabilities(ctx, c); err != nil {
			return err
		}
		capability := v.capability(can)
		if v.Inline || !can.Stages {
			staging = ""
		} else if !v.Again {
			if err := os.MkdirAll(staging, 0o750); err != nil {
				return err
			}
			if _, err := c.NodeStageVolume(ctx, &spec.NodeStageVolumeRequest{
				VolumeId: v.Handle, StagingTargetPath: staging, VolumeCapability: capability, Secrets: v.StageSecrets, VolumeContext: v.Attributes,
			}); err != nil {
				return fmt.Errorf("NodeStageVolume: %w", err)
			}
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
			return err
		}
		attributes := map[string]string{}
		maps.Copy(attributes, v.Attributes)
		maps.Copy(attributes, v.PublishContext)
		if _, err := c.NodePublishVolume(ctx, &spec.NodePublishVolumeRequest{
			VolumeId: v.Handle, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability, Readonly: v.ReadOnly,
			Secrets: v.PublishSecrets, VolumeContext: attributes,
		}); err != nil {
			return fmt.Errorf("NodePublishVolume: %w", err)
		}
		return nil
	})
	if err != nil {
		return can, fmt.Errorf("driver %s, volume %s: %w", v.Driver, v.Handle, err)
	}
	return can, nil
}

// capability says how the volume is used.
func (v Volume) capability(can Capabilities) *spec.VolumeCapability {
	mount := &spec.VolumeCapability_MountVolume{FsType: v.FSType, MountFlags: v.MountOptions}
	if can.MountGroup && v.FSGroup != nil {
		mount.VolumeMountGroup = strconv.FormatInt(*v.FSGroup, 10)
	}
	mode := spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	switch v.AccessMode {
	case corev1.ReadOnlyMany:
		mode = spec.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	case corev1.ReadWriteMany:
		mode = spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	}
	return &spec.VolumeCapability{
		AccessType: &spec.VolumeCapability_Mount{Mount: mount}, AccessMode: &spec.VolumeCapability_AccessMode{Mode: mode},
	}
}

// Amount is what a volume has of something, and how much of that is used and left.
type Amount struct{ Total, Used, Available uint64 }

// Usage of a volume. An amount whose Total is 0 is not known.
type Usage struct{ Bytes, Inodes Amount }

// Usage asks a driver how full a volume is; nil if it does not tell.
func (d *Drivers) Usage(ctx context.Context, driver, handle, staging, target string) (*Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, usageLimit)
	defer cancel()
	var usage *Usage
	err := d.call(ctx, driver, func(ctx context.Context, c spec.NodeClient) error {
		can, err := capabilities(ctx, c)
		if err != nil || !can.Usage {
			return err
		}
		if !can.Stages {
			staging = ""
		}
		answer, err := c.NodeGetVolumeStats(ctx, &spec.NodeGetVolumeStatsRequest{VolumeId: handle, VolumePath: target, StagingTargetPath: staging})
		if err != nil {
			return fmt.Errorf("NodeGetVolumeStats: %w", err)
		}
		usage = &Usage{}
		for _, u := range answer.Usage {
			amount := Amount{Total: uint64(max(u.Total, 0)), Used: uint64(max(u.Used, 0)), Available: uint64(max(u.Available, 0))}
			switch u.Unit {
			case spec.VolumeUsage_BYTES:
				usage.Bytes = amount
			case spec.VolumeUsage_INODES:
				usage.Inodes = amount
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("driver %s, volume %s: %w", driver, handle, err)
	}
	return usage, nil
}

// Unpublish undoes Publish for one target. What is not there is no error.
func (d *Drivers) Unpublish(ctx context.Context, driver, handle, target string) error {
	err := d.call(ctx, driver, func(ctx context.Context, c spec.NodeClient) error {
		_, err := c.NodeUnpublishVolume(ctx, &spec.NodeUnpublishVolumeRequest{VolumeId: handle, TargetPath: target})
		if status.Code(err) == codes.NotFound {
			err = nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("driver %s, volume %s: NodeUnpublishVolume: %w", driver, handle, err)
	}
	// The driver should have removed it; one that is mounted still is not removed.
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("driver %s, volume %s: %w", driver, handle, err)
	}
	return nil
}

// Unstage undoes the step for the node, once no pod uses the volume.
func (d *Drivers) Unstage(ctx context.Context, driver, handle, staging string) error {
	if _, err := os.Lstat(staging); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := d.call(ctx, driver, func(ctx context.Context, c spec.NodeClient) error {
		_, err := c.NodeUnstageVolume(ctx, &spec.NodeUnstageVolumeRequest{VolumeId: handle, StagingTargetPath: staging})
		if status.Code(err) == codes.NotFound {
			err = nil
		}
		return err
	})
	if err == nil {
		err = os.Remove(staging)
	}
	if err == nil {
		err = os.Remove(filepath.Dir(staging))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("driver %s, volume %s: NodeUnstageVolume: %w", driver, handle, err)
	}
	return nil
}
