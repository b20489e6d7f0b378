// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// metric is the value of one by its name and labels, in the order of their names: "map", "services"; of a
// histogram, how much it has observed.
func (n *testNode) metric(name string, labels ...string) float64 {
	n.t.Helper()
	families, err := n.cfg.Metrics.(*prometheus.Registry).Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			match := f.GetName() == name && len(m.Label)*2 == len(labels)
			for i := 0; match && i < len(m.Label); i++ {
				match = m.Label[i].GetName() == labels[2*i] && m.Label[i].GetValue() == labels[2*i+1]
			}
			if match {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	n.t.Fatalf("no metric %s%q", name, labels)
	return 0
}

// TestMetrics: connections, packets, bytes, drops, pressure and latency are counted, under names that the linter of
// Prometheus finds right.
func TestMetrics(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b")
	a, b := pods[0], pods[1]
	web := n.service("web", nil, b)
	n.answers(a.ns, "tcp", web.v4, "b")
	n.answers(0, "tcp", at(b.v4(), 8080), "b")
	n.policy(in("b"))
	eventually(t, "b is closed to a", func() error {
		if reaches(a.ns, at(b.v4(), 8080)) {
			return errors.New("it reaches b")
		}
		return nil
	})
	for _, m := range [][]string{
		{"skep_dataplane_socket_requests_total", "hook", "connect", "result", "translated"},
		{"skep_dataplane_packets_total", "path", "from-pod"}, {"skep_dataplane_packets_total", "path", "to-pod"}, {"skep_dataplane_packets_total", "path", "redirected"},
		{"skep_dataplane_bytes_total", "path", "from-pod"}, {"skep_dataplane_bytes_total", "path", "to-pod"},
		{"skep_dataplane_drops_total", "reason", "policy-ingress"}, {"skep_dataplane_flow_events_total", "result", "told"},
		{"skep_dataplane_policy_drops_total", "direction", "ingress", "namespace", "default", "policies", "in-b"},
	} {
		if n.metric(m[0], m[1:]...) == 0 {
			t.Errorf("%q is 0", m)
		}
	}
	for _, path := range []string{"from-pod", "to-pod"} { // no packet is shorter than its headers
		bytes, packets := n.metric("skep_dataplane_bytes_total", "path", path), n.metric("skep_dataplane_packets_total", "path", path)
		if bytes < 34*packets {
			t.Errorf("%s: %v bytes in %v packets", path, bytes, packets)
		}
	}
	for _, name := range []string{"services", "slots", "backends", "endpoints", "clients", "node_addresses", "ranges", "policy_slots", "policy_drops"} {
		if v := n.metric("skep_dataplane_map_pressure", "map", name); v <= 0 || v >= 1 {
			t.Errorf("pressure of %s is %v", name, v)
		}
	}
	n.metric("skep_dataplane_map_pressure", "map", "conntrack_tcp") // counted at the next collection
	n.metric("skep_dataplane_map_pressure", "map", "conntrack_udp")
	n.metric("skep_dataplane_map_pressure", "map", "policy")                    // default deny has no entries
	for _, name := range []string{"announced", "source_ranges", "identities"} { // nothing has any
		if v := n.metric("skep_dataplane_map_pressure", "map", name); v != 0 {
			t.Errorf("pressure of %s is %v", name, v)
		}
	}
	for _, name := range []string{"skep_dataplane_service_apply_seconds", "skep_dataplane_policy_apply_seconds"} {
		if n.metric(name) == 0 {
			t.Errorf("%s has observed nothing", name)
		}
	}
	n.metric("skep_dataplane_service_programming_seconds") // see services.TestLatency
	problems, err := testutil.GatherAndLint(n.cfg.Metrics.(*prometheus.Registry))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}
