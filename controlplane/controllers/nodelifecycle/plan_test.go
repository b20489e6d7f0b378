// SPDX-License-Identifier: Apache-2.0

package nodelifecycle

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

var now = time.Unix(1700000000, 0)

type nodeOption func(*corev1.Node)

func is(t corev1.NodeConditionType, status corev1.ConditionStatus) nodeOption {
	return func(n *corev1.Node) {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: t, Status: status, LastHeartbeatTime: metav1.NewTime(now.Add(-time.Minute)), LastTransitionTime: metav1.NewTime(now.Add(-time.Hour)),
		})
	}
}

func ready(status corev1.ConditionStatus) nodeOption { return is(corev1.NodeReady, status) }

func tainted(taints ...string) nodeOption {
	return func(n *corev1.Node) {
		for _, t := range taints {
			key, effect, _ := strings.Cut(t, ":")
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffect(effect)})
		}
	}
}

func unschedulable(n *corev1.Node) { n.Spec.Unschedulable = true }

func newNode(options ...nodeOption) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", CreationTimestamp: metav1.NewTime(now.Add(-time.Hour))}}
	for _, option := range options {
		option(n)
	}
	return n
}

func show(taints []corev1.Taint) string {
	var s []string
	for _, t := range taints {
		s = append(s, t.Key+":"+string(t.Effect))
	}
	return strings.Join(s, " ")
}

const (
	notReady    = corev1.TaintNodeNotReady
	unreachable = corev1.TaintNodeUnreachable
)

func TestTaints(t *testing.T) {
	const noSchedule, noExecute = ":NoSchedule", ":NoExecute"
	for _, tt := range []struct {
		name         string
		node         *corev1.Node
		allDisrupted bool
		want         string // the taints after, "-" if they stay
		evict        string
	}{
		{"well", newNode(ready(corev1.ConditionTrue)), false, "-", ""},
		{"not ready", newNode(ready(corev1.ConditionFalse)), false, notReady + noSchedule, notReady},
		{"unknown", newNode(ready(corev1.ConditionUnknown)), false, unreachable + noSchedule, unreachable},
		{"all disrupted: nobody is evicted", newNode(ready(corev1.ConditionUnknown)), true, unreachable + noSchedule, ""},
		{"all disrupted now: evictions end", newNode(ready(corev1.ConditionUnknown), tainted(unreachable+noSchedule, unreachable+noExecute)), true, unreachable + noSchedule, ""},
		{"already tainted", newNode(ready(corev1.ConditionUnknown), tainted(unreachable+noSchedule, unreachable+noExecute)), false, "-", ""},
		{"not ready, then unknown: swapped at once", newNode(ready(corev1.ConditionUnknown), tainted(notReady+noSchedule, notReady+noExecute)), false,
			unreachable + noSchedule + " " + unreachable + noExecute, ""},
		{"unknown, then not ready: swapped at once", newNode(ready(corev1.ConditionFalse), tainted(unreachable+noSchedule, unreachable+noExecute)), false,
			notReady + noSchedule + " " + notReady + noExecute, ""},
		{"ready again", newNode(ready(corev1.ConditionTrue), tainted(unreachable+noSchedule, unreachable+noExecute, "mine:NoExecute")), false, "mine:NoExecute", ""},
		{"registered, not seen since: as the API server tainted it, but open", newNode(tainted(notReady + noSchedule)), false, "", ""},
		{"pressure", newNode(ready(corev1.ConditionTrue), is(corev1.NodeMemoryPressure, corev1.ConditionTrue), is(corev1.NodeDiskPressure, corev1.ConditionTrue),
			is(corev1.NodePIDPressure, corev1.ConditionFalse)), false, corev1.TaintNodeDiskPressure + noSchedule + " " + corev1.TaintNodeMemoryPressure + noSchedule, ""},
		{"pids and network", newNode(ready(corev1.ConditionTrue), is(corev1.NodePIDPressure, corev1.ConditionTrue), is(corev1.NodeNetworkUnavailable, corev1.ConditionTrue)), false,
			corev1.TaintNodeNetworkUnavailable + noSchedule + " " + corev1.TaintNodePIDPressure + noSchedule, ""},
		{"cordoned", newNode(ready(corev1.ConditionTrue), unschedulable), false, corev1.TaintNodeUnschedulable + noSchedule, ""},
		{"uncordoned", newNode(ready(corev1.ConditionTrue), tainted(corev1.TaintNodeUnschedulable+noSchedule)), false, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := Health{}.Observe(tt.node, nil, now)
			h.Seen = now
			plan := Compute(Snapshot{Node: tt.node, Health: h, Timing: DefaultTiming, AllDisrupted: tt.allDisrupted}, now)
			got := "-"
			if plan.Retaint {
				got = show(plan.Taints)
			}
			evict := ""
			if plan.Evict != nil {
				evict = plan.Evict.Key
			}
			if got != tt.want || evict != tt.evict {
				t.Errorf("taints %q, evict %q; want %q, %q", got, evict, tt.want, tt.evict)
			}
		})
	}
}

func TestSilence(t *testing.T) {
	lease := func(renewed time.Time) *coordinationv1.Lease {
		return &coordinationv1.Lease{Spec: coordinationv1.LeaseSpec{RenewTime: &metav1.MicroTime{Time: renewed}}}
	}
	node := newNode(ready(corev1.ConditionTrue), is(corev1.NodeMemoryPressure, corev1.ConditionFalse), is(corev1.NodeNetworkUnavailable, corev1.ConditionFalse))
	compute := func(h Health, at time.Time) Plan {
		return Compute(Snapshot{Node: node, Health: h, Timing: DefaultTiming}, at)
	}

	h := Health{}.Observe(node, nil, now)
	if plan := compute(h, now.Add(40*time.Second)); plan.Conditions != nil || plan.RequeueAfter != time.Millisecond {
		t.Errorf("at the end of the grace %+v", plan)
	}
	// A renewed lease is a sign of life, whatever the node's clock says; an old one is not.
	h = h.Observe(node, lease(time.Unix(5, 0)), now.Add(30*time.Second))
	if plan := compute(h, now.Add(60*time.Second)); plan.Conditions != nil || plan.RequeueAfter != 10*time.Second+time.Millisecond {
		t.Errorf("after a lease %+v", plan)
	}
	h = h.Observe(node, lease(time.Unix(5, 0)), now.Add(60*time.Second))
	plan := compute(h, now.Add(71*time.Second))
	if !plan.NotReady || len(plan.Conditions) != 5 {
		t.Fatalf("after silence %+v", plan)
	}
	var got []string
	for _, c := range plan.Conditions {
		got = append(got, fmt.Sprintf("%s=%s %s %s", c.Type, c.Status, c.Reason, c.Message))
	}
	slices.Sort(got)
	want := []string{
		"DiskPressure=Unknown NodeStatusNeverUpdated Kubelet never posted node status.",
		"MemoryPressure=Unknown NodeStatusUnknown Kubelet stopped posting node status.",
		"NetworkUnavailable=False  ",
		"PIDPressure=Unknown NodeStatusNeverUpdated Kubelet never posted node status.",
		"Ready=Unknown NodeStatusUnknown Kubelet stopped posting node status.",
	}
	if !slices.Equal(got, want) {
		t.Errorf("conditions\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if node.Status.Conditions[0].Status != corev1.ConditionTrue {
		t.Error("the cached node was changed")
	}

	// Once that is stored: taints, pods, and nothing to wait for.
	node = node.DeepCopy()
	node.Status.Conditions = plan.Conditions
	plan = compute(h, now.Add(72*time.Second))
	if plan.Conditions != nil || !plan.MarkPods || !plan.Retaint || plan.Evict == nil || plan.RequeueAfter != 0 {
		t.Errorf("the step after %+v", plan)
	}
	// A new heartbeat makes it well again.
	node = node.DeepCopy()
	node.Status.Conditions[0].Status, node.Status.Conditions[0].LastHeartbeatTime = corev1.ConditionTrue, metav1.NewTime(now.Add(80*time.Second))
	h = h.Observe(node, nil, now.Add(80*time.Second))
	if plan = compute(h, now.Add(81*time.Second)); plan.Conditions != nil || plan.MarkPods || plan.RequeueAfter != 39*time.Second+time.Millisecond {
		t.Errorf("back again %+v", plan)
	}
}

func TestNeverReported(t *testing.T) {
	node := newNode()
	node.CreationTimestamp = metav1.NewTime(now)
	h := Health{}.Observe(node, nil, now.Add(10*time.Second))
	s := Snapshot{Node: node, Health: h, Timing: DefaultTiming}
	if plan := Compute(s, now.Add(59*time.Second)); plan.Conditions != nil || plan.RequeueAfter != time.Second+time.Millisecond {
		t.Errorf("young node %+v", plan)
	}
	plan := Compute(s, now.Add(61*time.Second))
	if len(plan.Conditions) != 4 || plan.NotReady || plan.Conditions[0].Reason != "NodeStatusNeverUpdated" {
		t.Errorf("old node %+v", plan)
	}
}

func TestLabels(t *testing.T) {
	node := newNode(ready(corev1.ConditionTrue))
	node.Labels = map[string]string{corev1.LabelOSStable: "linux", corev1.LabelArchStable: "arm64", "beta.kubernetes.io/arch": "amd64"}
	plan := Compute(Snapshot{Node: node, Health: Health{Seen: now}, Timing: DefaultTiming}, now)
	if fmt.Sprint(plan.Labels) != "map[beta.kubernetes.io/arch:arm64 beta.kubernetes.io/os:linux]" {
		t.Error(plan.Labels)
	}
}

func TestZoneState(t *testing.T) {
	for _, tt := range []struct {
		ready, notReady int
		want            State
		rate            float64
	}{
		{0, 0, Normal, 0.1}, {1, 0, Normal, 0.1}, {0, 1, FullDisruption, 0.1}, {1, 2, Normal, 0.1}, {3, 3, Normal, 0.1},
		{2, 3, PartialDisruption, 0}, {45, 55, PartialDisruption, 0.01}, {46, 54, Normal, 0.1},
	} {
		got := ZoneState(tt.ready, tt.notReady)
		if rate := EvictionRate(got, tt.ready+tt.notReady, false); got != tt.want || float64(rate) != tt.rate {
			t.Errorf("%d ready, %d not: %v at %v, want %v at %v", tt.ready, tt.notReady, got, rate, tt.want, tt.rate)
		}
		if EvictionRate(got, 100, true) != 0 {
			t.Error("evictions go on although everything is disrupted")
		}
	}
}

// Counting one node at a time gives what counting all of them gives, and each zone evicts no faster than it may.
func TestZonesCount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		z, nodes, at := newZones(), map[string]*corev1.Node{}, now
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			name := fmt.Sprint("n", rapid.IntRange(0, 12).Draw(t, "node"))
			if rapid.IntRange(0, 5).Draw(t, "delete") == 0 {
				z.remove(name, at)
				delete(nodes, name)
			} else {
				node := newNode(ready(rapid.SampledFrom([]corev1.ConditionStatus{corev1.ConditionTrue, corev1.ConditionFalse}).Draw(t, "ready")))
				node.Name = name
				node.Labels = map[string]string{corev1.LabelTopologyZone: rapid.SampledFrom([]string{"a", "b", ""}).Draw(t, "zone")}
				if rapid.IntRange(0, 6).Draw(t, "excluded") == 0 {
					node.Labels[excludeLabel] = ""
				}
				z.set(node, at)
				nodes[name] = node
			}
			fresh := newZones()
			for _, node := range nodes {
				fresh.set(node, at)
			}
			for key, zone := range z.zones {
				var want struct{ ready, notReady int }
				if f := fresh.zones[key]; f != nil {
					want.ready, want.notReady = f.ready, f.notReady
				}
				if zone.ready != want.ready || zone.notReady != want.notReady {
					t.Fatalf("zone %s counts %d and %d, want %+v", key, zone.ready, zone.notReady, want)
				}
			}
			if z.allDisrupted() != fresh.allDisrupted() {
				t.Fatal("disagreement about the disruption of everything")
			}
		}
	})
}

func TestEvictionRateIsKept(t *testing.T) {
	z, at := newZones(), now
	for i, status := range []corev1.ConditionStatus{corev1.ConditionTrue, corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionFalse} {
		node := newNode(ready(status))
		node.Name = fmt.Sprint("n", i)
		z.set(node, at)
	}
	if ok, _ := z.mayEvict("n2", at); !ok {
		t.Error("the first is not evicted at once")
	}
	ok, wait := z.mayEvict("n3", at)
	if ok || wait != 10*time.Second {
		t.Errorf("the second: %v after %v", ok, wait)
	}
	if ok, _ = z.mayEvict("n3", at.Add(wait)); !ok {
		t.Error("the second is not evicted after its time")
	}
	for _, name := range []string{"n0", "n1"} {
		node := newNode(ready(corev1.ConditionUnknown))
		node.Name = name
		z.set(node, at)
	}
	if ok, wait := z.mayEvict("n0", at.Add(time.Hour)); ok || wait >= 0 {
		t.Errorf("with everything disrupted: %v after %v", ok, wait)
	}
}
