// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// quantile is the smallest sample that is not below a share q of all (nearest rank).
func quantile[T cmp.Ordered](samples []T, q float64) T {
	var zero T
	if len(samples) == 0 {
		return zero
	}
	sorted := slices.Sorted(slices.Values(samples))
	rank := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(rank, 0), len(sorted)-1)]
}

func median[T cmp.Ordered](samples []T) T { return quantile(samples, 0.5) }

// pairedRatio is the median of a's samples over b's of the same round: what a busy machine does to a
// round, it does to both.
func pairedRatio(a, b []float64) float64 {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			ratios = append(ratios, a[i]/b[i])
		}
	}
	return median(ratios)
}

func ratio[T time.Duration | int64](a, b T) string {
	if b == 0 {
		return ""
	}
	return fmt.Sprintf("%.2g", float64(a)/float64(b))
}

func milliseconds(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%d ms", d.Round(time.Millisecond).Milliseconds())
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

func mebibytes(bytes int64) string { return fmt.Sprintf("%d MiB", bytes>>20) }
