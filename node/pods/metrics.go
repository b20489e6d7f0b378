// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of the pods of this node.
type metrics struct {
	actions *prometheus.HistogramVec // by action: seconds
	failed  *prometheus.CounterVec   // by action
	started prometheus.Histogram     // seconds from the time this node saw a pod until all of its containers ran
	pods    prometheus.GaugeFunc
}

func newMetrics(r prometheus.Registerer, count func() float64) (*metrics, error) {
	buckets := prometheus.ExponentialBuckets(0.005, 2, 14) // 5 ms to 41 s
	m := &metrics{
		actions: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "skep_node_pod_action_seconds", Help: "Time that actions on pods took, by action.", Buckets: buckets}, []string{"action"}),
		failed:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "skep_node_pod_action_failures_total", Help: "Actions on pods that failed and are tried again, by action."}, []string{"action"}),
		started: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "skep_node_pod_start_seconds", Help: "Time from when the node saw a pod until its containers ran.", Buckets: buckets}),
		pods:    prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "skep_node_pods", Help: "Pods that this node works on."}, count),
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.actions, m.failed, m.started, m.pods} {
		errs = append(errs, r.Register(c))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("metrics of pods: %w", err)
	}
	return m, nil
}

func (m *metrics) acted(k Kind, took time.Duration) {
	m.actions.WithLabelValues(string(k)).Observe(took.Seconds())
}
