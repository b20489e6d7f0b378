// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// csiMain is a CSI driver in the style of the host-path one: its volumes are directories of the host. It registers by a
// socket, and ends with its standard input.
func csiMain(args []string) error {
	if len(args) != 3 {
		return errors.New("csi: a name, the directory to register in and one for volumes are needed")
	}
	d := &csiDriver{name: args[0], dir: args[2]}
	socket := filepath.Join(args[1], d.name+"-reg.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	registerapi.RegisterRegistrationServer(s, d)
	spec.RegisterNodeServer(s, d)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		s.Stop()
	}()
	fmt.Println("listening on", socket)
	return s.Serve(l)
}

type csiDriver struct {
	registerapi.UnimplementedRegistrationServer
	spec.UnimplementedNodeServer
	name, dir string
}

func (d *csiDriver) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: d.name, SupportedVersions: []string{"1.9.0"}}, nil
}

func (d *csiDriver) NotifyRegistrationStatus(_ context.Context, s *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	fmt.Println("registered", s.PluginRegistered, s.Error)
	return &registerapi.RegistrationStatusResponse{}, nil
}

func (d *csiDriver) NodeGetInfo(context.Context, *spec.NodeGetInfoRequest) (*spec.NodeGetInfoResponse, error) {
	return &spec.NodeGetInfoResponse{NodeId: "here", AccessibleTopology: &spec.Topology{Segments: map[string]string{"topology." + d.name + "/place": "here"}}}, nil
}

func (d *csiDriver) NodeGetCapabilities(context.Context, *spec.NodeGetCapabilitiesRequest) (*spec.NodeGetCapabilitiesResponse, error) {
	out := &spec.NodeGetCapabilitiesResponse{}
	for _, can := range []spec.NodeServiceCapability_RPC_Type{spec.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME, spec.NodeServiceCapability_RPC_GET_VOLUME_STATS} {
		out.Capabilities = append(out.Capabilities, &spec.NodeServiceCapability{Type: &spec.NodeServiceCapability_Rpc{Rpc: &spec.NodeServiceCapability_RPC{Type: can}}})
	}
	return out, nil
}

func (d *csiDriver) NodeStageVolume(_ context.Context, r *spec.NodeStageVolumeRequest) (*spec.NodeStageVolumeResponse, error) {
	if strings.ContainsAny(r.VolumeId, "/.") {
		return nil, status.Errorf(codes.InvalidArgument, "%q is no volume", r.VolumeId)
	}
	volume := filepath.Join(d.dir, r.VolumeId)
	if err := os.MkdirAll(volume, 0o777); err != nil {
		return nil, err
	}
	return &spec.NodeStageVolumeResponse{}, bindOnce(volume, r.StagingTargetPath, false)
}

func (d *csiDriver) NodeUnstageVolume(_ context.Context, r *spec.NodeUnstageVolumeRequest) (*spec.NodeUnstageVolumeResponse, error) {
	return &spec.NodeUnstageVolumeResponse{}, unbind(r.StagingTargetPath)
}

func (d *csiDriver) NodePublishVolume(_ context.Context, r *spec.NodePublishVolumeRequest) (*spec.NodePublishVolumeResponse, error) {
	if err := os.MkdirAll(r.TargetPath, 0o750); err != nil {
		return nil, err
	}
	from := r.StagingTargetPath
	if from == "" { // a volume of one pod, which says how it was asked for
		if strings.ContainsAny(r.VolumeId, "/.") {
			return nil, status.Errorf(codes.InvalidArgument, "%q is no volume", r.VolumeId)
		}
		from = filepath.Join(d.dir, r.VolumeId)
		if err := os.MkdirAll(from, 0o777); err != nil {
			return nil, err
		}
		says := fmt.Sprintf("%s for %s, ephemeral %s\n", r.VolumeContext["what"], r.VolumeContext["csi.storage.k8s.io/pod.name"], r.VolumeContext["csi.storage.k8s.io/ephemeral"])
		if err := os.WriteFile(filepath.Join(from, "says"), []byte(says), 0o644); err != nil {
			return nil, err
		}
	}
	return &spec.NodePublishVolumeResponse{}, bindOnce(from, r.TargetPath, r.Readonly)
}

func (d *csiDriver) NodeUnpublishVolume(_ context.Context, r *spec.NodeUnpublishVolumeRequest) (*spec.NodeUnpublishVolumeResponse, error) {
	if err := unbind(r.TargetPath); err != nil {
		return nil, err
	}
	if err := os.Remove(r.TargetPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return &spec.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats tells of one that no file system has.
func (d *csiDriver) NodeGetVolumeStats(context.Context, *spec.NodeGetVolumeStatsRequest) (*spec.NodeGetVolumeStatsResponse, error) {
	return &spec.NodeGetVolumeStatsResponse{Usage: []*spec.VolumeUsage{{Unit: spec.VolumeUsage_BYTES, Total: 424242, Used: 42, Available: 424200}}}, nil
}

// bindOnce shows from at to, unless it does already: whoever asks may ask again.
func bindOnce(from, to string, readOnly bool) error {
	var a, b unix.Stat_t
	if err := errors.Join(unix.Stat(from, &a), unix.Stat(to, &b)); err != nil {
		return err
	}
	if a.Ino == b.Ino && a.Dev == b.Dev {
		return nil
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil || !readOnly {
		return err
	}
	return unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

func unbind(path string) error {
	if err := unix.Unmount(path, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
