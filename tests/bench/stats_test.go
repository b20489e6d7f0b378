// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		samples []int
		q       float64
		want    int
	}{
		{nil, 0.5, 0}, {[]int{7}, 0.99, 7}, {[]int{3, 1, 2}, 0.5, 2}, {[]int{4, 1, 3, 2}, 0.5, 2}, {[]int{4, 1, 3, 2}, 0.99, 4}, {[]int{4, 1}, 0, 1},
	} {
		if got := quantile(c.samples, c.q); got != c.want {
			t.Errorf("quantile(%v, %v) = %d, want %d", c.samples, c.q, got, c.want)
		}
	}
}

func TestPairedRatio(t *testing.T) {
	// A slow third round, slow for both, does not count.
	if got := pairedRatio([]float64{90, 95, 9}, []float64{100, 100, 10}); got != 0.9 {
		t.Errorf("pairedRatio = %v", got)
	}
	if got := pairedRatio(nil, []float64{1}); got != 0 {
		t.Errorf("pairedRatio of nothing = %v", got)
	}
}

func TestQuantileIsASample(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		samples := rapid.SliceOfN(rapid.Int(), 1, 50).Draw(t, "samples")
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		got := quantile(samples, q)
		if !slices.Contains(samples, got) {
			t.Fatalf("%d is none of %v", got, samples)
		}
		below := 0
		for _, s := range samples {
			if s <= got {
				below++
			}
		}
		if float64(below) < q*float64(len(samples)) {
			t.Fatalf("only %d of %d samples are at most %d, for %v", below, len(samples), got, q)
		}
	})
}

func TestRatesOf(t *testing.T) {
	out := "goos: linux\nBenchmarkDecide/plain/nodes=100-2   \t  1000\t  9876 ns/op\t  101256 pods/s\t  0 B/op\nBenchmarkOther-2 10 5 ns/op\nPASS\n"
	if got := ratesOf([]byte(out)); len(got) != 1 || got[0] != (rate{"Decide/plain/nodes=100", 101256}) {
		t.Errorf("%+v", got)
	}
}
