// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"pgregory.net/rapid"
)

// world is what the API server would know, kept apart from what the scheduler believes.
type world struct {
	nodes map[string]*v1.Node
	pods  map[string]*v1.Pod // by name
}

// TestNeverOvercommits sends random events, in an order that the API allows, with bindings that
// succeed, fail, or are seen late, and checks after each step that the snapshot is what the world
// plus assumptions add up to, and that no decision exceeds what a node has.
func TestNeverOvercommits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		client := fake.NewClientset()
		s, err := newScheduler(Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler)},
			noEvents)
		if err != nil {
			t.Fatal(err)
		}
		clock := time.Unix(0, 0)
		s.now = func() time.Time { return clock }
		w := world{map[string]*v1.Node{}, map[string]*v1.Pod{}}
		decided := map[string]*pending{} // by pod name, not yet written
		created := 0
		cpus := rapid.IntRange(0, 4)
		pick := func(t *rapid.T, names []string) string {
			if len(names) == 0 {
				t.Skip("none there")
			}
			slices.Sort(names)
			return rapid.SampledFrom(names).Draw(t, "name")
		}
		podNames := func(keep func(*v1.Pod) bool) (names []string) {
			for name, p := range w.pods {
				if keep(p) {
					names = append(names, name)
				}
			}
			return names
		}
		update := func(name string, change func(*v1.Pod)) {
			before := w.pods[name]
			after := before.DeepCopy()
			change(after)
			w.pods[name] = after
			s.onPod(before, after)
		}
		t.Repeat(map[string]func(*rapid.T){
			"node": func(t *rapid.T) {
				name := fmt.Sprintf("n%d", rapid.IntRange(0, 3).Draw(t, "node"))
				object := testNode(name, gives("cpu", fmt.Sprint(4+cpus.Draw(t, "cpu")), "pods", "5"))
				if old := w.nodes[name]; old != nil && old.Status.Allocatable.Cpu().Cmp(*object.Status.Allocatable.Cpu()) > 0 {
					t.Skip("a node that shrinks may be overdrawn by what it has")
				}
				for _, item := range decided {
					if w.nodes[name] == nil && item.pod.node == name {
						t.Skip("a node that comes back smaller may be overdrawn by what was decided before")
					}
				}
				s.onNode(w.nodes[name], object)
				w.nodes[name] = object
			},
			"node goes": func(t *rapid.T) {
				name := pick(t, slices.Collect(maps.Keys(w.nodes)))
				s.onNodeGone(w.nodes[name])
				delete(w.nodes, name)
				// The pod collector removes its pods before a node of that name could come back smaller.
				for _, p := range podNames(func(p *v1.Pod) bool { return p.Spec.NodeName == name }) {
					s.onPodGone(w.pods[p])
					delete(w.pods, p)
				}
			},
			"pod": func(t *rapid.T) {
				created++
				p := testPod(fmt.Sprintf("p%d", created), asks("cpu", fmt.Sprint(cpus.Draw(t, "cpu"))), priority(int32(rapid.IntRange(0, 2).Draw(t, "priority"))))
				if rapid.Bool().Draw(t, "port") {
					usesPort("", int32(rapid.IntRange(80, 81).Draw(t, "number")))(p)
				}
				w.pods[p.Name] = p
				s.onPod(nil, p)
			},
			"pod goes": func(t *rapid.T) {
				name := pick(t, podNames(func(*v1.Pod) bool { return true }))
				s.onPodGone(w.pods[name])
				delete(w.pods, name)
			},
			"pod ends": func(t *rapid.T) {
				update(pick(t, podNames(func(p *v1.Pod) bool { return p.Spec.NodeName != "" })), func(p *v1.Pod) { p.Status.Phase = v1.PodSucceeded })
			},
			"time": func(t *rapid.T) { clock = clock.Add(5 * time.Second) },
			"decide": func(t *rapid.T) {
				s.mu.Lock()
				defer s.mu.Unlock()
				item, _ := s.queue.pop(clock)
				if item == nil {
					t.Skip("nothing to decide")
				}
				n, d := s.search.decide(item.pod, s.snapshot)
				if n == nil {
					// Without acting on preemptions: victims are not asked to go here.
					_ = d.message()
					s.queue.sleep(item, d.blockers, clock)
					return
				}
				if _, err := s.assume(item, n); err != nil {
					t.Fatal(err)
				}
				decided[item.pod.key.Name] = item
			},
			"bound": func(t *rapid.T) {
				name := pick(t, slices.Collect(maps.Keys(decided)))
				item := decided[name]
				delete(decided, name)
				s.mu.Lock()
				delete(s.binding, item.pod.uid)
				s.mu.Unlock()
				if w.pods[name] == nil {
					s.forget(item, nil, true)
					return
				}
				if w.nodes[item.pod.node] == nil {
					s.forget(item, w.pods[name], true)
					return
				}
				update(name, func(p *v1.Pod) { p.Spec.NodeName = item.pod.node })
			},
			"not bound": func(t *rapid.T) {
				name := pick(t, slices.Collect(maps.Keys(decided)))
				item := decided[name]
				delete(decided, name)
				s.forget(item, w.pods[name], true)
			},
			"": func(t *rapid.T) {
				if err := consistent(s, w, decided); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
}

// consistent compares the incremental sums with sums made anew.
func consistent(s *Scheduler, w world, decided map[string]*pending) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var pods []*v1.Pod
	for _, p := range w.pods {
		placed := p.DeepCopy()
		if item := decided[p.Name]; item != nil && p.Spec.NodeName == "" {
			placed.Spec.NodeName = item.pod.node
		}
		if placed.Spec.NodeName != "" && !finished(placed) {
			pods = append(pods, placed)
		}
	}
	fresh := testSnapshot(slices.Collect(maps.Values(w.nodes)), pods...)
	if len(s.snapshot.nodes) != len(fresh.nodes) || len(s.snapshot.pods) != len(fresh.pods) {
		return fmt.Errorf("%d nodes and %d pods are accounted, there are %d and %d", len(s.snapshot.nodes), len(s.snapshot.pods), len(fresh.nodes), len(fresh.pods))
	}
	for i, n := range s.snapshot.nodes {
		if n.position != i {
			return fmt.Errorf("%s believes to be at %d, is at %d", n.name, n.position, i)
		}
		want := fresh.byName[n.name]
		if n.requested.milliCPU != want.requested.milliCPU || n.requested.memory != want.requested.memory || n.scoredCPU != want.scoredCPU ||
			len(n.pods) != len(want.pods) || !maps.Equal(n.ports, want.ports) {
			return fmt.Errorf("%s: sums %+v %v, want %+v %v", n.name, n.requested, n.ports, want.requested, want.ports)
		}
		if n.requested.milliCPU > n.allocatable.milliCPU || len(n.pods) > n.maxPods {
			return fmt.Errorf("%s is over-committed: %d of %d millicores, %d of %d pods", n.name, n.requested.milliCPU, n.allocatable.milliCPU, len(n.pods), n.maxPods)
		}
		for port, count := range n.ports {
			if count > 1 {
				return fmt.Errorf("%s: port %v is taken %d times", n.name, port, count)
			}
		}
	}
	for _, p := range w.pods {
		// Every pod without a node is somewhere: queued, or decided on.
		if p.Spec.NodeName == "" && s.queue.byUID[p.UID] == nil && s.binding[p.UID] == nil {
			return errors.New(p.Name + " was lost")
		}
	}
	return nil
}

// TestNobodySleepsWhileFitting: after any events, no sleeping pod fits anywhere.
func TestNobodySleepsWhileFitting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		client := fake.NewClientset()
		s, err := newScheduler(Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler)},
			noEvents)
		if err != nil {
			t.Fatal(err)
		}
		nodes, bound, spaces := map[string]*v1.Node{}, map[string]*v1.Pod{}, map[string]*v1.Namespace{}
		created := 0
		newPod := func(t *rapid.T) *v1.Pod {
			created++
			p := drawPod(t, fmt.Sprintf("p%d", created))
			p.DeletionTimestamp = nil
			asks("cpu", fmt.Sprint(rapid.IntRange(1, 3).Draw(t, "cpu")))(p)
			return p
		}
		t.Repeat(map[string]func(*rapid.T){
			"node": func(t *rapid.T) {
				object := drawNode(t)
				gives("cpu", fmt.Sprint(rapid.IntRange(1, 6).Draw(t, "cpu")))(object)
				s.onNode(nodes[object.Name], object)
				nodes[object.Name] = object
			},
			"node goes": func(t *rapid.T) {
				name := drawKey(t, nodes)
				s.onNodeGone(nodes[name])
				delete(nodes, name)
			},
			"namespace": func(t *rapid.T) {
				object := &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: rapid.SampledFrom(testNamespaces).Draw(t, "namespace"),
					Labels: map[string]string{"team": rapid.SampledFrom([]string{"x", "y"}).Draw(t, "team")}}}
				s.onNamespace(spaces[object.Name], object)
				spaces[object.Name] = object
			},
			"pod": func(t *rapid.T) { s.onPod(nil, newPod(t)) },
			"bound pod": func(t *rapid.T) {
				p := newPod(t)
				p.Spec.NodeName = drawNodeName(t)
				bound[p.Name] = p
				s.onPod(nil, p)
			},
			"relabel": func(t *rapid.T) {
				name := drawKey(t, bound)
				after := bound[name].DeepCopy()
				hasLabels("app", drawApp(t))(after)
				s.onPod(bound[name], after)
				bound[name] = after
			},
			"pod terminates": func(t *rapid.T) {
				name := drawKey(t, bound)
				after := bound[name].DeepCopy()
				after.DeletionTimestamp = &metav1.Time{Time: someTime}
				s.onPod(bound[name], after)
				bound[name] = after
			},
			"pod goes": func(t *rapid.T) {
				name := drawKey(t, bound)
				s.onPodGone(bound[name])
				delete(bound, name)
			},
			"decide": func(t *rapid.T) {
				s.mu.Lock()
				defer s.mu.Unlock()
				for {
					item, _ := s.queue.pop(s.now())
					if item == nil {
						return
					}
					n, d := s.search.decide(item.pod, s.snapshot)
					if n == nil {
						s.queue.sleep(item, d.blockers, s.now())
						continue
					}
					if _, err := s.assume(item, n); err != nil {
						t.Fatal(err)
					}
					delete(s.binding, item.pod.uid)
				}
			},
			"": func(t *rapid.T) {
				for _, item := range s.queue.asleep {
					if n, _ := s.search.decide(item.pod, s.snapshot); n != nil {
						t.Fatalf("%s sleeps, but fits on %s", item.pod.key, n.name)
					}
				}
			},
		})
	})
}
