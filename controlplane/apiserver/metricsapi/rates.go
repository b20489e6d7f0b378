// SPDX-License-Identifier: Apache-2.0

// Package metricsapi serves the API group metrics.k8s.io, version v1beta1: what nodes and pods use now, for `skep top`
// and for autoscaling. Nothing is collected while nobody asks: nodes count, and an answer is made of two readings of a
// node's counters. Whoever installs metrics-server replaces it, by replacing the APIService.
package metricsapi

import (
	"time"

	"k8s.io/apimachinery/pkg/types"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// reading is what a node's counters said at a time.
type reading struct {
	at      time.Time
	summary *stats.Summary
}

// use of processors, in billionths of one, and of memory (the working set, which is what eviction looks at), in bytes.
type use struct {
	cpu    int64
	memory int64
}

// nodeUsage is what a node and its pods used in a window that ended at a time.
type nodeUsage struct {
	at     time.Time
	window time.Duration
	node   *use // nil: the node does not say
	pods   map[types.NamespacedName]map[string]use
}

// rates compares two readings of one node.
func rates(before, after reading) nodeUsage {
	u := nodeUsage{at: after.at, window: after.at.Sub(before.at), pods: map[types.NamespacedName]map[string]use{}}
	if n := &after.summary.Node; n.CPU != nil && n.CPU.UsageCoreNanoSeconds != nil && n.Memory != nil && n.Memory.WorkingSetBytes != nil {
		var was *uint64
		if b := &before.summary.Node; b.CPU != nil {
			was = b.CPU.UsageCoreNanoSeconds
		}
		u.node = &use{cpu: rate(was, *n.CPU.UsageCoreNanoSeconds, u.window, after.at.Sub(n.StartTime.Time)), memory: int64(*n.Memory.WorkingSetBytes)}
	}
	type key struct{ uid, container string }
	old := map[key]*uint64{}
	for i := range before.summary.Pods {
		p := &before.summary.Pods[i]
		for j := range p.Containers {
			if c := &p.Containers[j]; c.CPU != nil {
				old[key{p.PodRef.UID, c.Name}] = c.CPU.UsageCoreNanoSeconds
			}
		}
	}
	for i := range after.summary.Pods {
		p := &after.summary.Pods[i]
		containers := map[string]use{}
		for j := range p.Containers {
			c := &p.Containers[j]
			if c.CPU == nil || c.CPU.UsageCoreNanoSeconds == nil || c.Memory == nil || c.Memory.WorkingSetBytes == nil {
				continue
			}
			cpu := rate(old[key{p.PodRef.UID, c.Name}], *c.CPU.UsageCoreNanoSeconds, u.window, after.at.Sub(c.StartTime.Time))
			containers[c.Name] = use{cpu: cpu, memory: int64(*c.Memory.WorkingSetBytes)}
		}
		if len(containers) > 0 {
			u.pods[types.NamespacedName{Namespace: p.PodRef.Namespace, Name: p.PodRef.Name}] = containers
		}
	}
	return u
}

// leastAge is what something that has just begun is taken to have lived: start times come in whole seconds.
const leastAge = time.Second

// rate is nanoseconds of processor time a second. What was not there before, or has begun anew since (its counter went
// back), is averaged over its life.
func rate(before *uint64, now uint64, window, age time.Duration) int64 {
	if before == nil || now < *before || window <= 0 {
		return int64(float64(now) / max(age, leastAge).Seconds())
	}
	return int64(float64(now-*before) / window.Seconds())
}
