// SPDX-License-Identifier: Apache-2.0

// Package flows brings what the kernel programs counted to Prometheus.
package flows

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Counter is one index of the programs' counters map.
type Counter struct {
	Metric, Help string
	Labels       prometheus.Labels
}

// Counters in the order of enum counter in bpf/counters.h.
var Counters = []Counter{
	{connections, connectionsHelp, prometheus.Labels{"hook": "connect", "result": "translated"}},
	{connections, connectionsHelp, prometheus.Labels{"hook": "connect", "result": "refused"}},
	{connections, connectionsHelp, prometheus.Labels{"hook": "sendmsg", "result": "translated"}},
	{connections, connectionsHelp, prometheus.Labels{"hook": "sendmsg", "result": "refused"}},
	{packets, packetsHelp, prometheus.Labels{"path": "from-pod"}},
	{packets, packetsHelp, prometheus.Labels{"path": "to-pod"}},
	{packets, packetsHelp, prometheus.Labels{"path": "redirected"}},
	{"skep_dataplane_translated_flows_total", "Flows to services that were translated packet by packet.", nil},
	{drops, dropsHelp, prometheus.Labels{"reason": "spoofed-source"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "malformed"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "no-local-backend"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "no-free-source-port"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "rewrite-refused"}},
	{"skep_dataplane_ingress_connections_total", "Connections handed to the ingress listener.", nil},
	{drops, dropsHelp, prometheus.Labels{"reason": "policy-ingress"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "policy-egress"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "policy-closed"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "fragment-before-first"}},
	{events, eventsHelp, prometheus.Labels{"result": "told"}},
	{events, eventsHelp, prometheus.Labels{"result": "over-budget"}},
	{events, eventsHelp, prometheus.Labels{"result": "ring-full"}},
	{drops, dropsHelp, prometheus.Labels{"reason": "source-range"}},
	{bytes, bytesHelp, prometheus.Labels{"path": "from-pod"}},
	{bytes, bytesHelp, prometheus.Labels{"path": "to-pod"}},
	{drops, dropsHelp, prometheus.Labels{"reason": noFrontend}},
	{drops, dropsHelp, prometheus.Labels{"reason": "too-big"}},
	{"skep_dataplane_translated_errors_total", "ICMP errors about translated flows, which their senders got under the addresses they know.", nil},
	{"skep_dataplane_refused_too_big_total", "Packets of translated flows that were too large for the next link; their senders are told its MTU.", nil},
	{packets, packetsHelp, prometheus.Labels{"path": "driver"}},
	{added, addedHelp, prometheus.Labels{"protocol": "tcp"}},
	{added, addedHelp, prometheus.Labels{"protocol": "udp"}},
	{removed, removedHelp, prometheus.Labels{"protocol": "tcp"}},
	{removed, removedHelp, prometheus.Labels{"protocol": "udp"}},
	{failed, failedHelp, prometheus.Labels{"protocol": "tcp"}},
	{failed, failedHelp, prometheus.Labels{"protocol": "udp"}},
}

const (
	connections     = "skep_dataplane_socket_requests_total"
	connectionsHelp = "Sockets' requests for a service's address."
	packets         = "skep_dataplane_packets_total"
	packetsHelp     = "Packets by the way they took."
	bytes           = "skep_dataplane_bytes_total"
	bytesHelp       = "Bytes of packets by the way they took, with Ethernet headers. What is redirected between pods was from one."
	drops           = "skep_dataplane_drops_total"
	dropsHelp       = "Packets dropped, by reason."
	added           = "skep_dataplane_conntrack_added_total"
	addedHelp       = "Flows that were noted. A translated one has two entries."
	removed         = "skep_dataplane_conntrack_removed_total"
	removedHelp     = "Flows that were forgotten because they were over."
	failed          = "skep_dataplane_conntrack_insert_failures_total"
	failedHelp      = "Flows that could not be noted, for want of room."
	events          = "skep_dataplane_flow_events_total"
	eventsHelp      = "Drops and new connections that the programs had to tell of, and what became of that."
)

// Collector reads the counters when Prometheus asks.
type Collector struct {
	read  func() ([]uint64, error)
	descs []*prometheus.Desc
}

// NewCollector of what read returns.
func NewCollector(read func() ([]uint64, error)) *Collector {
	c := &Collector{read: read}
	for _, n := range Counters {
		c.descs = append(c.descs, prometheus.NewDesc(n.Metric, n.Help, nil, n.Labels))
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	values, err := c.read()
	for i, d := range c.descs {
		if err != nil || i >= len(values) {
			ch <- prometheus.NewInvalidMetric(d, err)
			continue
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(values[i]))
	}
}
