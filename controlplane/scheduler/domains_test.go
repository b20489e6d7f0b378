// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func spreads(skew int32, key, app string, options ...func(*v1.TopologySpreadConstraint)) podOption {
	return func(p *v1.Pod) {
		c := v1.TopologySpreadConstraint{MaxSkew: skew, TopologyKey: key, WhenUnsatisfiable: v1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}
		for _, option := range options {
			option(&c)
		}
		p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, c)
	}
}

func termFor(key, app string) v1.PodAffinityTerm {
	return v1.PodAffinityTerm{TopologyKey: key, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}
}

func nearTo(key, app string) podOption {
	return func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{PodAffinity: &v1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{termFor(key, app)}}}
	}
}

func apartFrom(key, app string) podOption {
	return func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{PodAntiAffinity: &v1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{termFor(key, app)}}}
	}
}

func inZone(zone string) nodeOption { return labelled(v1.LabelTopologyZone, zone) }

// Each case asks for a pod on nodes a and b of zone east and c of zone west.
func TestDomains(t *testing.T) {
	zone, host, app := v1.LabelTopologyZone, v1.LabelHostname, hasLabels("app", "a")
	on := func(node string, options ...podOption) *v1.Pod {
		return testPod("on-"+node, append([]podOption{onNode(node), app}, options...)...)
	}
	terminating := func(p *v1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: someTime} }
	apartElsewhere := func(p *v1.Pod) { apartFrom(zone, "a")(p); p.Namespace = "other" }
	const free, skewed, unlabelled = "", reasonSpread, reasonSpreadLabel
	for _, c := range []struct {
		name string
		pod  *v1.Pod
		pods []*v1.Pod
		want [3]string // the reason of each node
	}{
		{"even", testPod("p", app, spreads(1, zone, "a")), nil, [3]string{}},
		{"the fuller zone is closed", testPod("p", app, spreads(1, zone, "a")), []*v1.Pod{on("a")}, [3]string{skewed, skewed, free}},
		{"within the skew", testPod("p", app, spreads(2, zone, "a")), []*v1.Pod{on("a")}, [3]string{}},
		{"a pod that it does not mean itself", testPod("p", spreads(1, zone, "a")), []*v1.Pod{on("a")}, [3]string{}},
		{"by host", testPod("p", app, spreads(1, host, "a")), []*v1.Pod{on("a")}, [3]string{skewed, free, free}},
		{"other namespaces do not count", testPod("p", app, spreads(1, zone, "a")), []*v1.Pod{on("a", func(p *v1.Pod) { p.Namespace = "other" })}, [3]string{}},
		{"those that go do not count", testPod("p", app, spreads(1, zone, "a")), []*v1.Pod{on("a", terminating)}, [3]string{}},
		{"no such label", testPod("p", app, spreads(1, "rack", "a")), nil, [3]string{unlabelled, unlabelled, unlabelled}},
		{"too few domains", testPod("p", app, spreads(1, zone, "a", func(c *v1.TopologySpreadConstraint) { c.MinDomains = pointer(int32(3)) })),
			[]*v1.Pod{on("a"), on("c")}, [3]string{skewed, skewed, skewed}},
		{"matchLabelKeys", testPod("p", hasLabels("app", "a", "hash", "2"), spreads(1, zone, "a", func(c *v1.TopologySpreadConstraint) { c.MatchLabelKeys = []string{"hash"} })),
			[]*v1.Pod{on("a", hasLabels("hash", "1")), on("b", hasLabels("hash", "2"))}, [3]string{skewed, skewed, free}},
		{"nodes that it may not use do not count", testPod("p", app, selects(zone, "east"), spreads(1, host, "a")), []*v1.Pod{on("a"), on("b")},
			[3]string{free, free, reasonAffinity}},
		{"nodes that it may not use count", testPod("p", app, selects(zone, "east"), spreads(1, host, "a", func(c *v1.TopologySpreadConstraint) {
			c.NodeAffinityPolicy = pointer(v1.NodeInclusionPolicyIgnore)
		})), []*v1.Pod{on("a"), on("b")}, [3]string{skewed, skewed, reasonAffinity}},
		{"anyway", testPod("p", app, spreads(1, zone, "a", func(c *v1.TopologySpreadConstraint) { c.WhenUnsatisfiable = v1.ScheduleAnyway })),
			[]*v1.Pod{on("a")}, [3]string{}},

		{"near nobody", testPod("p", nearTo(zone, "a")), nil, [3]string{reasonTogether, reasonTogether, reasonTogether}},
		{"the first of its kind", testPod("p", app, nearTo(zone, "a")), nil, [3]string{}},
		{"near one", testPod("p", nearTo(zone, "a")), []*v1.Pod{on("a")}, [3]string{free, free, reasonTogether}},
		{"near one that goes", testPod("p", nearTo(zone, "a")), []*v1.Pod{on("a", terminating)}, [3]string{free, free, reasonTogether}},
		{"apart", testPod("p", apartFrom(zone, "a")), []*v1.Pod{on("a")}, [3]string{reasonApart, reasonApart, free}},
		{"apart by host", testPod("p", apartFrom(host, "a")), []*v1.Pod{on("a")}, [3]string{reasonApart, free, free}},
		{"apart without the label", testPod("p", apartFrom("rack", "a")), []*v1.Pod{on("a")}, [3]string{}},
		{"others stay apart from it", testPod("p", app), []*v1.Pod{testPod("q", onNode("a"), apartFrom(zone, "a"))}, [3]string{reasonAgainst, reasonAgainst, free}},
		{"others of another namespace do not", testPod("p", app), []*v1.Pod{testPod("q", onNode("a"), apartElsewhere)}, [3]string{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testSnapshot([]*v1.Node{testNode("a", inZone("east")), testNode("b", inZone("east")), testNode("c", inZone("west"))})
			x := newSearcher(1)
			p := newPendingPod(c.pod)
			x.ask(p, s).resolve() // pods that come later must be counted by their differences
			for _, placed := range c.pods {
				s.setPod(newPod(placed), placed.Spec.NodeName)
			}
			for i, node := range []string{"a", "b", "c"} {
				var want []string
				if c.want[i] != "" {
					want = []string{c.want[i]}
				}
				if _, why := x.check(x.ask(p, s), s.byName[node]); !slices.Equal(why, want) {
					t.Errorf("%s: got %q, want %q", node, why, want)
				}
			}
		})
	}
}

func TestNamespaceSelectors(t *testing.T) {
	s := testSnapshot([]*v1.Node{testNode("a")}, testPod("q", onNode("a"), hasLabels("app", "a"), func(p *v1.Pod) { p.Namespace = "other" }))
	x := newSearcher(1)
	selecting := apartFrom(v1.LabelHostname, "a")
	p := newPendingPod(testPod("p", selecting, func(p *v1.Pod) {
		p.Spec.Affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution[0].NamespaceSelector =
			&metav1.LabelSelector{MatchLabels: map[string]string{"team": "x"}}
	}))
	for _, c := range []struct {
		labels map[string]string
		want   verdict
	}{{nil, fits}, {map[string]string{"team": "x"}, rejected}, {map[string]string{"team": "y"}, fits}} {
		s.topology.setNamespace("other", c.labels)
		if got, _ := x.check(x.ask(p, s), s.byName["a"]); got != c.want {
			t.Errorf("namespace with labels %v: got %v, want %v", c.labels, got, c.want)
		}
	}
}

// Victims are those whose going lets the pod in, by whatever filter, and no others.
func TestPreemptionByDomains(t *testing.T) {
	app := hasLabels("app", "a")
	for _, c := range []struct {
		name    string
		pod     *v1.Pod
		pods    []*v1.Pod
		node    string
		victims []string
	}{
		{"it keeps apart", testPod("p", priority(9), apartFrom(v1.LabelHostname, "a")),
			[]*v1.Pod{testPod("q", onNode("a"), app), testPod("r", onNode("a")), testPod("s", onNode("b"), app, priority(9))}, "a", []string{"q"}},
		{"others keep apart from it", testPod("p", priority(9), app),
			[]*v1.Pod{testPod("q", onNode("a"), apartFrom(v1.LabelHostname, "a")), testPod("r", onNode("b"), priority(9), apartFrom(v1.LabelHostname, "a"))}, "a", []string{"q"}},
		{"of two, one is enough", testPod("p", priority(9), app, spreads(1, v1.LabelTopologyZone, "a"), asks("cpu", "3")),
			[]*v1.Pod{testPod("q", onNode("a"), app, priority(1)), testPod("r", onNode("a"), app, priority(2)), testPod("s", onNode("b"), app, priority(9), asks("cpu", "3"))},
			"a", []string{"q"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testSnapshot([]*v1.Node{testNode("a", inZone("east")), testNode("b", inZone("west"))}, c.pods...)
			x := newSearcher(1)
			p := newPendingPod(c.pod)
			n, d := x.decide(p, s)
			if n != nil {
				t.Fatalf("it fits on %s", n.name)
			}
			room := x.preempt(p, s, d, nil, nil, someTime)
			if room == nil {
				t.Fatalf("no room was made: %s", d.message())
			}
			var victims []string
			for _, v := range room.victims {
				victims = append(victims, v.key.Name)
			}
			if room.node.name != c.node || !slices.Equal(victims, c.victims) {
				t.Errorf("got %v from %s, want %v from %s", victims, room.node.name, c.victims, c.node)
			}
			for _, placed := range c.pods { // all are back where they were
				if q := s.pods[placed.UID]; s.byName[placed.Spec.NodeName].pods[q.uid] != q {
					t.Errorf("%s was left out", placed.Name)
				}
			}
		})
	}
}
