// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"
)

func TestDataplaneRows(t *testing.T) {
	out := `goos: linux
BenchmarkNodePort-2   	       5	    400000 iptables-packets/s	   1.2e+06 xdp-packets/s
--- BENCH: BenchmarkNodePort-2
    topology_test.go:126: New: 400.229233ms
BenchmarkPrograms-2   	       3	       519.2 at_driver-ns	        27.65 steer-ns
PASS
`
	f, err := readBenchmarks([]byte(out))
	if err != nil {
		t.Fatal(err)
	}
	rows := dataplaneRows(f)
	for _, want := range []row{
		{"NodePort from outside, datagrams a second on one core (with their sender), at XDP", "1200000", "iptables 400000", "3.00", "5"},
		{"one run of at_driver", "519 ns", "", "", ""},
	} {
		if !slices.Contains(rows, want) {
			t.Errorf("no row %v in %v", want, rows)
		}
	}
	for _, bad := range []string{"", "ok  	skep.io/skep/dataplane	1s\n", "BenchmarkNodePort-2 5 many packets/s\n"} {
		if f, err := readBenchmarks([]byte(bad)); err == nil {
			t.Errorf("%q is read as %v", bad, f)
		}
	}
}
