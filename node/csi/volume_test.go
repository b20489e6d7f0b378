// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
)

// mounter is a driver that notes what it is asked.
type mounter struct {
	*plugin
	stages, groups bool
	usage          []*spec.VolumeUsage
	asked          []string
	fail           string // of what it is asked
}

func (m *mounter) note(parts ...string) error {
	line := strings.Join(parts, " ")
	m.asked = append(m.asked, line)
	if m.fail != "" && strings.HasPrefix(line, m.fail) {
		return status.Error(codes.Internal, "out of honey")
	}
	return nil
}

func (m *mounter) NodeGetCapabilities(context.Context, *spec.NodeGetCapabilitiesRequest) (*spec.NodeGetCapabilitiesResponse, error) {
	out := &spec.NodeGetCapabilitiesResponse{}
	for t, has := range map[spec.NodeServiceCapability_RPC_Type]bool{
		spec.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME: m.stages, spec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP: m.groups,
		spec.NodeServiceCapability_RPC_GET_VOLUME_STATS: m.usage != nil,
	} {
		if has {
			out.Capabilities = append(out.Capabilities, &spec.NodeServiceCapability{Type: &spec.NodeServiceCapability_Rpc{Rpc: &spec.NodeServiceCapability_RPC{Type: t}}})
		}
	}
	return out, nil
}

func (m *mounter) NodeStageVolume(_ context.Context, r *spec.NodeStageVolumeRequest) (*spec.NodeStageVolumeResponse, error) {
	return &spec.NodeStageVolumeResponse{}, m.note("stage", r.VolumeId, filepath.Base(r.StagingTargetPath), r.VolumeContext["size"], r.Secrets["word"])
}

func (m *mounter) NodeUnstageVolume(_ context.Context, r *spec.NodeUnstageVolumeRequest) (*spec.NodeUnstageVolumeResponse, error) {
	return &spec.NodeUnstageVolumeResponse{}, m.note("unstage", r.VolumeId, filepath.Base(r.StagingTargetPath))
}

func (m *mounter) NodePublishVolume(_ context.Context, r *spec.NodePublishVolumeRequest) (*spec.NodePublishVolumeResponse, error) {
	mount := r.VolumeCapability.GetMount()
	err := m.note("publish", r.VolumeId, filepath.Base(r.StagingTargetPath), filepath.Base(r.TargetPath), r.VolumeContext["size"], r.VolumeContext["pod"],
		mount.FsType, strings.Join(mount.MountFlags, ","), mount.VolumeMountGroup, r.VolumeCapability.AccessMode.Mode.String())
	if err == nil {
		err = os.MkdirAll(r.TargetPath, 0o755)
	}
	return &spec.NodePublishVolumeResponse{}, err
}

func (m *mounter) NodeUnpublishVolume(_ context.Context, r *spec.NodeUnpublishVolumeRequest) (*spec.NodeUnpublishVolumeResponse, error) {
	return &spec.NodeUnpublishVolumeResponse{}, m.note("unpublish", r.VolumeId, filepath.Base(r.TargetPath))
}

func (m *mounter) NodeGetVolumeStats(_ context.Context, r *spec.NodeGetVolumeStatsRequest) (*spec.NodeGetVolumeStatsResponse, error) {
	return &spec.NodeGetVolumeStatsResponse{Usage: m.usage}, m.note("usage", r.VolumeId, r.StagingTargetPath, r.VolumePath)
}

func TestPublish(t *testing.T) {
	for name, c := range map[string]struct {
		stages, groups bool
		change         func(*Volume)
		want           []string
	}{
		"at once": {false, false, nil, []string{"publish h . mount 1 p ext4 noatime,ro  SINGLE_NODE_WRITER", "unpublish h mount"}},
		"in two steps": {true, false, nil, []string{"stage h globalmount 1 sesame", "publish h globalmount mount 1 p ext4 noatime,ro  SINGLE_NODE_WRITER",
			"unpublish h mount", "unstage h globalmount"}},
		"with a group": {false, true, nil, []string{"publish h . mount 1 p ext4 noatime,ro 2000 SINGLE_NODE_WRITER", "unpublish h mount"}},
		"of one pod":   {true, false, func(v *Volume) { v.Inline = true }, []string{"publish h . mount 1 p ext4 noatime,ro  SINGLE_NODE_WRITER", "unpublish h mount"}},
		"again":        {true, false, func(v *Volume) { v.Again = true }, []string{"publish h globalmount mount 1 p ext4 noatime,ro  SINGLE_NODE_WRITER", "unpublish h mount"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := &mounter{plugin: newPlugin("m", "id"), stages: c.stages, groups: c.groups}
			b := newBench(t)
			defer m.serveAs(t, m, filepath.Join(b.dir, "m.sock"))()
			b.until("it is registered", func() bool { _, err := b.find("m"); return err == nil })
			group := int64(2000)
			v := Volume{Driver: "m", Handle: "h", FSType: "ext4", MountOptions: []string{"noatime", "ro"}, AccessMode: corev1.ReadWriteOnce, Attributes: map[string]string{"size": "1"},
				PublishContext: map[string]string{"pod": "p"}, StageSecrets: map[string]string{"word": "sesame"}, FSGroup: &group}
			if c.change != nil {
				c.change(&v)
			}
			staging, target := Staging(filepath.Join(b.dir, "plugins"), "m", "h"), filepath.Join(b.dir, "pods", "v", "mount")
			can, err := b.Publish(t.Context(), v, staging, target)
			if err != nil || can.Stages != c.stages || can.MountGroup != c.groups {
				t.Errorf("%+v, %v", can, err)
			}
			if err := b.Unpublish(t.Context(), "m", "h", target); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := b.Unstage(t.Context(), "m", "h", staging); err != nil {
					t.Error(err)
				}
			}
			if !slices.Equal(m.asked, c.want) {
				t.Errorf("asked %q", m.asked)
			}
			for _, path := range []string{staging, filepath.Dir(staging), target} {
				if _, err := os.Lstat(path); !os.IsNotExist(err) {
					t.Errorf("%s: %v", path, err)
				}
			}
		})
	}
}

func TestUsage(t *testing.T) {
	m := &mounter{plugin: newPlugin("m", "id")}
	b := newBench(t)
	defer m.serveAs(t, m, filepath.Join(b.dir, "m.sock"))()
	b.until("it is registered", func() bool { _, err := b.find("m"); return err == nil })
	if u, err := b.Usage(t.Context(), "m", "h", "/s", "/v"); u != nil || err != nil || len(m.asked) > 0 {
		t.Errorf("a driver that does not tell: %+v, %v, asked %q", u, err, m.asked)
	}
	m.usage = []*spec.VolumeUsage{{Unit: spec.VolumeUsage_BYTES, Total: 100, Used: 70, Available: 20}, {Unit: spec.VolumeUsage_INODES, Total: 9, Used: 4, Available: 5}, {Unit: spec.VolumeUsage_UNKNOWN, Total: 1}}
	u, err := b.Usage(t.Context(), "m", "h", "/s", "/v")
	if err != nil || *u != (Usage{Bytes: Amount{100, 70, 20}, Inodes: Amount{9, 4, 5}}) || !slices.Equal(m.asked, []string{"usage h  /v"}) {
		t.Errorf("%+v, %v, asked %q", u, err, m.asked)
	}
	m.fail = "usage"
	if u, err := b.Usage(t.Context(), "m", "h", "/s", "/v"); u != nil || err == nil || !strings.Contains(err.Error(), "driver m, volume h: NodeGetVolumeStats: ") {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestPublishFails(t *testing.T) {
	m := &mounter{plugin: newPlugin("m", "id"), stages: true, fail: "stage"}
	b := newBench(t)
	v := Volume{Driver: "m", Handle: "h"}
	staging, target := Staging(filepath.Join(b.dir, "plugins"), "m", "h"), filepath.Join(b.dir, "pods", "v", "mount")
	if _, err := b.Publish(t.Context(), v, staging, target); !errors.Is(err, ErrNoDriver) {
		t.Errorf("without the driver: %v", err)
	}
	defer m.serveAs(t, m, filepath.Join(b.dir, "m.sock"))()
	b.until("it is registered", func() bool { _, err := b.find("m"); return err == nil })
	if _, err := b.Publish(t.Context(), v, staging, target); err == nil || !strings.Contains(err.Error(), "driver m, volume h: NodeStageVolume: ") || !strings.Contains(err.Error(), "out of honey") {
		t.Errorf("%v", err)
	}
	if err := b.Unstage(t.Context(), "m", "h", staging); err != nil {
		t.Errorf("what was not finished is undone: %v", err)
	}
}
