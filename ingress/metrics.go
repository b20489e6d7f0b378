// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are labelled by Ingress and class of status only: what a client sends never makes a new
// series.
type metrics struct {
	requests    *prometheus.CounterVec
	latency     prometheus.Histogram
	active      prometheus.Gauge
	connections prometheus.Gauge
	idle        prometheus.Gauge
	evicted     prometheus.Counter
	failures    *prometheus.CounterVec
	routes      prometheus.Gauge
	certs       prometheus.Gauge
	rebuilds    prometheus.Counter

	unrouted *requestCounters
	mu       sync.Mutex
	known    map[string]*requestCounters // by Ingress
}

// requestCounters hold one counter a class of status, so that counting costs no look-up.
type requestCounters [6]prometheus.Counter

var statusClasses = [6]string{"aborted", "1xx", "2xx", "3xx", "4xx", "5xx"}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_ingress_requests_total", Help: "Requests by Ingress (empty: none matched) and class of status.",
		}, []string{"ingress", "code"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "skep_ingress_request_duration_seconds", Help: "From a request's head to the end of its reply.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}),
		active: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "skep_ingress_requests_active", Help: "Requests under way.",
		}),
		connections: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "skep_ingress_connections", Help: "Connections of clients that are open and served.",
		}),
		idle: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "skep_ingress_connections_idle", Help: "Of them those that are kept without a request.",
		}),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_ingress_connections_evicted_total", Help: "Kept connections without a request that were closed to make room for other clients.",
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_ingress_backend_failures_total", Help: "Failures of backends: connect, reply (no proper head), body (cut off).",
		}, []string{"stage"}),
		routes:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "skep_ingress_routes", Help: "Routes in the table."}),
		certs:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "skep_ingress_certificates", Help: "Certificates loaded from Secrets."}),
		rebuilds: prometheus.NewCounter(prometheus.CounterOpts{Name: "skep_ingress_table_builds_total", Help: "Times the routing table was built."}),
		known:    map[string]*requestCounters{},
	}
	if reg != nil {
		for _, c := range []prometheus.Collector{m.requests, m.latency, m.active, m.connections, m.idle, m.evicted, m.failures, m.routes, m.certs, m.rebuilds} {
			if err := reg.Register(c); err != nil {
				return nil, err
			}
		}
	}
	m.unrouted = m.counters("")
	return m, nil
}

func (m *metrics) counters(ingress string) *requestCounters {
	var c requestCounters
	for i, class := range statusClasses {
		c[i] = m.requests.WithLabelValues(ingress, class)
	}
	return &c
}

// route returns the counters of an Ingress.
func (m *metrics) route(ingress string) *requestCounters {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.known[ingress]
	if c == nil {
		c = m.counters(ingress)
		m.known[ingress] = c
	}
	return c
}

// keep drops the series of Ingresses that are not in the table any more.
func (m *metrics) keep(t *Table) {
	m.routes.Set(float64(len(t.Routes)))
	m.certs.Set(float64(t.certificates))
	m.rebuilds.Inc()
	current := map[string]bool{}
	for _, r := range t.Routes {
		current[r.Ingress.String()] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.known {
		if !current[name] {
			delete(m.known, name)
			m.requests.DeletePartialMatch(prometheus.Labels{"ingress": name})
		}
	}
}

func (m *metrics) observe(c *requestCounters, status int, took time.Duration) {
	if c == nil {
		c = m.unrouted
	}
	class := status / 100
	if class >= len(c) || status == statusClientGone {
		class = 0
	}
	c[class].Inc()
	m.latency.Observe(took.Seconds())
}
