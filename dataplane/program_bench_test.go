// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"skep.io/skep/dataplane/maps"
)

// BenchmarkFromPod measures the program's own time on packets of one pod to another on the node, without
// what the kernel does with its verdict: of an open connection, and the mean of one that opens a flow and
// one that ends it.
func BenchmarkFromPod(b *testing.B) {
	const repeat = 100_000
	r := newRig(b)
	for family, name := range []string{"v4", "v6"} {
		for i, kind := range []struct {
			name  string
			flags uint8
		}{{"open", 0x10}, {"openEnd", 0x04}} {
			b.Run(fmt.Sprint(name, "/", kind.name), func(b *testing.B) {
				s := segment{
					from:  netip.AddrPortFrom(podA[family], uint16(1000+i)),
					to:    netip.AddrPortFrom(podB[family], 8080),
					proto: maps.TCP, flags: kind.flags, payload: make([]byte, 100),
				}
				took := make([]float64, b.N)
				for n := range b.N {
					verdict, each, err := r.Program("from_pod").Benchmark(s.bytes(), repeat, nil)
					if err != nil || verdict != redirect {
						b.Fatalf("verdict %d, %v", verdict, err)
					}
					took[n] = float64(each / time.Nanosecond)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(slices.Min(took), "ns/run") // what a busy machine disturbs least
			})
		}
	}
}
