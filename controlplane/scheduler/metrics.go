// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics carry the names that dashboards for Kubernetes' scheduler ask for.
type metrics struct {
	attempts  *prometheus.CounterVec
	decision  *prometheus.HistogramVec
	binding   prometheus.Histogram
	wait      prometheus.Histogram
	tries     prometheus.Histogram
	preempted prometheus.Counter
}

// newMetrics registers with registerer unless that is nil.
func newMetrics(registerer prometheus.Registerer, s *Scheduler) (*metrics, error) {
	fast := prometheus.ExponentialBuckets(0.00001, 4, 10) // 10 µs to 2.6 s
	slow := prometheus.ExponentialBuckets(0.001, 4, 10)   // 1 ms to 262 s
	m := &metrics{
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "scheduler_schedule_attempts_total", Help: "Decisions on pods, by result.",
		}, []string{"result"}),
		decision: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "scheduler_scheduling_attempt_duration_seconds", Help: "Time of one decision, without writing it.", Buckets: fast,
		}, []string{"result"}),
		binding: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "scheduler_binding_duration_seconds", Help: "Time of writing one decision.", Buckets: slow,
		}),
		wait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "scheduler_pod_scheduling_sli_duration_seconds", Help: "Time from when a pod is first seen until it is bound.", Buckets: slow,
		}),
		tries: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "scheduler_pod_scheduling_attempts", Help: "Decisions that it took to bind a pod.", Buckets: prometheus.ExponentialBuckets(1, 2, 5),
		}),
		preempted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "scheduler_preemption_victims_total", Help: "Pods that were asked to go for pods of higher priority.",
		}),
	}
	if registerer == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.attempts, m.decision, m.binding, m.wait, m.tries, m.preempted}
	for name, length := range map[string]func() int{
		"active":        func() int { return len(s.queue.active) },
		"backoff":       func() int { return len(s.queue.backoff) },
		"unschedulable": func() int { return len(s.queue.asleep) },
		"binding":       func() int { return len(s.binding) },
	} {
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "scheduler_pending_pods", Help: "Pods without a node, by where they wait.",
			ConstLabels: prometheus.Labels{"queue": name},
		}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(length())
		}))
	}
	var errs []error
	for _, collector := range all {
		errs = append(errs, registerer.Register(collector))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) attempt(result string, began time.Time) {
	m.attempts.WithLabelValues(result).Inc()
	m.decision.WithLabelValues(result).Observe(time.Since(began).Seconds())
}

func (m *metrics) bound(began time.Time) { m.binding.Observe(time.Since(began).Seconds()) }

func (m *metrics) placed(wait time.Duration, attempts int) {
	m.wait.Observe(wait.Seconds())
	m.tries.Observe(float64(attempts))
}

func (m *metrics) victims(count int) { m.preempted.Add(float64(count)) }
