// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
)

// TestOneBuildsAtATime lets several callers in, each of which would see another beside it. Two open files
// exclude each other as two processes do.
func TestOneBuildsAtATime(t *testing.T) {
	dir := t.TempDir()
	var inside atomic.Int32
	var all errgroup.Group
	for range 8 {
		all.Go(func() error {
			for range 100 {
				unlock, err := lockDir(dir)
				if err != nil {
					return err
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d build at once", n)
				}
				inside.Add(-1)
				unlock()
			}
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
}
