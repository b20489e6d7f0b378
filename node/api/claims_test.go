// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/csi"
)

// Claims show with the file system that they are on, once they are mounted, and each claim once.
func TestClaims(t *testing.T) {
	const claim = "claim"
	registry := prometheus.NewRegistry()
	s := newServer(t, func(c *Config) {
		c.DataDir, c.Metrics = t.TempDir(), registry
		c.VolumeUsage = func(_ context.Context, pod types.UID, volume string) (*csi.Usage, error) {
			switch volume {
			case "b": // its driver tells of bytes, not of inodes
				return &csi.Usage{Bytes: csi.Amount{Total: 70, Used: 30, Available: 40}}, nil
			case "a":
				return nil, errors.New("out of honey") // its file system is asked
			}
			t.Errorf("asked of %s of pod %s", volume, pod)
			return nil, nil
		}
	})
	p := s.node.pod
	source := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}
	p.Spec.Volumes = []corev1.Volume{{Name: "a", VolumeSource: source}, {Name: "b", VolumeSource: source}, {Name: "none", VolumeSource: source}}
	for _, name := range []string{"a", "b"} {
		dir := filepath.Join(s.server.cfg.DataDir, "pods", string(p.UID), "volumes", "kubernetes.io~local-volume", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,nr_inodes=100"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
	}
	list := s.server.claimStats(t.Context(), p, metav1.Now())
	if len(list) != 2 || list[0].PVCRef.Name != claim || list[0].PVCRef.Namespace != p.Namespace || *list[0].CapacityBytes != 1<<20 || *list[1].InodesUsed != 1 || *list[1].CapacityBytes != 70 || *list[1].UsedBytes != 30 || *list[1].AvailableBytes != 40 {
		t.Errorf("%+v", list)
	}
	want := `# HELP kubelet_volume_stats_capacity_bytes Capacity in bytes of the volume.
# TYPE kubelet_volume_stats_capacity_bytes gauge
kubelet_volume_stats_capacity_bytes{namespace="` + p.Namespace + `",persistentvolumeclaim="claim"} 1.048576e+06
# HELP kubelet_volume_stats_inodes Maximum number of inodes in the volume.
# TYPE kubelet_volume_stats_inodes gauge
kubelet_volume_stats_inodes{namespace="` + p.Namespace + `",persistentvolumeclaim="claim"} 100
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "kubelet_volume_stats_capacity_bytes", "kubelet_volume_stats_inodes"); err != nil {
		t.Error(err)
	}
}
