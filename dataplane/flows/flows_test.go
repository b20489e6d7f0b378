// SPDX-License-Identifier: Apache-2.0

package flows

import (
	"errors"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"skep.io/skep/bpf"
)

// TestCounters: there are as many names as the programs count facts.
func TestCounters(t *testing.T) {
	spec, err := bpf.LoadPod()
	if err != nil {
		t.Fatal(err)
	}
	if got := int(spec.Maps["counters"].MaxEntries); got != len(Counters) {
		t.Errorf("bpf/counters.h has %d counters, Counters %d", got, len(Counters))
	}
}

func TestCollector(t *testing.T) {
	values, fail := make([]uint64, len(Counters)), error(nil)
	for i := range values {
		values[i] = uint64(i + 1)
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewCollector(func() ([]uint64, error) { return values, fail }))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	for _, f := range families {
		for _, m := range f.Metric {
			total += m.Counter.GetValue()
		}
	}
	if want := float64(len(Counters)*(len(Counters)+1)) / 2; total != want {
		t.Errorf("sum is %v, want %v", total, want)
	}
	fail = errors.New("gone")
	if _, err := reg.Gather(); err == nil {
		t.Error("no error")
	}
}
