// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"skep.io/skep/node/volumes"
)

// claimStats is what the file systems have that a pod's claims are on. A claim that is not mounted is left out.
func (s *Server) claimStats(ctx context.Context, p *corev1.Pod, now metav1.Time) []stats.VolumeStats {
	if s.cfg.DataDir == "" {
		return nil
	}
	var out []stats.VolumeStats
	for i := range p.Spec.Volumes {
		vol := &p.Spec.Volumes[i]
		dir, claim := volumes.Claim(filepath.Join(s.cfg.DataDir, "pods"), p, vol)
		if claim == "" {
			continue
		}
		if mounted, err := mountinfo.Mounted(dir); err != nil || !mounted {
			continue
		}
		if fs := fileSystem(dir, now); fs != nil {
			s.askDriver(ctx, p, vol.Name, fs)
			out = append(out, stats.VolumeStats{Name: vol.Name, PVCRef: &stats.PVCReference{Name: claim, Namespace: p.Namespace}, FsStats: *fs})
		}
	}
	return out
}

// askDriver lets the driver of a volume say how full it is, of which its file system may know nothing.
func (s *Server) askDriver(ctx context.Context, p *corev1.Pod, volume string, fs *stats.FsStats) {
	if s.cfg.VolumeUsage == nil {
		return
	}
	usage, err := s.cfg.VolumeUsage(ctx, p.UID, volume)
	if err != nil {
		s.cfg.Log.Warn("a volume's driver does not say how full it is: its file system is asked", "namespace", p.Namespace, "pod", p.Name, "volume", volume, "error", err)
		return
	}
	if usage == nil {
		return
	}
	if b := usage.Bytes; b.Total > 0 {
		fs.CapacityBytes, fs.UsedBytes, fs.AvailableBytes = &b.Total, &b.Used, &b.Available
	}
	if i := usage.Inodes; i.Total > 0 {
		fs.Inodes, fs.InodesUsed, fs.InodesFree = &i.Total, &i.Used, &i.Available
	}
}

// claimCollector gives the same as metrics, under kubelet's names.
type claimCollector struct{ s *Server }

// Describe says nothing: which series exist depends on the pods.
func (claimCollector) Describe(chan<- *prometheus.Desc) {}

func (c claimCollector) Collect(out chan<- prometheus.Metric) {
	seen := map[stats.PVCReference]bool{} // pods may share a claim
	for _, p := range c.s.cfg.Pods.Pods() {
		for _, v := range c.s.claimStats(context.Background(), p, metav1.Now()) {
			if seen[*v.PVCRef] {
				continue
			}
			seen[*v.PVCRef] = true
			for _, m := range []struct {
				name, help string
				value      *uint64
			}{
				{"capacity_bytes", "Capacity in bytes of the volume.", v.CapacityBytes},
				{"available_bytes", "Number of available bytes in the volume.", v.AvailableBytes},
				{"used_bytes", "Number of used bytes in the volume.", v.UsedBytes},
				{"inodes", "Maximum number of inodes in the volume.", v.Inodes},
				{"inodes_free", "Number of free inodes in the volume.", v.InodesFree},
				{"inodes_used", "Number of used inodes in the volume.", v.InodesUsed},
			} {
				desc := prometheus.NewDesc("kubelet_volume_stats_"+m.name, m.help, []string{"namespace", "persistentvolumeclaim"}, nil)
				out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(*m.value), v.PVCRef.Namespace, v.PVCRef.Name)
			}
		}
	}
}
