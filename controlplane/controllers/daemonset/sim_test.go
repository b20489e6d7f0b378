// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
	"pgregory.net/rapid"
)

// world is an API server, a scheduler and some kubelets, in a few lines.
type world struct {
	ds    *appsv1.DaemonSet
	nodes map[string]*corev1.Node
	pods  map[string]*corev1.Pod
	hash  string
	clock time.Time
	next  int
	waits *backOff
}

func newWorld(ds *appsv1.DaemonSet, nodes int) *world {
	w := &world{ds: ds, nodes: map[string]*corev1.Node{}, pods: map[string]*corev1.Pod{}, hash: "h1", clock: now, waits: newBackOff()}
	for range nodes {
		w.addNode()
	}
	return w
}

func (w *world) addNode() {
	w.next++
	n := node(fmt.Sprint("n", w.next))
	w.nodes[n.Name] = n
}

func (w *world) snapshot() Snapshot {
	s := Snapshot{DaemonSet: w.ds, Hash: w.hash, BackOff: func(node string) time.Duration { return w.waits.remaining(placeOf(w.ds, node), w.clock) }}
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		s.Nodes = append(s.Nodes, w.nodes[name])
	}
	for _, name := range slices.Sorted(maps.Keys(w.pods)) {
		s.Pods = append(s.Pods, w.pods[name])
	}
	return s
}

// sync does what the controller does with a plan. It reports whether anything was written.
func (w *world) sync() bool {
	plan := Compute(w.snapshot(), w.clock)
	for _, name := range plan.Create {
		w.next++
		p := pod(fmt.Sprint("p", w.next), name, unbound)
		p.CreationTimestamp.Time = w.clock.Add(time.Duration(w.next) * time.Millisecond)
		p.Labels[appsv1.ControllerRevisionHashLabelKey] = w.hash
		w.pods[p.Name] = p
	}
	for _, p := range plan.Delete {
		if p.Status.Phase == corev1.PodFailed {
			w.waits.replaced(placeOf(w.ds, p.Spec.NodeName), w.clock)
		}
		w.change(p.Name, terminating)
	}
	status := Status(w.snapshot(), true, w.clock)
	changed := fmt.Sprint(status) != fmt.Sprint(w.ds.Status)
	w.ds = w.ds.DeepCopy()
	w.ds.Status = status
	return changed || len(plan.Create)+len(plan.Delete) > 0
}

// change replaces a pod by a changed one: those in the cache are never changed.
func (w *world) change(name string, change podOption) {
	p := w.pods[name].DeepCopy()
	change(p)
	w.pods[name] = p
}

func (w *world) bindAndStart(name string) {
	w.change(name, func(p *corev1.Pod) {
		target, _ := util.GetTargetNodeName(p)
		if w.nodes[target] == nil || p.Status.Phase == corev1.PodFailed {
			return
		}
		p.Spec.NodeName = target
		p.Status = pod("", target).Status
		p.Status.Conditions[0].LastTransitionTime.Time = w.clock
	})
}

func (w *world) setImage(hash string) {
	w.ds = w.ds.DeepCopy()
	w.ds.Generation++
	w.hash = hash
}

// wanted are the nodes that should have a pod, available those of them that have an available one, doubled those with
// an available old one and a new one that is not available yet.
func (w *world) count() (wanted, available, doubled int) {
	fit := newFit(w.ds)
	for _, n := range w.nodes {
		if start, _ := fit.on(n); !start {
			continue
		}
		wanted++
		var isAvailable, old, rising bool
		for _, p := range w.pods {
			target, _ := util.GetTargetNodeName(p)
			if target != n.Name || p.DeletionTimestamp != nil {
				continue
			}
			ready := podutil.IsPodReady(p)
			isAvailable = isAvailable || ready
			switch current := p.Labels[appsv1.ControllerRevisionHashLabelKey] == w.hash; {
			case !current && ready:
				old = true
			case current && !ready && p.Status.Phase != corev1.PodFailed:
				rising = true
			}
		}
		if isAvailable {
			available++
		}
		if old && rising {
			doubled++
		}
	}
	return wanted, available, doubled
}

// most is the largest number of pods, other than leaving and ended ones, that any node has.
func (w *world) most() (most int) {
	on := map[string]int{}
	for _, p := range w.pods {
		if target, _ := util.GetTargetNodeName(p); p.DeletionTimestamp == nil && !podutil.IsPodTerminal(p) {
			on[target]++
			most = max(most, on[target])
		}
	}
	return most
}

func (w *world) drawPod(t *rapid.T) string {
	if len(w.pods) == 0 {
		return ""
	}
	return rapid.SampledFrom(slices.Sorted(maps.Keys(w.pods))).Draw(t, "pod")
}

// happen is one event that is not the controller's doing.
func (w *world) happen(t *rapid.T) {
	name := w.drawPod(t)
	switch rapid.IntRange(0, 11).Draw(t, "event") {
	case 0, 1, 2, 3:
		if name != "" && w.pods[name].DeletionTimestamp == nil {
			w.bindAndStart(name)
		}
	case 4, 5:
		if name != "" && w.pods[name].DeletionTimestamp != nil {
			delete(w.pods, name)
		}
	case 6:
		if name != "" && w.pods[name].Spec.NodeName != "" {
			w.change(name, rapid.SampledFrom([]podOption{unready, failed, succeeded, terminating}).Draw(t, "fate"))
		}
	case 7:
		w.setImage(fmt.Sprintf("h%d", rapid.IntRange(1, 4).Draw(t, "template")))
	case 8:
		w.addNode()
	case 9:
		if len(w.nodes) > 0 {
			n := rapid.SampledFrom(slices.Sorted(maps.Keys(w.nodes))).Draw(t, "node")
			delete(w.nodes, n)
			for name, p := range w.pods { // by the garbage collector
				if p.Spec.NodeName == n {
					delete(w.pods, name)
				}
			}
		}
	case 10:
		if len(w.nodes) > 0 {
			n := w.nodes[rapid.SampledFrom(slices.Sorted(maps.Keys(w.nodes))).Draw(t, "node")].DeepCopy()
			n.Spec.Taints = nil
			if effect := rapid.SampledFrom([]corev1.TaintEffect{"", corev1.TaintEffectNoSchedule, corev1.TaintEffectNoExecute}).Draw(t, "effect"); effect != "" {
				taint("t", effect)(n)
			}
			w.nodes[n.Name] = n
		}
	case 11:
		w.clock = w.clock.Add(time.Duration(rapid.IntRange(0, 30).Draw(t, "seconds")) * time.Second)
	}
}

// settle lets everybody finish.
func (w *world) settle(t interface {
	Helper()
	Fatalf(string, ...any)
}) {
	t.Helper()
	for range 500 {
		changed := w.sync()
		for _, name := range slices.Sorted(maps.Keys(w.pods)) {
			switch p := w.pods[name]; {
			case p.DeletionTimestamp != nil:
				delete(w.pods, name)
				changed = true
			case p.Status.Phase == corev1.PodFailed:
				changed = true // waits
			case !podutil.IsPodReady(p):
				w.bindAndStart(name)
				changed = true
			}
		}
		w.clock = w.clock.Add(lastBackOff)
		if !changed {
			return
		}
	}
	t.Fatalf("the daemon set does not settle: %+v", w.ds.Status)
}

// Whatever happens, no node has two pods (three with surge), a rollout takes no more pods away than it may, begins no
// more beside running ones than it may, and in the end every node that fits has one pod of the last template.
func TestKeepsItsBoundsAndConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		surge, unavailable := 0, 0
		percent := func(n int) intstr.IntOrString { return intstr.FromString(fmt.Sprintf("%d%%", n)) }
		bound := func(name string) intstr.IntOrString {
			if rapid.Bool().Draw(t, name+" in percent") {
				return percent(rapid.IntRange(1, 100).Draw(t, name))
			}
			return intstr.FromInt32(int32(rapid.IntRange(1, 3).Draw(t, name)))
		}
		option := bounds(intstr.FromInt32(0), bound("unavailable"))
		if rapid.Bool().Draw(t, "surges") {
			option = bounds(bound("surge"), intstr.FromInt32(0))
		}
		w := newWorld(daemonSet(option), rapid.IntRange(0, 8).Draw(t, "nodes"))
		w.settle(t)
		for i := range rapid.IntRange(0, 80).Draw(t, "steps") {
			if rapid.IntRange(0, 2).Draw(t, "syncs") > 0 {
				w.happen(t)
				continue
			}
			wanted, before, doubledBefore := w.count()
			var err error
			if surge, err = util.SurgeCount(w.ds, wanted); err != nil {
				t.Fatal(err)
			}
			if unavailable, err = util.UnavailableCount(w.ds, wanted); err != nil {
				t.Fatal(err)
			}
			w.sync()
			_, after, doubled := w.count()
			if least := min(before, wanted-unavailable); after < least {
				t.Fatalf("step %d: %d of %d nodes have an available pod after %d, at least %d promised", i, after, wanted, before, least)
			}
			if doubled > max(surge, doubledBefore) {
				t.Fatalf("step %d: %d nodes have two pods after %d, at most %d allowed", i, doubled, doubledBefore, surge)
			}
			if most := w.most(); most > 2 || most > 1 && !util.AllowsSurge(w.ds) {
				t.Fatalf("step %d: a node has %d pods", i, most)
			}
		}
		w.settle(t)
		fit := newFit(w.ds)
		on := map[string]int{}
		for _, p := range w.pods {
			on[p.Spec.NodeName]++
			n := w.nodes[p.Spec.NodeName]
			if n == nil {
				t.Fatalf("pod %s is on node %q, which is gone", p.Name, p.Spec.NodeName)
			}
			start, stay := fit.on(n)
			if !stay || start && p.Labels[appsv1.ControllerRevisionHashLabelKey] != w.hash {
				t.Fatalf("pod %s of %s may not stay on node %s", p.Name, p.Labels[appsv1.ControllerRevisionHashLabelKey], n.Name)
			}
		}
		wanted, available, _ := w.count()
		for _, n := range w.nodes {
			if start, _ := fit.on(n); on[n.Name] > 1 || start && on[n.Name] != 1 {
				t.Fatalf("node %s has %d pods", n.Name, on[n.Name])
			}
		}
		if s := w.ds.Status; available != wanted || int(s.NumberAvailable) != wanted || int(s.UpdatedNumberScheduled) != wanted || s.NumberUnavailable != 0 {
			t.Fatalf("%d of %d are available: %+v", available, wanted, s)
		}
	})
}
