// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	queries   *prometheus.CounterVec   // kind, proto, rcode
	duration  *prometheus.HistogramVec // kind
	cache     *prometheus.CounterVec   // result
	upstreams *prometheus.HistogramVec // server, result
}

func newMetrics() *metrics {
	buckets := prometheus.ExponentialBuckets(0.00001, 4, 11) // 10 µs to 10 s
	return &metrics{
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_dns_queries_total", Help: "Questions answered, by kind (cluster, reverse, forward, refused), transport and response code.",
		}, []string{"kind", "proto", "rcode"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "skep_dns_query_duration_seconds", Help: "Time until a question was answered, by kind.", Buckets: buckets,
		}, []string{"kind"}),
		cache: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_dns_cache_lookups_total", Help: "Look-ups in the cache of upstream answers, by result (hit, miss).",
		}, []string{"result"}),
		upstreams: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "skep_dns_upstream_duration_seconds", Help: "Time of one exchange with an upstream server, by server and result.", Buckets: buckets,
		}, []string{"server", "result"}),
	}
}

// register does nothing without a registerer.
func (m *metrics) register(registerer prometheus.Registerer, f *forwarder) error {
	if registerer == nil {
		return nil
	}
	entries := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "skep_dns_cache_entries", Help: "Upstream answers in the cache.",
	}, func() float64 { return float64(f.cache.len()) })
	var errs []error
	for _, collector := range []prometheus.Collector{m.queries, m.duration, m.cache, m.upstreams, entries} {
		errs = append(errs, registerer.Register(collector))
	}
	return errors.Join(errs...)
}

func (m *metrics) upstream(server, result string, began time.Time) {
	m.upstreams.WithLabelValues(server, result).Observe(time.Since(began).Seconds())
}
