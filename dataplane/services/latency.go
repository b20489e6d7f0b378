// SPDX-License-Identifier: Apache-2.0

package services

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// latency measures how long a change of pods takes until the kernel knows it. The controller of
// EndpointSlices writes down when the change was that made it write (KEP-752, as kube-proxy's
// network_programming_duration_seconds). It is used by one goroutine.
type latency struct {
	histogram prometheus.Histogram
	began     time.Time            // changes before it were not this process's to program
	seen      map[string]time.Time // the newest change of each Service that was observed
}

func newLatency(now time.Time) *latency {
	return &latency{
		began: now, seen: map[string]time.Time{},
		histogram: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "skep_dataplane_service_programming_seconds",
			Help:    "Time from a change of a Service's pods to the kernel's knowing it.",
			Buckets: prometheus.ExponentialBuckets(1e-3, 2, 14),
		}),
	}
}

// programmed observes a change once: that the kernel has these slices now. Without any, the Service is forgotten.
func (l *latency) programmed(service string, eps []*discoveryv1.EndpointSlice, now time.Time) {
	var newest time.Time
	for _, s := range eps {
		at, err := time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
		if err == nil && at.After(newest) {
			newest = at
		}
	}
	if len(eps) == 0 {
		delete(l.seen, service)
		return
	}
	if !newest.After(l.began) || !newest.After(l.seen[service]) {
		return
	}
	l.seen[service] = newest
	l.histogram.Observe(max(0, now.Sub(newest).Seconds())) // clocks of two machines may differ
}
