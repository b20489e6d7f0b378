// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"slices"
	"testing"

	v1 "k8s.io/api/core/v1"
)

func TestFilters(t *testing.T) {
	always := v1.ContainerRestartPolicyAlways
	with := func(options ...podOption) *v1.Pod { return testPod("p", options...) }
	initAsks := func(restart *v1.ContainerRestartPolicy, pairs ...string) podOption {
		return func(p *v1.Pod) {
			p.Spec.InitContainers = append(p.Spec.InitContainers, v1.Container{Name: "i", RestartPolicy: restart,
				Resources: v1.ResourceRequirements{Requests: resourceList(pairs...)}})
		}
	}
	overhead := func(pairs ...string) podOption {
		return func(p *v1.Pod) { p.Spec.Overhead = resourceList(pairs...) }
	}
	tolerates := func(toleration v1.Toleration) podOption {
		return func(p *v1.Pod) { p.Spec.Tolerations = append(p.Spec.Tolerations, toleration) }
	}
	for _, c := range []struct {
		filter string
		name   string
		pod    *v1.Pod
		node   *v1.Node
		on     []*v1.Pod // pods on the node
		want   verdict
		why    []string
	}{
		{"NodeUnschedulable", "open", with(), testNode("a"), nil, fits, nil},
		{"NodeUnschedulable", "cordoned", with(), testNode("a", cordoned), nil, unresolvable, []string{reasonUnschedulable}},
		{"NodeUnschedulable", "tolerated", with(toleratesAll), testNode("a", cordoned), nil, fits, nil},

		{"NodeName", "none", with(), testNode("a"), nil, fits, nil},
		{"NodeName", "same", with(onNode("a")), testNode("a"), nil, fits, nil},
		{"NodeName", "other", with(onNode("b")), testNode("a"), nil, unresolvable, []string{reasonNodeName}},

		{"TaintToleration", "NoSchedule", with(), testNode("a", tainted("k", v1.TaintEffectNoSchedule)), nil, unresolvable, []string{reasonTaints}},
		{"TaintToleration", "NoExecute", with(), testNode("a", tainted("k", v1.TaintEffectNoExecute)), nil, unresolvable, []string{reasonTaints}},
		{"TaintToleration", "PreferNoSchedule", with(), testNode("a", tainted("k", v1.TaintEffectPreferNoSchedule)), nil, fits, nil},
		{"TaintToleration", "tolerated", with(tolerates(v1.Toleration{Key: "k", Operator: v1.TolerationOpExists})), testNode("a", tainted("k", v1.TaintEffectNoSchedule)), nil, fits, nil},
		{"TaintToleration", "one of two tolerated", with(tolerates(v1.Toleration{Key: "k", Operator: v1.TolerationOpExists})),
			testNode("a", tainted("k", v1.TaintEffectNoSchedule), tainted("l", v1.TaintEffectNoSchedule)), nil, unresolvable, []string{reasonTaints}},
		{"TaintToleration", "another effect tolerated", with(tolerates(v1.Toleration{Key: "k", Operator: v1.TolerationOpExists, Effect: v1.TaintEffectNoExecute})),
			testNode("a", tainted("k", v1.TaintEffectNoSchedule)), nil, unresolvable, []string{reasonTaints}},

		{"NodeAffinity", "selector", with(selects("disk", "ssd")), testNode("a", labelled("disk", "ssd")), nil, fits, nil},
		{"NodeAffinity", "selector misses", with(selects("disk", "ssd")), testNode("a", labelled("disk", "hdd")), nil, unresolvable, []string{reasonAffinity}},
		{"NodeAffinity", "by name", with(requiresNodes("a")), testNode("a"), nil, fits, nil},
		{"NodeAffinity", "by another name", with(requiresNodes("b")), testNode("a"), nil, unresolvable, []string{reasonAffinity}},
		{"NodeAffinity", "both are needed", with(requiresNodes("a"), selects("disk", "ssd")), testNode("a"), nil, unresolvable, []string{reasonAffinity}},
		{"NodeAffinity", "preferred does not matter", with(prefers(1, "disk", "ssd")), testNode("a"), nil, fits, nil},

		{"NodePorts", "free", with(usesPort("", 80)), testNode("a"), []*v1.Pod{testPod("q", usesPort("", 81))}, fits, nil},
		{"NodePorts", "taken", with(usesPort("", 80)), testNode("a"), []*v1.Pod{testPod("q", usesPort("", 80))}, rejected, []string{reasonPorts}},
		{"NodePorts", "another address", with(usesPort("10.0.0.1", 80)), testNode("a"), []*v1.Pod{testPod("q", usesPort("10.0.0.2", 80))}, fits, nil},
		{"NodePorts", "all addresses", with(usesPort("0.0.0.0", 80)), testNode("a"), []*v1.Pod{testPod("q", usesPort("10.0.0.2", 80))}, rejected, []string{reasonPorts}},
		{"NodePorts", "another protocol", with(usesPort("", 80)), testNode("a"),
			[]*v1.Pod{testPod("q", usesPort("", 80), func(p *v1.Pod) { p.Spec.Containers[0].Ports[0].Protocol = v1.ProtocolUDP })}, fits, nil},
		{"NodePorts", "a sidecar's", with(usesPort("", 80)), testNode("a"), []*v1.Pod{testPod("q", func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{{Name: "s", RestartPolicy: &always, Ports: []v1.ContainerPort{{HostPort: 80}}}}
		})}, rejected, []string{reasonPorts}},
		{"NodePorts", "an init container's", with(usesPort("", 80)), testNode("a"), []*v1.Pod{testPod("q", func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{{Name: "s", Ports: []v1.ContainerPort{{HostPort: 80}}}}
		})}, fits, nil},

		{"NodeResourcesFit", "exactly", with(asks("cpu", "4", "memory", "8Gi")), testNode("a"), nil, fits, nil},
		{"NodeResourcesFit", "a hair too much", with(asks("cpu", "4001m")), testNode("a"), nil, unresolvable, []string{reasonCPU}},
		{"NodeResourcesFit", "in use", with(asks("cpu", "3", "memory", "1Gi")), testNode("a"), []*v1.Pod{testPod("q", asks("cpu", "2"))}, rejected, []string{reasonCPU}},
		{"NodeResourcesFit", "one in use, one beyond", with(asks("cpu", "3", "memory", "9Gi")), testNode("a"), []*v1.Pod{testPod("q", asks("cpu", "2"))},
			unresolvable, []string{reasonCPU, reasonMemory}},
		{"NodeResourcesFit", "asks for nothing of what is overdrawn", with(), testNode("a", gives("cpu", "1")), []*v1.Pod{testPod("q", asks("cpu", "2"))}, fits, nil},
		{"NodeResourcesFit", "pods", with(), testNode("a", gives("pods", "1")), []*v1.Pod{testPod("q")}, rejected, []string{reasonPods}},
		{"NodeResourcesFit", "pods and cpu", with(asks("cpu", "1")), testNode("a", gives("pods", "1")), []*v1.Pod{testPod("q", asks("cpu", "4"))}, rejected, []string{reasonPods, reasonCPU}},
		{"NodeResourcesFit", "extended", with(asks("example.com/gpu", "2")), testNode("a", gives("example.com/gpu", "2")), nil, fits, nil},
		{"NodeResourcesFit", "extended in use", with(asks("example.com/gpu", "2")), testNode("a", gives("example.com/gpu", "2")),
			[]*v1.Pod{testPod("q", asks("example.com/gpu", "1"))}, rejected, []string{"Insufficient example.com/gpu"}},
		{"NodeResourcesFit", "huge pages", with(asks("hugepages-2Mi", "4Mi")), testNode("a"), nil, unresolvable, []string{"Insufficient hugepages-2Mi"}},
		{"NodeResourcesFit", "init containers run one by one", with(asks("cpu", "2"), initAsks(nil, "cpu", "4"), initAsks(nil, "cpu", "3")), testNode("a"), nil, fits, nil},
		{"NodeResourcesFit", "an init container is too large", with(asks("cpu", "2"), initAsks(nil, "cpu", "5")), testNode("a"), nil, unresolvable, []string{reasonCPU}},
		{"NodeResourcesFit", "sidecars run beside", with(asks("cpu", "2"), initAsks(&always, "cpu", "2500m")), testNode("a"), nil, unresolvable, []string{reasonCPU}},
		{"NodeResourcesFit", "overhead", with(asks("cpu", "4"), overhead("cpu", "1m")), testNode("a"), nil, unresolvable, []string{reasonCPU}},
		{"NodeResourcesFit", "for the whole pod", with(func(p *v1.Pod) { p.Spec.Resources = &v1.ResourceRequirements{Requests: resourceList("cpu", "5")} }),
			testNode("a"), nil, unresolvable, []string{reasonCPU}},
	} {
		t.Run(c.filter+"/"+c.name, func(t *testing.T) {
			for _, p := range c.on {
				p.Spec.NodeName = "a"
			}
			s := testSnapshot([]*v1.Node{c.node}, c.on...)
			i := slices.IndexFunc(filters[:], func(f filter) bool { return f.name == c.filter })
			got, why := filters[i].check(newSearcher(1).ask(newPendingPod(c.pod), s), s.byName["a"], nil)
			if got != c.want || !slices.Equal(why, c.why) {
				t.Errorf("got %v %q, want %v %q", got, why, c.want, c.why)
			}
		})
	}
}

func TestMatters(t *testing.T) {
	base := testNode("a")
	heartbeat := testNode("a")
	heartbeat.ResourceVersion = "2"
	heartbeat.Status.Conditions = []v1.NodeCondition{{Type: v1.NodeReady}}
	for what, c := range map[string]struct {
		after *v1.Node
		want  bool
	}{
		"heartbeat": {heartbeat, false},
		"label":     {testNode("a", labelled("x", "y")), true},
		"taint":     {testNode("a", tainted("x", v1.TaintEffectNoSchedule)), true},
		"cordon":    {testNode("a", func(n *v1.Node) { n.Spec.Unschedulable = true }), true},
		"cpu":       {testNode("a", gives("cpu", "5")), true},
		"same cpu":  {testNode("a", gives("cpu", "4000m")), false},
		"extended":  {testNode("a", gives("example.com/gpu", "1")), true},
	} {
		if got := matters(base, c.after); got != c.want {
			t.Errorf("%s: got %v", what, got)
		}
	}
}
