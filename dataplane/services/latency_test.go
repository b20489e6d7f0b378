// SPDX-License-Identifier: Apache-2.0

package services

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestLatency: each change is observed once, and those from before the process not at all.
func TestLatency(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l := newLatency(began)
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(l.histogram)
	slice := func(at time.Duration) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{}
		s.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: began.Add(at).Format(time.RFC3339Nano)}
		return s
	}
	bare := &discoveryv1.EndpointSlice{}
	for i, c := range []struct {
		slices []*discoveryv1.EndpointSlice
		now    time.Duration
		count  uint64
		sum    float64
	}{
		{[]*discoveryv1.EndpointSlice{slice(-time.Hour), bare}, time.Second, 0, 0},
		{[]*discoveryv1.EndpointSlice{bare}, time.Second, 0, 0},
		{[]*discoveryv1.EndpointSlice{slice(time.Second), slice(2 * time.Second)}, 5 * time.Second, 1, 3},
		{[]*discoveryv1.EndpointSlice{slice(time.Second), slice(2 * time.Second)}, 6 * time.Second, 1, 3},
		{[]*discoveryv1.EndpointSlice{slice(8 * time.Second)}, 10 * time.Second, 2, 5},
		{[]*discoveryv1.EndpointSlice{slice(20 * time.Second)}, 19 * time.Second, 3, 5}, // another machine's clock
		{nil, 21 * time.Second, 3, 5},
	} {
		l.programmed("ns/web", c.slices, began.Add(c.now))
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		m := families[0].Metric[0]
		if m.Histogram.GetSampleCount() != c.count || m.Histogram.GetSampleSum() != c.sum {
			t.Errorf("step %d: %d observations, %v seconds; want %d, %v", i, m.Histogram.GetSampleCount(), m.Histogram.GetSampleSum(), c.count, c.sum)
		}
	}
	if len(l.seen) != 0 {
		t.Errorf("left: %v", l.seen)
	}
}
