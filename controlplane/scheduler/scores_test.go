// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Each case compares nodes "a" and "b" by one score.
func TestScores(t *testing.T) {
	const mega = 1 << 20
	for _, c := range []struct {
		score string
		name  string
		pod   *v1.Pod
		a, b  *v1.Node
		on    []*v1.Pod
		want  [2]int64 // after scaling, before weights
	}{
		{"TaintToleration", "fewer soft taints", testPod("p"), testNode("a", tainted("k", v1.TaintEffectPreferNoSchedule)), testNode("b"), nil, [2]int64{0, 100}},
		{"TaintToleration", "tolerated", testPod("p", toleratesAll), testNode("a", tainted("k", v1.TaintEffectPreferNoSchedule)), testNode("b"), nil, [2]int64{100, 100}},
		{"TaintToleration", "one of two", testPod("p"), testNode("a", tainted("k", v1.TaintEffectPreferNoSchedule)),
			testNode("b", tainted("k", v1.TaintEffectPreferNoSchedule), tainted("l", v1.TaintEffectPreferNoSchedule)), nil, [2]int64{50, 0}},
		{"NodeAffinity", "preferred", testPod("p", prefers(7, "disk", "ssd")), testNode("a", labelled("disk", "ssd")), testNode("b"), nil, [2]int64{100, 0}},
		{"NodeResourcesFit", "emptier", testPod("p", asks("cpu", "1", "memory", "2Gi")), testNode("a"), testNode("b"),
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "2", "memory", "4Gi"))}, [2]int64{25, 75}},
		{"NodeResourcesFit", "pods that ask for nothing count too", testPod("p", asks("cpu", "0", "memory", "0")), testNode("a", gives("cpu", "1", "memory", "2000Mi")),
			testNode("b", gives("cpu", "1", "memory", "2000Mi")), []*v1.Pod{testPod("q", onNode("a"))}, [2]int64{90, 100}},
		{"NodeResourcesFit", "overdrawn", testPod("p", asks("cpu", "8", "memory", "16Gi")), testNode("a"), testNode("b"), nil, [2]int64{0, 0}},
		{"NodeResourcesBalancedAllocation", "evens out", testPod("p", asks("cpu", "2", "memory", "0")), testNode("a"), testNode("b"),
			[]*v1.Pod{testPod("q", onNode("a"), asks("memory", "4Gi"))}, [2]int64{87, 62}},
		{"ImageLocality", "has the image", testPod("p"), testNode("a", hasImage("app:1", 1000*mega)), testNode("b"), nil, [2]int64{48, 0}},
		{"ImageLocality", "small images do not matter", testPod("p"), testNode("a", hasImage("app:1", 20*mega)), testNode("b"), nil, [2]int64{0, 0}},
	} {
		t.Run(c.score+"/"+c.name, func(t *testing.T) {
			s := testSnapshot([]*v1.Node{c.a, c.b}, c.on...)
			sc := scores[scoreNamed(c.score)]
			var got [2]int64
			sc.of(newSearcher(1).ask(newPendingPod(c.pod), s), []*node{s.byName["a"], s.byName["b"]}, got[:])
			if sc.scale != nil {
				sc.scale(got[:])
			}
			if got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

func TestReplicasSpread(t *testing.T) {
	s := testSnapshot(numbered(10, func(i int) *v1.Node { return testNode(name("n", i)) }))
	s.workloads.setController(workloadKey{"apps/v1/ReplicaSet", "default", "rs"}, labels.SelectorFromSet(labels.Set{"app": "a"}))
	x := newSearcher(1)
	for i := range 30 {
		p := newPendingPod(testPod(name("p", i), ownedBy("rs"), hasLabels("app", "a"), asks("cpu", "100m")))
		n, _ := x.decide(p, s)
		s.setPod(p, n.name)
	}
	for _, n := range s.nodes {
		if len(n.pods) != 3 {
			t.Errorf("%s has %d of 30 replicas, want 3 on each of 10 nodes", n.name, len(n.pods))
		}
	}
}

func TestPodsWithoutRequestsSpread(t *testing.T) {
	s := testSnapshot(numbered(4, func(i int) *v1.Node { return testNode(name("n", i)) }))
	x := newSearcher(1)
	for i := range 40 {
		p := newPendingPod(testPod(name("p", i)))
		n, _ := x.decide(p, s)
		s.setPod(p, n.name)
	}
	for _, n := range s.nodes {
		if len(n.pods) < 8 || len(n.pods) > 12 {
			t.Errorf("%s has %d of 40 pods on 4 nodes", n.name, len(n.pods))
		}
	}
}
