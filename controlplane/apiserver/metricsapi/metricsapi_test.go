// SPDX-License-Identifier: Apache-2.0

package metricsapi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes/fake"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/metrics/pkg/apis/metrics"
)

var t0 = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }

// counted is a container's entry: processor seconds since it began, and bytes.
func counted(name string, began time.Time, cpu float64, memory uint64) stats.ContainerStats {
	ns := uint64(cpu * 1e9)
	return stats.ContainerStats{Name: name, StartTime: metav1.NewTime(began), CPU: &stats.CPUStats{UsageCoreNanoSeconds: &ns}, Memory: &stats.MemoryStats{WorkingSetBytes: &memory}}
}

func pod(name string, containers ...stats.ContainerStats) stats.PodStats {
	return stats.PodStats{PodRef: stats.PodReference{Namespace: "ns", Name: name, UID: "uid-" + name}, Containers: containers}
}

func summaryOf(nodeCPU float64, pods ...stats.PodStats) *stats.Summary {
	ns, memory := uint64(nodeCPU*1e9), uint64(1<<30)
	return &stats.Summary{Node: stats.NodeStats{CPU: &stats.CPUStats{UsageCoreNanoSeconds: &ns}, Memory: &stats.MemoryStats{WorkingSetBytes: &memory}}, Pods: pods}
}

func TestRates(t *testing.T) {
	const half, tenth = 500_000_000, 100_000_000
	name := types.NamespacedName{Namespace: "ns", Name: "p"}
	renamed := pod("p", counted("c", at(9), 1, 7))
	renamed.PodRef.UID = "another"
	tests := []struct {
		name          string
		before, after *stats.Summary
		want          map[string]use
	}{
		{"the difference over the window", summaryOf(0, pod("p", counted("c", at(-100), 40, 5))), summaryOf(0, pod("p", counted("c", at(-100), 45, 7))), map[string]use{"c": {half, 7}}},
		{"idle", summaryOf(0, pod("p", counted("c", at(-100), 40, 5))), summaryOf(0, pod("p", counted("c", at(-100), 40, 7))), map[string]use{"c": {0, 7}}},
		{"new ones are averaged over their lives", summaryOf(0), summaryOf(0, pod("p", counted("c", at(6), 0.4, 7))), map[string]use{"c": {tenth, 7}}},
		{"which last a second at least", summaryOf(0), summaryOf(0, pod("p", counted("c", at(10), 0.1, 7))), map[string]use{"c": {tenth, 7}}},
		{"so are those that began anew", summaryOf(0, pod("p", counted("c", at(-100), 40, 5))), summaryOf(0, pod("p", counted("c", at(6), 2, 7))), map[string]use{"c": {half, 7}}},
		{"another pod of that name is another pod", summaryOf(0, pod("p", counted("c", at(-100), 0.5, 5))), summaryOf(0, renamed), map[string]use{"c": {2 * half, 7}}},
		{"each container by itself", summaryOf(0, pod("p", counted("c", at(-1), 0, 1), counted("d", at(-1), 1, 1))), summaryOf(0, pod("p", counted("c", at(-1), 5, 1), counted("d", at(-1), 2, 1))), map[string]use{"c": {half, 1}, "d": {tenth, 1}}},
		{"what does not count is left out", summaryOf(0), summaryOf(0, pod("p", stats.ContainerStats{Name: "c"})), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := rates(reading{at(0), tt.before}, reading{at(10), tt.after})
			if d := cmp.Diff(tt.want, u.pods[name], cmp.AllowUnexported(use{})); d != "" {
				t.Errorf("usage (-want +got):\n%s", d)
			}
			if u.window != 10*time.Second || !u.at.Equal(at(10)) {
				t.Errorf("window %v at %v", u.window, u.at)
			}
		})
	}
	if u := rates(reading{at(0), summaryOf(100)}, reading{at(10), summaryOf(115)}); u.node == nil || u.node.cpu != 3*half || u.node.memory != 1<<30 {
		t.Errorf("node uses %+v", u.node)
	}
	if u := rates(reading{at(0), &stats.Summary{}}, reading{at(10), &stats.Summary{}}); u.node != nil || len(u.pods) != 0 {
		t.Errorf("a node that does not count uses %+v", u)
	}
}

// clockwork is a node whose counters go up by one processor second a second, in a time that only passes by waiting.
type clockwork struct {
	mu    sync.Mutex
	t     time.Time
	reads int
	waits []time.Duration
	err   error
}

func (c *clockwork) source() *source {
	s := newSource(func(context.Context, string) (*stats.Summary, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.reads++
		return summaryOf(c.t.Sub(t0).Seconds()), c.err
	})
	s.now = func() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.t }
	s.wait = func(_ context.Context, d time.Duration) error {
		c.pass(d)
		c.waits = append(c.waits, d)
		return nil
	}
	return s
}

func (c *clockwork) pass(d time.Duration) {
	c.mu.Lock()
	c.t = c.t.Add(d)
	c.mu.Unlock()
}

func TestSource(t *testing.T) {
	c := &clockwork{t: t0}
	s := c.source()
	steps := []struct {
		name   string
		pass   time.Duration
		reads  int // so far
		waits  int // so far
		window time.Duration
	}{
		{"the first time there is nothing to compare with", 0, 2, 1, shortest},
		{"who asks again soon gets the same answer", fresh - 1, 2, 1, shortest},
		{"later one reading is compared with the last", 15 * time.Second, 3, 1, fresh - 1 + 15*time.Second},
		{"a window that is too long says nothing about now", longest + 1, 5, 2, shortest},
	}
	for _, st := range steps {
		c.pass(st.pass)
		all := s.usage(t.Context(), []string{"n"}, func(_ string, err error) { t.Error(err) })
		u := all["n"]
		if c.reads != st.reads || len(c.waits) != st.waits || u.window != st.window || u.node.cpu != 1e9 {
			t.Errorf("%s: %d reads, waits %v, window %v, usage %+v", st.name, c.reads, c.waits, u.window, u.node)
		}
	}
	// A node that does not answer is told of, and hurts no other.
	c.err = errors.New("down")
	c.pass(time.Hour)
	var failed []string
	if all := s.usage(t.Context(), []string{"n", "m"}, func(n string, _ error) { failed = append(failed, n) }); len(all) != 0 || len(failed) != 2 {
		t.Errorf("answers %v, failed %v", all, failed)
	}
	s.keep([]string{"m"})
	if len(s.nodes) != 1 {
		t.Errorf("%d nodes are remembered", len(s.nodes))
	}
}

// Those who ask at the same time share an answer.
func TestSourceShares(t *testing.T) {
	c := &clockwork{t: t0}
	s := c.source()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { s.usage(t.Context(), []string{"n"}, func(_ string, err error) { t.Error(err) }) })
	}
	wg.Wait()
	if c.reads != 2 {
		t.Errorf("the node was asked %d times", c.reads)
	}
}

func TestResources(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"zone": "a"}}}
	on := func(name, phase, where string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, Labels: map[string]string{"app": name}}, Spec: corev1.PodSpec{NodeName: where}, Status: corev1.PodStatus{Phase: corev1.PodPhase(phase)}}
	}
	client := fake.NewClientset(node, on("p", "Running", "n"), on("ended", "Succeeded", "n"), on("waits", "Pending", ""), on("lost", "Running", "gone"))
	s := newSource(func(_ context.Context, n string) (*stats.Summary, error) {
		if n != "n" {
			return nil, fmt.Errorf("node %s is down", n)
		}
		return summaryOf(1, pod("p", counted("c", t0, 3, 1<<20), counted("b", t0, 3, 1<<20)), pod("ended", counted("c", t0, 3, 1))), nil
	})
	s.now, s.wait = func() time.Time { return at(60) }, func(context.Context, time.Duration) error { return nil }
	silent := func(string, error) {}
	n, p := &nodes{client: client, source: s, failed: silent}, &pods{client: client, source: s, failed: silent}
	ctx := genericapirequest.WithNamespace(t.Context(), "ns")

	o, err := p.List(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	items := o.(*metrics.PodMetricsList).Items
	if len(items) != 1 || items[0].Name != "p" || items[0].Labels["app"] != "p" || len(items[0].Containers) != 2 || items[0].Containers[0].Name != "b" {
		t.Errorf("pods: %+v", items)
	}
	table, err := p.ConvertToTable(ctx, o, nil)
	if err != nil || len(table.Rows) != 1 || table.Rows[0].Cells[2] != "2Mi" {
		t.Errorf("table %+v, %v", table, err)
	}
	o, err = p.List(ctx, &internalversion.ListOptions{LabelSelector: labels.SelectorFromSet(labels.Set{"app": "other"})})
	if err != nil || len(o.(*metrics.PodMetricsList).Items) != 0 {
		t.Errorf("selected: %+v, %v", o, err)
	}
	for name, get := range map[string]func() error{
		"a pod that has ended":    func() error { _, err := p.Get(ctx, "ended", nil); return err },
		"a pod of a lost node":    func() error { _, err := p.Get(ctx, "lost", nil); return err },
		"a pod that is not there": func() error { _, err := p.Get(ctx, "none", nil); return err },
		"an unknown node":         func() error { _, err := n.Get(ctx, "none", nil); return err },
	} {
		if err := get(); !apierrors.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.Get(ctx, "p", nil); err != nil {
		t.Error(err)
	}
	o, err = n.List(t.Context(), nil)
	if err != nil || len(o.(*metrics.NodeMetricsList).Items) != 1 || o.(*metrics.NodeMetricsList).Items[0].Labels["zone"] != "a" {
		t.Errorf("nodes: %+v, %v", o, err)
	}
}
