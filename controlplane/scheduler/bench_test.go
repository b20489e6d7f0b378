// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"log/slog"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

const (
	benchNodes = 5000
	benchPods  = 10000
)

func benchSnapshot(count int) *snapshot {
	return testSnapshot(numbered(count, func(i int) *v1.Node {
		return testNode(name("node", i), gives("cpu", "32", "memory", "128Gi"), labelled(v1.LabelTopologyZone, name("zone", i%3)))
	}))
}

// BenchmarkDecide is the cost of one decision with its accounting, per pod; b.N pods of the same
// kind are placed, the oldest going when there are 10,000. The rate of decisions must not
// depend on the number of nodes.
func BenchmarkDecide(b *testing.B) {
	for _, nodes := range []int{100, 1000, benchNodes} {
		for kind, options := range map[string][]podOption{
			"plain":    {asks("cpu", "100m", "memory", "128Mi")},
			"replicas": {asks("cpu", "100m", "memory", "128Mi"), ownedBy("rs"), hasLabels("app", "a")},
			"spread":   {asks("cpu", "100m", "memory", "128Mi"), hasLabels("app", "a"), spreads(1, v1.LabelTopologyZone, "a"), spreads(5, v1.LabelHostname, "a")},
			"near":     {asks("cpu", "100m", "memory", "128Mi"), hasLabels("app", "a"), nearTo(v1.LabelTopologyZone, "a")},
			"selector": {asks("cpu", "100m"), selects(v1.LabelTopologyZone, "zone-1")},
			"daemon":   {asks("cpu", "10m"), requiresNodes("node-7")},
		} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind, nodes), func(b *testing.B) {
				s, x := benchSnapshot(nodes), newSearcher(1)
				s.workloads.setController(workloadKey{"apps/v1/ReplicaSet", "default", "rs"}, labels.SelectorFromSet(labels.Set{"app": "a"}))
				live := min(benchPods, nodes*20)
				if kind == "daemon" {
					live = 100
				}
				pods := numbered(live, func(i int) *pod { return newPendingPod(testPod(name("p", i), options...)) })
				benchPlace(b, s, x, pods)
			})
		}
	}
}

// benchPlace decides on the pods in turn, each time taking the pod off its last node first.
func benchPlace(b *testing.B, s *snapshot, x *searcher, pods []*pod) {
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		p := pods[i%len(pods)]
		s.removePod(p.uid)
		n, d := x.decide(p, s)
		if n == nil {
			b.Fatal(d.message())
		}
		s.setPod(p, n.name)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pods/s")
}

// BenchmarkApart is the cost of one decision for pods that keep apart by host, 100 to an application, as
// many applications as fill every node with ten such pods.
func BenchmarkApart(b *testing.B) {
	for _, nodes := range []int{100, 1000, benchNodes} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			s, x := benchSnapshot(nodes), newSearcher(1)
			pods := numbered(nodes*10, func(i int) *pod {
				app := name("app", i/100)
				return newPendingPod(testPod(name("p", i), asks("cpu", "100m"), hasLabels("app", app), apartFrom(v1.LabelHostname, app)))
			})
			benchPlace(b, s, x, pods)
		})
	}
}

// BenchmarkPreempt is the cost of finding that a pod fits nowhere and whom to ask to go: all nodes are
// full of pods of lower priority, ten on each.
func BenchmarkPreempt(b *testing.B) {
	for _, nodes := range []int{100, 1000, benchNodes} {
		for kind, options := range map[string][]podOption{
			"plain": {asks("cpu", "4")},
			"apart": {asks("cpu", "4"), hasLabels("app", "a"), apartFrom(v1.LabelHostname, "a")},
		} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind, nodes), func(b *testing.B) {
				s, x := benchSnapshot(nodes), newSearcher(1)
				for i := range nodes * 10 {
					s.setPod(newPod(testPod(name("low", i), asks("cpu", "3200m"), hasLabels("app", "b"))), name("node", i%nodes))
				}
				p := newPendingPod(testPod("high", append(options, priority(9))...))
				b.ReportAllocs()
				b.ResetTimer()
				for b.Loop() {
					_, d := x.decide(p, s)
					if room := x.preempt(p, s, d, nil, nil, someTime); room == nil || len(room.victims) != 2 {
						b.Fatal(d.message())
					}
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pods/s")
			})
		}
	}
}

// BenchmarkFull is the cost of finding that a pod fits on none of 5,000 nodes, with the reasons.
func BenchmarkFull(b *testing.B) {
	s, x := benchSnapshot(benchNodes), newSearcher(1)
	p := newPendingPod(testPod("p", asks("cpu", "64")))
	b.ReportAllocs()
	for b.Loop() {
		if n, d := x.decide(p, s); n != nil || d.message() == "" {
			b.Fatal("it fits")
		}
	}
}

// BenchmarkSchedule takes 10,000 pods through handlers, queue and decisions onto 5,000 nodes, all
// but the API calls.
func BenchmarkSchedule(b *testing.B) {
	objects := numbered(benchPods, func(i int) *v1.Pod {
		return testPod(name("p", i), asks("cpu", "100m", "memory", "128Mi"), ownedBy(name("rs", i/100)))
	})
	nodes := numbered(benchNodes, func(i int) *v1.Node { return testNode(name("node", i), gives("cpu", "32", "memory", "128Gi")) })
	client := fake.NewClientset()
	b.ReportAllocs()
	scheduled := 0
	for b.Loop() {
		b.StopTimer()
		s, err := newScheduler(Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler)},
			noEvents)
		if err != nil {
			b.Fatal(err)
		}
		for _, n := range nodes {
			s.onNode(nil, n)
		}
		b.StartTimer()
		for _, p := range objects {
			s.onPod(nil, p)
		}
		for {
			item, _ := s.queue.pop(s.now())
			if item == nil {
				break
			}
			n, d := s.search.decide(item.pod, s.snapshot)
			if n == nil {
				b.Fatal(d.message())
			}
			if _, err := s.assume(item, n); err != nil {
				b.Fatal(err)
			}
			scheduled++
		}
	}
	b.ReportMetric(float64(scheduled)/b.Elapsed().Seconds(), "pods/s")
}
