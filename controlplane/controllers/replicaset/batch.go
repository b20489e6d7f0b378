// SPDX-License-Identifier: Apache-2.0

package replicaset

import "golang.org/x/sync/errgroup"

// parallel bounds how many requests one ReplicaSet has under way.
const parallel = 64

// slowStart calls create n times in batches of 1, 2, 4, ... and ends after the first batch with a failure:
// a ReplicaSet beyond its quota costs one refused request a sync, not hundreds. It returns how many
// calls succeeded, and the first error.
func slowStart(n int, create func() error) (int, error) {
	done := 0
	for batch := 1; done < n; batch *= 2 {
		size := min(batch, n-done)
		results := make([]error, size)
		err := inParallel(size, func(i int) error {
			results[i] = create()
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

// inParallel calls do for 0 to n-1, all of them, and returns the first error.
func inParallel(n int, do func(i int) error) error {
	var g errgroup.Group
	g.SetLimit(parallel)
	for i := range n {
		g.Go(func() error { return do(i) })
	}
	return g.Wait()
}
