// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

// summary answers with what the node and its pods use now. With only_cpu_and_memory that is read from cgroups alone; else
// trees of files are walked, too.
func (s *Server) summary(w http.ResponseWriter, r *http.Request) {
	now := metav1.Now()
	out := stats.Summary{Node: stats.NodeStats{NodeName: s.cfg.NodeName, StartTime: metav1.NewTime(bootTime())}, Pods: []stats.PodStats{}}
	if used, err := cgroup.Read("/"); err == nil {
		out.Node.CPU, out.Node.Memory = cpuStats(used, now), memoryStats(used, now)
	}
	if m := nodeMemory(now); m != nil {
		out.Node.Memory = m
	}
	all := r.URL.Query().Get("only_cpu_and_memory") != "true"
	var disk *stats.FsStats
	if all {
		s.measures.Lock()
		defer s.measures.Unlock()
		out.Node.Network, out.Node.Rlimit = networkStats("/proc/thread-self/net/dev", defaultLink(), now), limitStats(now)
		if disk = fileSystem(s.cfg.DataDir, now); disk != nil {
			out.Node.Fs, out.Node.Runtime = disk, &stats.RuntimeStats{ImageFs: disk, ContainerFs: disk} // one file system has them all
		}
	}
	for _, p := range s.cfg.Pods.Pods() {
		ps := stats.PodStats{PodRef: stats.PodReference{Name: p.Name, Namespace: p.Namespace, UID: string(p.UID)}, Containers: []stats.ContainerStats{}}
		if p.Status.StartTime != nil {
			ps.StartTime = *p.Status.StartTime
		}
		parent, first := "", uint32(0)
		for _, c := range s.runningContainers(r.Context(), p) {
			first = cmp.Or(first, c.PID)
			used, err := cgroup.Read(c.Cgroup)
			if err != nil {
				continue
			}
			parent = path.Dir(c.Cgroup)
			ps.Containers = append(ps.Containers, stats.ContainerStats{
				Name: c.Name, StartTime: metav1.NewTime(c.StartedAt), CPU: cpuStats(used, now), Memory: memoryStats(used, now),
			})
		}
		if parent != "" {
			if used, err := cgroup.Read(parent); err == nil {
				ps.CPU, ps.Memory = cpuStats(used, now), memoryStats(used, now)
				ps.ProcessStats = &stats.ProcessStats{ProcessCount: &used.Pids}
			}
		}
		if all && first != 0 && !p.Spec.HostNetwork {
			ps.Network = networkStats(fmt.Sprintf("/proc/%d/net/dev", first), podLink, now)
		}
		if all {
			s.addDisk(r.Context(), p, &ps, disk, now)
			ps.VolumeStats = append(ps.VolumeStats, s.claimStats(r.Context(), p, now)...)
		}
		out.Pods = append(out.Pods, ps)
	}
	writeJSON(w, out)
}

func (s *Server) runningContainers(ctx context.Context, p *corev1.Pod) []runtime.Container {
	all, err := s.cfg.Containers.ListPod(ctx, p.UID)
	if err != nil {
		s.cfg.Log.Warn("containers of a pod are not listed", "namespace", p.Namespace, "pod", p.Name, "error", err)
		return nil
	}
	var running []runtime.Container
	for _, c := range all {
		if c.State == runtime.Running && c.Cgroup != "" && c.Name != runtime.PauseName {
			running = append(running, c)
		}
	}
	return running
}

func cpuStats(s cgroup.Stats, now metav1.Time) *stats.CPUStats {
	if !s.HaveProcessor {
		return nil
	}
	return &stats.CPUStats{Time: now, UsageCoreNanoSeconds: &s.CPUNanos}
}

func memoryStats(s cgroup.Stats, now metav1.Time) *stats.MemoryStats {
	if !s.HaveMemory {
		return nil
	}
	m := &stats.MemoryStats{Time: now, UsageBytes: &s.MemoryBytes, WorkingSetBytes: &s.WorkingSet, RSSBytes: &s.RSSBytes,
		PageFaults: &s.PageFaults, MajorPageFaults: &s.MajorFaults}
	if s.MemoryLimit > s.WorkingSet {
		free := s.MemoryLimit - s.WorkingSet
		m.AvailableBytes = &free
	}
	return m
}

// nodeMemory reads /proc/meminfo, since a node's root cgroup does not count in version 2.
func nodeMemory(now metav1.Time) *stats.MemoryStats {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	values := map[string]uint64{}
	for scan := bufio.NewScanner(f); scan.Scan(); {
		fields := strings.Fields(scan.Text())
		if len(fields) < 2 {
			continue
		}
		if kb, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
			values[strings.TrimSuffix(fields[0], ":")] = kb << 10
		}
	}
	total, available := values["MemTotal"], values["MemAvailable"]
	if total == 0 || available > total {
		return nil
	}
	used, rss := total-available, values["AnonPages"]
	usage := total - values["MemFree"]
	return &stats.MemoryStats{Time: now, AvailableBytes: &available, UsageBytes: &usage, WorkingSetBytes: &used, RSSBytes: &rss}
}

// bootTime is when the machine started, from /proc/stat.
func bootTime() time.Time {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "btime "); ok {
			if sec, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64); err == nil {
				return time.Unix(sec, 0)
			}
		}
	}
	return time.Time{}
}

// resourceMetrics is what metrics-server scrapes.
func (s *Server) resourceMetrics(w http.ResponseWriter, r *http.Request) {
	registry := prometheus.NewRegistry()
	if err := registry.Register(resourceCollector{s, r.Context()}); err != nil {
		writeError(w, err)
		return
	}
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, r)
}

type resourceCollector struct {
	s   *Server
	ctx context.Context
}

// Describe says nothing: which series exist depends on the pods.
func (resourceCollector) Describe(chan<- *prometheus.Desc) {}

func (c resourceCollector) Collect(out chan<- prometheus.Metric) {
	send := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var keys, values []string
		for i := 0; i+1 < len(labels); i += 2 {
			keys, values = append(keys, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, keys, nil), kind, value, values...)
	}
	if used, err := cgroup.Read("/"); err == nil && used.HaveProcessor {
		send(prometheus.CounterValue, "node_cpu_usage_seconds_total", "CPU time of the node.", float64(used.CPUNanos)/1e9)
	}
	if m := nodeMemory(metav1.Now()); m != nil {
		send(prometheus.GaugeValue, "node_memory_working_set_bytes", "Working set of the node.", float64(*m.WorkingSetBytes))
	}
	for _, p := range c.s.cfg.Pods.Pods() {
		parent := ""
		for _, k := range c.s.runningContainers(c.ctx, p) {
			used, err := cgroup.Read(k.Cgroup)
			if err != nil {
				continue
			}
			parent = path.Dir(k.Cgroup)
			labels := []string{"container", k.Name, "namespace", p.Namespace, "pod", p.Name}
			send(prometheus.CounterValue, "container_cpu_usage_seconds_total", "CPU time of the container.", float64(used.CPUNanos)/1e9, labels...)
			send(prometheus.GaugeValue, "container_memory_working_set_bytes", "Working set of the container.", float64(used.WorkingSet), labels...)
			send(prometheus.GaugeValue, "container_start_time_seconds", "Start of the container since the epoch.", float64(k.StartedAt.UnixNano())/1e9, labels...)
		}
		if parent == "" {
			continue
		}
		if used, err := cgroup.Read(parent); err == nil {
			labels := []string{"namespace", p.Namespace, "pod", p.Name}
			send(prometheus.CounterValue, "pod_cpu_usage_seconds_total", "CPU time of the pod.", float64(used.CPUNanos)/1e9, labels...)
			send(prometheus.GaugeValue, "pod_memory_working_set_bytes", "Working set of the pod.", float64(used.WorkingSet), labels...)
		}
	}
	send(prometheus.GaugeValue, "resource_scrape_error", "1 if something could not be read.", 0)
}
