// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	dropsDesc = prometheus.NewDesc("skep_dataplane_policy_drops_total",
		"Packets that the policies of a pod dropped: none of them lets them pass.", []string{"namespace", "direction", "policies"}, nil)
	entriesDesc = prometheus.NewDesc("skep_dataplane_map_entries", "Entries of a BPF map.", nil, prometheus.Labels{"map": "policy"})
	usedDesc    = prometheus.NewDesc("skep_dataplane_map_pressure", "Entries of a BPF map as a share of what fits.", nil, prometheus.Labels{"map": "policy"})
	problemDesc = prometheus.NewDesc("skep_dataplane_policies_not_in_force", "NetworkPolicies that deny more than they say.", nil, nil)
)

type dropLabels struct{ namespace, direction, policies string }

func labelsOf(i SetInfo) dropLabels {
	return dropLabels{i.Namespace, i.Direction, strings.Join(i.Policies, ",")}
}

// remember keeps the drops of a set that is gone. It is called with mu held.
func (c *Controller) remember(i SetInfo, drops uint64) {
	if drops > 0 {
		c.past[labelsOf(i)] += drops
	}
}

func newApplied() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "skep_dataplane_policy_apply_seconds",
		Help:    "Time to write the consequences of one changed NetworkPolicy, Pod or Namespace into the kernel.",
		Buckets: prometheus.ExponentialBuckets(20e-6, 4, 9),
	})
}

// Describe implements prometheus.Collector.
func (c *Controller) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{dropsDesc, entriesDesc, usedDesc, problemDesc} {
		ch <- d
	}
	c.applied.Describe(ch)
}

// Collect implements prometheus.Collector.
func (c *Controller) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := map[dropLabels]uint64{}
	for l, n := range c.past {
		all[l] = n
	}
	err := c.table.Drops(c.cfg.Kernel, func(i SetInfo, n uint64) { all[labelsOf(i)] += n })
	if err != nil {
		ch <- prometheus.NewInvalidMetric(dropsDesc, err)
	}
	for l, n := range all {
		ch <- prometheus.MustNewConstMetric(dropsDesc, prometheus.CounterValue, float64(n), l.namespace, l.direction, l.policies)
	}
	c.applied.Collect(ch)
	ch <- prometheus.MustNewConstMetric(entriesDesc, prometheus.GaugeValue, float64(c.table.entries))
	ch <- prometheus.MustNewConstMetric(usedDesc, prometheus.GaugeValue, float64(c.table.entries)/float64(c.cfg.Limits.Entries))
	ch <- prometheus.MustNewConstMetric(problemDesc, prometheus.GaugeValue, float64(len(c.table.Problems())))
}
