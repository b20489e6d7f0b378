// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	dropsDesc = prometheus.NewDesc("skep_dataplane_policy_drops_total",
		"Packets that the policies of a pod dropped: none of them lets them pass.", []string{"namespace", "direction", "policies"}, nil)
	entriesDesc = perMap("skep_dataplane_map_entries", "Entries of a BPF map.")
	usedDesc    = perMap("skep_dataplane_map_pressure", "Entries of a BPF map as a share of what fits.")
	problemDesc = prometheus.NewDesc("skep_dataplane_policies_not_in_force", "NetworkPolicies that deny more than they say.", nil, nil)
)

// measured are the maps whose entries are counted.
var measured = []string{"policy", "identities", "policy_slots", "policy_drops"}

func perMap(name, help string) map[string]*prometheus.Desc {
	out := map[string]*prometheus.Desc{}
	for _, m := range measured {
		out[m] = prometheus.NewDesc(name, help, nil, prometheus.Labels{"map": m})
	}
	return out
}

// Size of a map: entries that are used, and those that fit.
type Size struct{ Used, Fits int }

// Sizes are those of the maps of policies, by name.
func (c *Controller) Sizes() map[string]Size {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sizes()
}

// sizes counts what this process wrote. Half of the maps is for what an earlier one did, until that is pruned.
func (c *Controller) sizes() map[string]Size {
	t := c.table
	return map[string]Size{
		"policy":       {t.entries, c.cfg.Limits.Entries},
		"identities":   {t.blocks + len(t.owners), int(c.cfg.Capacity["identities"] / 2)},
		"policy_slots": {len(t.locals) + len(c.unclaimed), int(c.cfg.Kernel.PolicySlots()) - 1},
		"policy_drops": {len(t.tallies), int(c.cfg.Capacity["policy_drops"] / 2)},
	}
}

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

func newFailures() prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name: "skep_dataplane_policy_failures_total",
		Help: "Attempts to write what policies ask for into the kernel that failed.",
	})
}

// Describe implements prometheus.Collector.
func (c *Controller) Describe(ch chan<- *prometheus.Desc) {
	ch <- dropsDesc
	ch <- problemDesc
	for _, m := range measured {
		ch <- entriesDesc[m]
		ch <- usedDesc[m]
	}
	c.applied.Describe(ch)
	c.failures.Describe(ch)
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
	c.failures.Collect(ch)
	for m, s := range c.sizes() {
		ch <- prometheus.MustNewConstMetric(entriesDesc[m], prometheus.GaugeValue, float64(s.Used))
		if s.Fits > 0 {
			ch <- prometheus.MustNewConstMetric(usedDesc[m], prometheus.GaugeValue, float64(s.Used)/float64(s.Fits))
		}
	}
	ch <- prometheus.MustNewConstMetric(problemDesc, prometheus.GaugeValue, float64(len(c.problems())))
}
