// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"skep.io/skep/tests/cluster"
)

func TestMain(m *testing.M) {
	cluster.Helper()
	os.Exit(m.Run())
}

func TestTenfold(t *testing.T) {
	for last, want := range map[int][]int{1: {1}, 10: {10}, 25: {10, 25}, 1000: {10, 100, 1000}} {
		if got := tenfold(last); !slices.Equal(got, want) {
			t.Errorf("%d: %v", last, got)
		}
	}
}

// A cluster grows in two steps to 20 nodes and 200 pods, which all come to run, and everything about it is measured.
func TestSmall(t *testing.T) {
	cluster.Need(t)
	built, err := cluster.Build(t.Context(), filepath.Join("..", "..", ".build", "e2e"))
	if err != nil {
		t.Fatal(err)
	}
	var got []Report
	err = grow(t.Context(), built, t.TempDir(), plan{steps: []int{2, 20}, perNode: 10, probes: 10, idle: time.Second}, func(r Report) error {
		got = append(got, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[1].Nodes != 20 || got[1].Pods != 200 {
		t.Fatalf("%+v", got)
	}
	for _, r := range got {
		if r.Filled <= 0 || r.Get.P50 <= 0 || r.List.P50 <= 0 || r.Create.P99 < r.Create.P50 || r.WatchLag.P50 <= 0 || r.RSS == 0 || r.FailedRequests > 0 {
			t.Errorf("%+v", r)
		}
		if strings.Count(r.row(r.Pods), "\t") != strings.Count(tableHead, "\t") {
			t.Errorf("row and head differ: %s", r.row(r.Pods))
		}
	}
}
