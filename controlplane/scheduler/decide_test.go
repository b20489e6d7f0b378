// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const useless1 = " no new claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
const useless2 = " no new claims to deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."

// The expected texts are what kube-scheduler 1.36 writes.
func TestMessages(t *testing.T) {
	never := v1.PreemptNever
	for _, c := range []struct {
		name  string
		nodes []*v1.Node
		pods  []*v1.Pod
		pod   *v1.Pod
		want  string // empty: it is scheduled, or room is made
	}{
		{"no nodes", nil, nil, testPod("p"), "no nodes available to schedule pods"},
		{"cpu beyond the node", []*v1.Node{testNode("a")}, nil, testPod("p", asks("cpu", "100")),
			"0/1 nodes are available: 1 Insufficient cpu." + useless1},
		{"cpu in use", []*v1.Node{testNode("a")}, []*v1.Pod{testPod("q", onNode("a"), asks("cpu", "3"))}, testPod("p", asks("cpu", "2")),
			"0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found for incoming pod."},
		{"two resources", []*v1.Node{testNode("a")}, nil, testPod("p", asks("cpu", "100", "memory", "1Ti")),
			"0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory." + useless1},
		{"extended resource", []*v1.Node{testNode("a")}, nil, testPod("p", asks("example.com/gpu", "1")),
			"0/1 nodes are available: 1 Insufficient example.com/gpu." + useless1},
		{"ephemeral storage", []*v1.Node{testNode("a")}, nil, testPod("p", asks("ephemeral-storage", "30Gi")),
			"0/1 nodes are available: 1 Insufficient ephemeral-storage." + useless1},
		{"taint", []*v1.Node{testNode("a", tainted("k", v1.TaintEffectNoSchedule))}, nil, testPod("p"),
			"0/1 nodes are available: 1 node(s) had untolerated taint(s)." + useless1},
		{"selector", []*v1.Node{testNode("a")}, nil, testPod("p", selects("disk", "ssd")),
			"0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector." + useless1},
		{"cordoned is not a taint", []*v1.Node{testNode("a", cordoned)}, nil, testPod("p"),
			"0/1 nodes are available: 1 node(s) were unschedulable." + useless1},
		{"port", []*v1.Node{testNode("a")}, []*v1.Pod{testPod("q", onNode("a"), usesPort("", 80))}, testPod("p", usesPort("127.0.0.1", 80)),
			"0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports. no new claims to deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found for incoming pod."},
		{"too many pods", []*v1.Node{testNode("a", gives("pods", "1"))}, []*v1.Pod{testPod("q", onNode("a"))}, testPod("p"),
			"0/1 nodes are available: 1 Too many pods. no new claims to deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found for incoming pod."},
		{"topology", []*v1.Node{testNode("a"), testNode("b", inZone("east")), testNode("c", inZone("west"))},
			[]*v1.Pod{testPod("q", onNode("b"), hasLabels("app", "a")), testPod("r", onNode("c"), apartFrom(v1.LabelHostname, "a"))},
			testPod("p", hasLabels("app", "a"), spreads(1, v1.LabelTopologyZone, "a")),
			"0/3 nodes are available: 1 node(s) didn't match pod topology spread constraints, " +
				"1 node(s) didn't match pod topology spread constraints (missing required label), 1 node(s) didn't satisfy existing pods anti-affinity rules. " +
				"no new claims to deallocate, preemption: 0/3 nodes are available: 1 Preemption is not helpful for scheduling, 2 No preemption victims found for incoming pod."},
		{"counts are sorted as text", append(numbered(10, func(i int) *v1.Node { return testNode(name("t", i), tainted("k", v1.TaintEffectNoExecute)) }),
			testNode("a", cordoned), testNode("b", cordoned)), nil, testPod("p"),
			"0/12 nodes are available: 10 node(s) had untolerated taint(s), 2 node(s) were unschedulable. no new claims to deallocate, preemption: 0/12 nodes are available: 12 Preemption is not helpful for scheduling."},
		{"daemon set pod whose node is full", []*v1.Node{testNode("a"), testNode("b")}, []*v1.Pod{testPod("q", onNode("a"), asks("cpu", "4"))},
			testPod("p", requiresNodes("a"), asks("cpu", "1")),
			"0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't satisfy plugin(s) [NodeAffinity]. no new claims to deallocate, preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling."},
		{"contradicting affinity", []*v1.Node{testNode("a")}, nil, testPod("p", func(p *v1.Pod) {
			requiresNodes("a")(p)
			term := &p.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0]
			term.MatchFields = append(term.MatchFields, v1.NodeSelectorRequirement{Key: metav1.ObjectNameField, Operator: v1.NodeSelectorOpIn, Values: []string{"b"}})
		}), "0/1 nodes are available: pod affinity terms conflict." + useless1},
		{"may not preempt", []*v1.Node{testNode("a")}, []*v1.Pod{testPod("q", onNode("a"), asks("cpu", "3"))},
			testPod("p", priority(10), asks("cpu", "2"), func(p *v1.Pod) { p.Spec.PreemptionPolicy = &never }),
			"0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."},
		{"preempts", []*v1.Node{testNode("a")}, []*v1.Pod{testPod("q", onNode("a"), asks("cpu", "3"))}, testPod("p", priority(10), asks("cpu", "2")),
			"0/1 nodes are available: 1 Insufficient cpu."},
		{"even without lower priorities it does not fit", []*v1.Node{testNode("a")},
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "1")), testPod("r", onNode("a"), priority(20), asks("cpu", "3"))}, testPod("p", priority(10), asks("cpu", "2")),
			"0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: 1 Insufficient cpu."},
		{"fits", []*v1.Node{testNode("a")}, nil, testPod("p"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testSnapshot(c.nodes, c.pods...)
			x := newSearcher(1)
			p := newPendingPod(c.pod)
			chosen, d := x.decide(p, s)
			if chosen != nil {
				if c.want != "" {
					t.Fatalf("scheduled to %s, want %q", chosen.name, c.want)
				}
				return
			}
			if d.nodes > 0 {
				x.preempt(p, s, d, nil, nil, time.Now())
			}
			if got := d.message(); got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestPreemptionDoesTheLeastHarm(t *testing.T) {
	started := func(ago time.Duration) podOption {
		return func(p *v1.Pod) { p.Status.StartTime = &metav1.Time{Time: time.Unix(1e9, 0).Add(-ago)} }
	}
	app := func(p *v1.Pod) { p.Labels = map[string]string{"app": "kept"} }
	budget := &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default"},
		Spec:       policyv1.PodDisruptionBudgetSpec{MinAvailable: &intstr.IntOrString{IntVal: 1}, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "kept"}}},
	}
	nodes := []*v1.Node{testNode("a"), testNode("b")}
	for _, c := range []struct {
		name    string
		pods    []*v1.Pod
		node    string
		victims []string
	}{
		{"lower priority goes first",
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "4"), priority(5)), testPod("r", onNode("b"), asks("cpu", "4"), priority(1))}, "b", []string{"r"}},
		{"a budget outweighs priority",
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "4"), priority(5)), testPod("r", onNode("b"), asks("cpu", "4"), priority(1), app)}, "a", []string{"q"}},
		{"fewer pods",
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "2")), testPod("r", onNode("a"), asks("cpu", "2")), testPod("s", onNode("b"), asks("cpu", "4"))}, "b", []string{"s"}},
		{"the younger one",
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "4"), started(time.Hour)), testPod("r", onNode("b"), asks("cpu", "4"), started(time.Minute))}, "b", []string{"r"}},
		{"no more than needed",
			[]*v1.Pod{testPod("q", onNode("a"), asks("cpu", "4"), priority(9)), testPod("r", onNode("b"), asks("cpu", "1"), priority(2)),
				testPod("s", onNode("b"), asks("cpu", "3"), priority(1))}, "b", []string{"s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testSnapshot(nodes, c.pods...)
			x := newSearcher(1)
			p := newPendingPod(testPod("p", priority(10), asks("cpu", "3")))
			_, d := x.decide(p, s)
			room := x.preempt(p, s, d, []*policyv1.PodDisruptionBudget{budget}, nil, time.Unix(1e9, 0))
			if room == nil {
				t.Fatalf("no room was made: %s", d.message())
			}
			var victims []string
			for _, v := range room.victims {
				victims = append(victims, v.key.Name)
			}
			if room.node.name != c.node || len(victims) != len(c.victims) || victims[0] != c.victims[0] {
				t.Errorf("got %v from %s, want %v from %s", victims, room.node.name, c.victims, c.node)
			}
		})
	}
}

func TestNominatedPodsKeepTheirRoom(t *testing.T) {
	s := testSnapshot([]*v1.Node{testNode("a")})
	x := newSearcher(1)
	waiting := newPendingPod(testPod("waiting", priority(10), asks("cpu", "4")))
	s.nominate(waiting, "a")
	if n, _ := x.decide(newPendingPod(testPod("low", asks("cpu", "1"))), s); n != nil {
		t.Error("a pod of lower priority took room that is kept for another")
	}
	if n, _ := x.decide(newPendingPod(testPod("high", priority(20), asks("cpu", "1"))), s); n == nil {
		t.Error("a pod of higher priority was kept out")
	}
	if n, _ := x.decide(waiting, s); n == nil {
		t.Error("a pod was kept out by its own nomination")
	}
}

func TestSearchVisitsAllNodesInTurn(t *testing.T) {
	s := testSnapshot(numbered(1000, func(i int) *v1.Node { return testNode(name("n", i)) }))
	x := newSearcher(1)
	seen := map[string]bool{}
	for range 10 {
		x.search(x.ask(newPendingPod(testPod("p")), s))
		for _, n := range x.feasible {
			seen[n.name] = true
		}
	}
	if len(seen) != 1000 {
		t.Errorf("ten searches saw %d of 1000 nodes", len(seen))
	}
}
