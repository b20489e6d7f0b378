// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the controllers' measurements. A nil *Metrics measures nothing.
type Metrics struct {
	duration *prometheus.HistogramVec
	depth    *prometheus.GaugeVec
}

// NewMetrics registers the controllers' measurements with reg, which may be nil.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "skep_controller_sync_seconds",
			Help:    "Duration of one sync of one object, by controller and outcome (ok, conflict, error).",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}, []string{"controller", "outcome"}),
		depth: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "skep_controller_queue_length",
			Help: "Objects that waited for a sync when the last one ended, by controller.",
		}, []string{"controller"}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.duration, m.depth} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register controller metrics: %w", err)
		}
	}
	return m, nil
}

func (m *Metrics) observe(controller, outcome string, d time.Duration, depth int) {
	if m == nil {
		return
	}
	m.duration.WithLabelValues(controller, outcome).Observe(d.Seconds())
	m.depth.WithLabelValues(controller).Set(float64(depth))
}
