// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
)

var now = time.Unix(1700000000, 0)

type setOption func(*appsv1.DaemonSet)

func daemonSet(options ...setOption) *appsv1.DaemonSet {
	one, zero := intstr.FromInt32(1), intstr.FromInt32(0)
	labels := map[string]string{"app": "log"}
	ds := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "log", UID: "ds", Generation: 3},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
				Type:          appsv1.RollingUpdateDaemonSetStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxUnavailable: &one, MaxSurge: &zero},
			},
		},
	}
	for _, option := range options {
		option(ds)
	}
	return ds
}

func onDelete(ds *appsv1.DaemonSet) {
	ds.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}
}

func bounds(surge, unavailable intstr.IntOrString) setOption {
	return func(ds *appsv1.DaemonSet) {
		ds.Spec.UpdateStrategy.RollingUpdate = &appsv1.RollingUpdateDaemonSet{MaxSurge: &surge, MaxUnavailable: &unavailable}
	}
}

func surging(n int32) setOption { return bounds(intstr.FromInt32(n), intstr.FromInt32(0)) }

func unavailable(n int32) setOption { return bounds(intstr.FromInt32(0), intstr.FromInt32(n)) }

type nodeOption func(*corev1.Node)

func node(name string, options ...nodeOption) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"disk": "fast"}}}
	for _, option := range options {
		option(n)
	}
	return n
}

func taint(key string, effect corev1.TaintEffect) nodeOption {
	return func(n *corev1.Node) {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: effect})
	}
}

func slow(n *corev1.Node) { n.Labels["disk"] = "slow" }

type podOption func(*corev1.Pod)

// pod is a pod of the former template that is available on a node.
func pod(name, node string, options ...podOption) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, UID: types.UID(name),
			Labels:            map[string]string{"app": "log", appsv1.ControllerRevisionHashLabelKey: "old"},
			CreationTimestamp: metav1.NewTime(now.Add(-time.Hour)),
		},
		Spec: corev1.PodSpec{NodeName: node, Affinity: util.ReplaceDaemonSetPodNodeNameNodeAffinity(nil, node)},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{
			{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now.Add(-time.Hour))},
		}},
	}
	for _, option := range options {
		option(p)
	}
	return p
}

func updated(p *corev1.Pod)     { p.Labels[appsv1.ControllerRevisionHashLabelKey] = "new" }
func unready(p *corev1.Pod)     { p.Status.Conditions = nil }
func failed(p *corev1.Pod)      { p.Status.Phase = corev1.PodFailed; unready(p) }
func succeeded(p *corev1.Pod)   { p.Status.Phase = corev1.PodSucceeded; unready(p) }
func unbound(p *corev1.Pod)     { p.Spec.NodeName = ""; p.Status.Phase = corev1.PodPending; unready(p) }
func terminating(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: now} }
func younger(p *corev1.Pod) {
	p.CreationTimestamp = metav1.NewTime(now.Add(-time.Minute))
	if len(p.Status.Conditions) > 0 {
		p.Status.Conditions[0].LastTransitionTime = metav1.NewTime(now.Add(-2 * time.Second))
	}
}

func names(pods []*corev1.Pod) string {
	var names []string
	for _, p := range pods {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func never(string) time.Duration { return 0 }

func TestCompute(t *testing.T) {
	nodes := []*corev1.Node{node("a"), node("b")}
	settled := func(p *appsv1.DaemonSet) {}
	for _, tt := range []struct {
		name    string
		set     setOption
		nodes   []*corev1.Node
		pods    []*corev1.Pod
		backOff time.Duration
		create  string
		remove  string
		requeue time.Duration
	}{
		{name: "one for every node", nodes: nodes, create: "a b"},
		{name: "only where there is none", nodes: nodes, pods: []*corev1.Pod{pod("p", "a", updated)}, create: "b"},
		{name: "an unbound pod counts for its node", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, unbound)}},
		{name: "a leaving pod holds its place", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, terminating)}},
		{name: "unless it has ended", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, failed, terminating)}, create: "a"},
		{name: "too many: the oldest stays", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated), pod("q", "a", updated, younger)}, remove: "q"},
		{name: "too many: the bound one stays", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, unbound), pod("q", "a", updated, younger)}, remove: "p"},
		{name: "too many: the one that works stays", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, unready), pod("q", "a", updated, younger)}, remove: "p"},
		{name: "a failed pod is replaced", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, failed)}, remove: "p"},
		{name: "but not too often", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, failed)}, backOff: time.Second, requeue: time.Second},
		{name: "so is one that ended well", nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, succeeded)}, backOff: time.Second, remove: "p"},
		{name: "a node is gone: who was bound is for others", pods: []*corev1.Pod{pod("p", "gone", updated), pod("q", "gone", updated, unbound)}, remove: "q"},
		{
			name: "not on a tainted node", nodes: []*corev1.Node{node("a", taint("t", corev1.TaintEffectNoSchedule))},
		},
		{
			name: "who is there stays", nodes: []*corev1.Node{node("a", taint("t", corev1.TaintEffectNoSchedule))},
			pods: []*corev1.Pod{pod("p", "a", updated)},
		},
		{
			name: "unless it may not stay", nodes: []*corev1.Node{node("a", taint("t", corev1.TaintEffectNoExecute))},
			pods: []*corev1.Pod{pod("p", "a", updated)}, remove: "p",
		},
		{
			name: "a label is gone", nodes: []*corev1.Node{node("a", slow), node("b")},
			set:  func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.NodeSelector = map[string]string{"disk": "fast"} },
			pods: []*corev1.Pod{pod("p", "a", updated)}, create: "b", remove: "p",
		},
		{
			name: "deleted", nodes: nodes,
			set: func(ds *appsv1.DaemonSet) { ds.DeletionTimestamp = &metav1.Time{Time: now} },
		},

		{name: "rollout: one at a time", nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("q", "b")}, remove: "p"},
		{name: "rollout: as many as allowed", set: unavailable(2), nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("q", "b")}, remove: "p q"},
		{name: "rollout: the new one is waited for", nodes: nodes, pods: []*corev1.Pod{pod("p", "a", updated, unready), pod("q", "b")}},
		{name: "rollout: the next", nodes: nodes, pods: []*corev1.Pod{pod("p", "a", updated), pod("q", "b")}, remove: "q"},
		{name: "rollout: what does not work goes first, all of it", nodes: append(nodes, node("c")), pods: []*corev1.Pod{pod("p", "a"), pod("q", "b", unready), pod("r", "c", unready)}, remove: "q r"},
		{
			name: "rollout: minReadySeconds count", nodes: nodes, pods: []*corev1.Pod{pod("p", "a", updated, younger), pod("q", "b")},
			set: func(ds *appsv1.DaemonSet) { ds.Spec.MinReadySeconds = 5 },
		},
		{name: "rollout: on delete nothing rolls", set: onDelete, nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("q", "b", unready)}},
		{name: "rollout: first everybody has one", nodes: nodes, pods: []*corev1.Pod{pod("p", "a")}, create: "b"},
		{
			name: "rollout: neither surge nor unavailability means one", nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("q", "b")},
			set: bounds(intstr.FromInt32(0), intstr.FromInt32(0)), remove: "p",
		},
		{
			name: "rollout: percent of nodes, rounded up", nodes: append(nodes, node("c")), pods: []*corev1.Pod{pod("p", "a"), pod("q", "b"), pod("r", "c")},
			set: bounds(intstr.FromInt32(0), intstr.FromString("34%")), remove: "p q",
		},

		{name: "surge: a second beside the first", set: surging(1), nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("q", "b")}, create: "a"},
		{name: "surge: waits", set: surging(1), nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("p2", "a", updated, unready), pod("q", "b")}},
		{name: "surge: the old one goes", set: surging(1), nodes: nodes, pods: []*corev1.Pod{pod("p", "a"), pod("p2", "a", updated), pod("q", "b")}, remove: "p"},
		{name: "surge: one that does not work is no loss", set: surging(1), nodes: nodes, pods: []*corev1.Pod{pod("p", "a", unready), pod("p2", "a", updated, unready), pod("q", "b")}, remove: "p"},
		{name: "surge: nor counts as one", set: surging(1), nodes: nodes, pods: []*corev1.Pod{pod("p", "a", unready), pod("q", "b")}, create: "a b"},
		{name: "surge: no place is held by a leaving pod", set: surging(1), nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a", updated, terminating)}, create: "a"},
		{name: "surge: three are too many", set: surging(1), nodes: nodes[:1], pods: []*corev1.Pod{pod("p", "a"), pod("q", "a", younger), pod("r", "a", updated, unready)}, remove: "q"},
		{
			name: "surge: a node that was left keeps its pod until another has one", set: surging(1),
			nodes: []*corev1.Node{node("a", taint("t", corev1.TaintEffectNoSchedule)), node("b")},
			pods:  []*corev1.Pod{pod("p", "a"), pod("q", "b", updated, unready)},
		},
		{
			name: "surge: and then not", set: surging(1),
			nodes: []*corev1.Node{node("a", taint("t", corev1.TaintEffectNoSchedule)), node("b")},
			pods:  []*corev1.Pod{pod("p", "a"), pod("q", "b", updated)}, remove: "p",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.set == nil {
				tt.set = settled
			}
			plan := Compute(Snapshot{
				DaemonSet: daemonSet(tt.set), Nodes: tt.nodes, Pods: tt.pods, Hash: "new",
				BackOff: func(string) time.Duration { return tt.backOff },
			}, now)
			if got := strings.Join(plan.Create, " "); got != tt.create {
				t.Errorf("creates on %q, want %q", got, tt.create)
			}
			if got := names(plan.Delete); got != tt.remove {
				t.Errorf("deletes %q, want %q", got, tt.remove)
			}
			if plan.RequeueAfter != tt.requeue {
				t.Errorf("looks again after %v, want %v", plan.RequeueAfter, tt.requeue)
			}
		})
	}
}

func TestComputeInBursts(t *testing.T) {
	var nodes []*corev1.Node
	for i := range 700 {
		nodes = append(nodes, node(fmt.Sprint("n", i)))
	}
	if plan := Compute(Snapshot{DaemonSet: daemonSet(), Nodes: nodes, BackOff: never}, now); len(plan.Create) != burst {
		t.Errorf("creates %d at once", len(plan.Create))
	}
}

// On which nodes a pod may start, and stay.
func TestFit(t *testing.T) {
	affinity := func(terms ...corev1.NodeSelectorTerm) setOption {
		return func(ds *appsv1.DaemonSet) {
			ds.Spec.Template.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
				RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms},
			}}
		}
	}
	tolerates := func(key string) setOption {
		return func(ds *appsv1.DaemonSet) {
			ds.Spec.Template.Spec.Tolerations = []corev1.Toleration{{Key: key, Operator: corev1.TolerationOpExists}}
		}
	}
	hostNetwork := func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.HostNetwork = true }
	for _, tt := range []struct {
		name        string
		set         setOption
		node        *corev1.Node
		start, stay bool
	}{
		{"any", onDelete, node("a"), true, true},
		{"named", func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.NodeName = "a" }, node("a"), true, true},
		{"another is named", func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.NodeName = "b" }, node("a"), false, false},
		{"selected", func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.NodeSelector = map[string]string{"disk": "fast"} }, node("a"), true, true},
		{"not selected", func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.NodeSelector = map[string]string{"disk": "fast"} }, node("a", slow), false, false},
		{"by affinity", affinity(corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: corev1.NodeSelectorOpIn, Values: []string{"fast"}}}}), node("a"), true, true},
		{"not by affinity", affinity(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{"b"}}}}), node("a"), false, false},
		{"a taint", onDelete, node("a", taint("t", corev1.TaintEffectNoSchedule)), false, true},
		{"a taint that expels", onDelete, node("a", taint("t", corev1.TaintEffectNoExecute)), false, false},
		{"a wish", onDelete, node("a", taint("t", corev1.TaintEffectPreferNoSchedule)), true, true},
		{"tolerated", tolerates("t"), node("a", taint("t", corev1.TaintEffectNoExecute)), true, true},
		{"another is tolerated", tolerates("u"), node("a", taint("t", corev1.TaintEffectNoSchedule)), false, true},
		{"cordoned", onDelete, node("a", taint(corev1.TaintNodeUnschedulable, corev1.TaintEffectNoSchedule)), true, true},
		{"not ready", onDelete, node("a", taint(corev1.TaintNodeNotReady, corev1.TaintEffectNoExecute)), true, true},
		{"unreachable", onDelete, node("a", taint(corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute)), true, true},
		{"under pressure", onDelete, node("a", taint(corev1.TaintNodeMemoryPressure, corev1.TaintEffectNoSchedule), taint(corev1.TaintNodeDiskPressure, corev1.TaintEffectNoSchedule), taint(corev1.TaintNodePIDPressure, corev1.TaintEffectNoSchedule)), true, true},
		{"without network", onDelete, node("a", taint(corev1.TaintNodeNetworkUnavailable, corev1.TaintEffectNoSchedule)), false, true},
		{"without network, which it makes", hostNetwork, node("a", taint(corev1.TaintNodeNetworkUnavailable, corev1.TaintEffectNoSchedule)), true, true},
	} {
		ds := daemonSet(tt.set)
		before := ds.DeepCopy()
		fit := newFit(ds)
		if start, stay := fit.on(tt.node); start != tt.start || stay != tt.stay {
			t.Errorf("%s: start %v, stay %v, want %v, %v", tt.name, start, stay, tt.start, tt.stay)
		}
		if len(ds.Spec.Template.Spec.Tolerations) != len(before.Spec.Template.Spec.Tolerations) {
			t.Errorf("%s: the cached daemon set has got tolerations", tt.name)
		}
	}
}

func TestStatus(t *testing.T) {
	ds := daemonSet(surging(1))
	ds.Spec.MinReadySeconds = 5
	ds.Status.ObservedGeneration = 2
	ds.Status.Conditions = []appsv1.DaemonSetCondition{{Type: "Kept"}}
	s := Snapshot{
		DaemonSet: ds, Hash: "new", BackOff: never,
		Nodes: []*corev1.Node{
			node("available"), node("ready"), node("unready"), node("none"), node("two"),
			node("left", taint("t", corev1.TaintEffectNoSchedule)),
		},
		Pods: []*corev1.Pod{
			pod("a", "available", updated), pod("b", "ready", updated, younger), pod("c", "unready", unready),
			pod("d", "two"), pod("e", "two", updated, younger), pod("f", "left"), pod("g", "nowhere"),
		},
	}
	got := Status(s, true, now)
	want := [...]int32{5, 4, 1, 3, 2, 3, 2}
	if have := [...]int32{
		got.DesiredNumberScheduled, got.CurrentNumberScheduled, got.NumberMisscheduled, got.NumberReady,
		got.NumberAvailable, got.NumberUnavailable, got.UpdatedNumberScheduled,
	}; have != want {
		t.Errorf("desired, current, misscheduled, ready, available, unavailable, updated = %v, want %v", have, want)
	}
	if got.ObservedGeneration != 3 || len(got.Conditions) != 1 {
		t.Errorf("observed generation %d, conditions %v", got.ObservedGeneration, got.Conditions)
	}
	if got := Status(s, false, now); got.ObservedGeneration != 2 {
		t.Errorf("observed generation %d before the cache has caught up", got.ObservedGeneration)
	}
}

// Pods of a former template are told by the label of the template's generation as well, as long as nobody knows
// their hash.
func TestUpdatedByGeneration(t *testing.T) {
	ds := daemonSet()
	ds.Annotations = map[string]string{appsv1.DeprecatedTemplateGeneration: "4"}
	p := pod("p", "a")
	p.Labels["pod-template-generation"] = "4"
	s := Snapshot{DaemonSet: ds, Nodes: []*corev1.Node{node("a")}, Pods: []*corev1.Pod{p}, Hash: "new", BackOff: never}
	if plan := Compute(s, now); len(plan.Delete) != 0 {
		t.Errorf("deletes %s", names(plan.Delete))
	}
	p.Labels["pod-template-generation"] = "3"
	if plan := Compute(s, now); len(plan.Delete) != 1 {
		t.Error("keeps the old pod")
	}
}

func TestBackOff(t *testing.T) {
	b, at, clock := newBackOff(), place{"ds", 1, "n"}, now
	var waits []time.Duration
	for range 12 {
		b.replaced(at, clock)
		wait := b.remaining(at, clock)
		waits = append(waits, wait)
		if early := clock.Add(wait - 1); b.remaining(at, early) != 1 {
			t.Errorf("%v are left at %v", b.remaining(at, early), early)
		}
		clock = clock.Add(wait)
		if left := b.remaining(at, clock); left != 0 {
			t.Errorf("%v are left in the end", left)
		}
	}
	if got := fmt.Sprint(waits); got != "[1s 2s 4s 8s 16s 32s 1m4s 2m8s 4m16s 8m32s 15m0s 15m0s]" {
		t.Errorf("waits %s", got)
	}
	if b.remaining(place{"ds", 2, "n"}, clock) != 0 || b.remaining(place{"ds", 1, "m"}, clock) != 0 {
		t.Error("another generation or node has to wait as well")
	}
	clock = clock.Add(2*lastBackOff + 1)
	if b.replaced(at, clock); b.remaining(at, clock) != firstBackOff {
		t.Errorf("after a quiet time it waits %v", b.remaining(at, clock))
	}
	if b.forget("ds"); len(b.places) != 0 {
		t.Errorf("remembers %v", b.places)
	}
}
