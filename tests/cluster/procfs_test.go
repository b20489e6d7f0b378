// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"
	"time"
)

func TestProcfs(t *testing.T) {
	stat := []byte("42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 100 1 1")
	if got := cpuTime(stat); got != 2*time.Second {
		t.Errorf("cpuTime = %s", got)
	}
	for _, damaged := range []string{"", "42 (a", "42 (a) S 1"} {
		if got := cpuTime([]byte(damaged)); got != 0 {
			t.Errorf("cpuTime(%q) = %s", damaged, got)
		}
	}
	rollup := []byte("55-77 ---p 00000000 00:00 0 [rollup]\nRss:              41024 kB\nPss:              40960 kB\nPss_Dirty: 1 kB\n")
	for name, want := range map[string]int64{"Rss:": 41024, "Pss:": 40960, "Swap:": 0} {
		if got := field(rollup, name); got != want {
			t.Errorf("field %s = %d, want %d", name, got, want)
		}
	}
}
