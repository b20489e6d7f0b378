// SPDX-License-Identifier: Apache-2.0

package node

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/eviction"
	"skep.io/skep/node/sandbox/cgroup"
)

func TestParseReserved(t *testing.T) {
	got, err := ParseReserved("cpu=100m, memory=1Gi,ephemeral-storage=2Gi,pid=1k")
	if err != nil || got.amount("cpu") != "100m" || got.amount("memory") != "1Gi" || got.amount("ephemeral-storage") != "2Gi" || got.amount("pid") != "1k" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := ParseReserved(""); err != nil || len(got) != 0 {
		t.Errorf("nothing: %v, %v", got, err)
	}
	for text, want := range map[string]string{
		"cpu": "write NAME=QUANTITY", "gpu=1": "cannot be reserved", "cpu=1,cpu=2": "given twice", "memory=much": "is not a quantity", "cpu=-1": "is not a quantity",
	} {
		if _, err := ParseReserved(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func (r Reserved) amount(name corev1.ResourceName) string {
	q := r[name]
	return q.String()
}

func TestAllocatable(t *testing.T) {
	reserved := func(text string) Reserved {
		r, err := ParseReserved(text)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	hard, err := eviction.Parse("memory.available<100Mi,nodefs.available<10%")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		kube, system string
		hard         map[eviction.Signal]eviction.Threshold
		want         map[string]string
		limits       cgroup.Limits
		err          string
	}{
		"nothing kept":    {"", "", nil, map[string]string{"cpu": "4", "memory": "7Gi", "ephemeral-storage": "100Gi"}, cgroup.Limits{CPUShares: 4096, MemoryBytes: 8 << 30, Pids: 1000}, ""},
		"eviction's part": {"", "", hard, map[string]string{"cpu": "4", "memory": "7068Mi", "ephemeral-storage": "90Gi"}, cgroup.Limits{CPUShares: 4096, MemoryBytes: 8 << 30, Pids: 1000}, ""},
		"both": {"cpu=500m,memory=1Gi,pid=100", "cpu=500m,memory=1Gi,ephemeral-storage=10Gi,pid=100", hard,
			map[string]string{"cpu": "3", "memory": "5020Mi", "ephemeral-storage": "80Gi"}, cgroup.Limits{CPUShares: 3072, MemoryBytes: 6 << 30, Pids: 800}, ""},
		"all processors":                 {"cpu=2", "cpu=2", nil, nil, cgroup.Limits{}, "leave no cpu"},
		"memory that is due to eviction": {"memory=8100Mi", "", hard, nil, cgroup.Limits{}, "leave no memory"},
	} {
		h := hostFacts{cpus: 4000, memory: 8 << 30, storage: 100 << 30, pids: 1000, huge: map[corev1.ResourceName]int64{"hugepages-2Mi": 1 << 30}}
		err := h.keep(reserved(c.kube), reserved(c.system), c.hard)
		if (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", name, err)
		}
		if c.err != "" {
			continue
		}
		got := map[string]string{}
		for n, q := range h.allocatable(110) {
			if n != corev1.ResourcePods && n != "hugepages-2Mi" {
				got[string(n)] = q.String()
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if diff := cmp.Diff(c.limits, h.podsLimits()); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		for wanted, want := range map[int64]int64{-1: 0, 0: c.limits.Pids / 4, 7: 7} {
			if got := h.podPids(wanted); got != want {
				t.Errorf("%s: --pod-max-pids %d: %d", name, wanted, got)
			}
		}
	}
}
