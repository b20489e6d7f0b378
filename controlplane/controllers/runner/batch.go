// SPDX-License-Identifier: Apache-2.0

package runner

import "golang.org/x/sync/errgroup"

// parallel bounds how many requests one object's sync has under way.
const parallel = 64

// SlowStart calls create for 0 to n-1 in batches of 1, 2, 4, ... and ends after the first batch with a failure:
// an owner beyond its quota costs one refused request a sync, not hundreds. It returns how many calls succeeded,
// and the first error.
func SlowStart(n int, create func(i int) error) (int, error) {
	done := 0
	for first, batch := 0, 1; first < n; first, batch = first+batch, batch*2 {
		size := min(batch, n-first)
		results := make([]error, size)
		err := InParallel(size, func(i int) error {
			results[i] = create(first + i)
			return results[i]
		})
		for _, result := range results {
			if result == nil {
				done++
			}
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// InParallel calls do for 0 to n-1, all of them, and returns the first error.
func InParallel(n int, do func(i int) error) error {
	var g errgroup.Group
	g.SetLimit(parallel)
	for i := range n {
		g.Go(func() error { return do(i) })
	}
	return g.Wait()
}
