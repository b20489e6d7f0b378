// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"errors"
	"sync/atomic"
	"testing"
)

func TestSlowStart(t *testing.T) {
	for _, tt := range []struct{ n, failFrom, calls, done int }{
		{0, 100, 0, 0}, {1, 100, 1, 1}, {10, 100, 10, 10},
		{100, 0, 1, 0}, // the first fails: nothing more is tried
		{100, 1, 3, 1}, // batch of two fails
		{100, 3, 7, 3}, // batch of four fails
		{100, 5, 7, 5}, // half of that batch got through
		{12, 9, 12, 9}, // the last batch is what is left
	} {
		var calls atomic.Int64
		seen := make([]atomic.Bool, tt.n)
		done, err := SlowStart(tt.n, func(i int) error {
			if seen[i].Swap(true) {
				t.Errorf("SlowStart(%d): %d is created twice", tt.n, i)
			}
			if calls.Add(1) > int64(tt.failFrom) {
				return errors.New("no")
			}
			return nil
		})
		if int(calls.Load()) != tt.calls || done != tt.done || (err != nil) != (tt.done < tt.n) {
			t.Errorf("SlowStart(%d, fails from %d): %d calls, %d done, %v; want %d, %d", tt.n, tt.failFrom, calls.Load(), done, err, tt.calls, tt.done)
		}
	}
}
