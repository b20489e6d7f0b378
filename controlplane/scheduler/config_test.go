// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

const configHead = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n"

const packing = configHead + `
profiles:
- schedulerName: default-scheduler
- schedulerName: packing
  plugins:
    score:
      disabled: [{name: NodeResourcesBalancedAllocation}, {name: ImageLocality}]
      enabled: [{name: NodeResourcesFit, weight: 10}]
  pluginConfig:
  - name: NodeResourcesFit
    args:
      apiVersion: kubescheduler.config.k8s.io/v1
      kind: NodeResourcesFitArgs
      scoringStrategy:
        type: MostAllocated
        resources: [{name: cpu, weight: 3}, {name: memory}]
  - name: InterPodAffinity
    args: {hardPodAffinityWeight: 0}
  - name: PodTopologySpread
    args:
      defaultingType: List
      defaultConstraints: [{maxSkew: 2, topologyKey: rack, whenUnsatisfiable: ScheduleAnyway}]
`

func mustParse(t *testing.T, text string) Profiles {
	t.Helper()
	profiles, err := parseProfiles([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return profiles
}

func TestProfilesAreRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "scheduler.yaml")
	if err := os.WriteFile(file, []byte(packing), 0o600); err != nil {
		t.Fatal(err)
	}
	profiles, err := LoadProfiles(file)
	if err != nil {
		t.Fatal(err)
	}
	if names := slices.Sorted(maps.Keys(profiles)); !slices.Equal(names, []string{"default-scheduler", "packing"}) {
		t.Fatalf("profiles %q", names)
	}
	if got, want := profiles[Name].weights, DefaultProfiles()[Name].weights; got != want {
		t.Errorf("a profile without settings has weights %d, want the defaults %d", got, want)
	}
	p := profiles["packing"]
	for name, want := range map[string]int64{"NodeResourcesFit": 10, "NodeResourcesBalancedAllocation": 0, "ImageLocality": 0, "TaintToleration": 3, "NodeAffinity": 2} {
		if got := p.weights[scoreNamed(name)]; got != want {
			t.Errorf("%s counts %d times, want %d", name, got, want)
		}
	}
	if !p.packs || p.cpuWeight != 3 || p.memoryWeight != 1 || p.hardAffinity != 0 || !p.ownSpreads || !slices.Equal(p.spreads, []spreadDefault{{2, "rack"}}) {
		t.Errorf("%+v", p)
	}
}

// All scores can be turned off together, and some on again: what is enabled holds, and without a weight it is 1.
func TestScoresAreChosenAsUpstreamMergesThem(t *testing.T) {
	p := mustParse(t, configHead+`
profiles:
- plugins:
    multiPoint: {enabled: [{name: TaintToleration, weight: 7}, {name: NodeName}], disabled: [{name: ImageLocality}]}
    score: {disabled: [{name: "*"}, {name: NodeAffinity}], enabled: [{name: NodeAffinity}, {name: PodTopologySpread, weight: 4}]}
`)[Name]
	for i := range scores {
		want := map[string]int64{"NodeAffinity": 1, "PodTopologySpread": 4}[scores[i].name]
		if p.weights[i] != want {
			t.Errorf("%s counts %d times, want %d", scores[i].name, p.weights[i], want)
		}
	}
}

// What has no meaning here is refused by name, all of it at once.
func TestConfigurationIsRefused(t *testing.T) {
	profile := func(text string) string { return configHead + "profiles:\n- " + text }
	for _, c := range []struct{ text, says string }{
		{"", "apiVersion"},
		{"apiVersion: kubescheduler.config.k8s.io/v1beta3\nkind: KubeSchedulerConfiguration", `"kubescheduler.config.k8s.io/v1beta3"`},
		{configHead + "profile: []", `unknown field "profile"`},
		{configHead + "parallelism: 4", "parallelism: skep has no such setting"},
		{configHead + "leaderElection: {leaderElect: true}", "leaderElection"},
		{configHead + "extenders: [{urlPrefix: 'http://x'}]", "extenders"},
		{configHead + "percentageOfNodesToScore: 50\nparallelism: 4", "percentageOfNodesToScore"},
		{profile("schedulerName: a\n- schedulerName: a"), "several profiles"},
		{profile("plugins: {}\n- schedulerName: a"), "required"},
		{profile("schedulerName: 'no name'"), "no name"},
		{profile("plugins: {score: {enabled: [{name: Nonsense}]}}"), `"Nonsense" is no score`},
		{profile("plugins: {score: {enabled: [{name: NodePorts}]}}"), `"NodePorts" is no score`},
		{profile("plugins: {score: {enabled: [{name: NodeAffinity}, {name: NodeAffinity}]}}"), "several times"},
		{profile("plugins: {score: {enabled: [{name: NodeAffinity, weight: -1}]}}"), "weight -1"},
		{profile("plugins: {score: {enabled: [{name: NodeAffinity, wieght: 1}]}}"), `unknown field`},
		{profile("plugins: {score: {enabled: [{name: NodeAffinity, weight: 2000000000}]}}"), "weight 2000000000"},
		{profile("plugins: {filter: {disabled: [{name: NodePorts}]}}"), "plugins.filter"},
		{profile("plugins: {multiPoint: {disabled: [{name: NodePorts}]}}"), "keep promises"},
		{profile("plugins: {multiPoint: {disabled: [{name: TaintToleration}]}}"), "keep promises"},
		{profile("plugins: {multiPoint: {disabled: [{name: '*'}]}}"), "keep promises"},
		{profile("pluginConfig: [{name: VolumeBinding, args: {bindTimeoutSeconds: 1}}]"), "VolumeBinding"},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {kind: Other}}]"), `"Other" must be NodeResourcesFitArgs`},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {type: RequestedToCapacityRatio}}}]"), "LeastAllocated or MostAllocated"},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {resources: [{name: gpu}]}}}]"), "cpu and memory"},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {resources: [{name: cpu}, {name: cpu}]}}}]"), "cpu once"},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {ignoredResources: [a/b]}}]"), "ignoredResources"},
		{profile("pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategie: {}}}]"), "unknown field"},
		{profile("pluginConfig: [{name: InterPodAffinity}, {name: InterPodAffinity}]"), "several of InterPodAffinity"},
		{profile("pluginConfig: [{name: InterPodAffinity, args: {hardPodAffinityWeight: 101}}]"), "from 0 to 100"},
		{profile("pluginConfig: [{name: PodTopologySpread, args: {defaultConstraints: [{maxSkew: 1, topologyKey: a, whenUnsatisfiable: ScheduleAnyway}]}}]"), "defaultingType List"},
		{profile("pluginConfig: [{name: PodTopologySpread, args: {defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: a, whenUnsatisfiable: DoNotSchedule}]}}]"), "DoNotSchedule"},
		{strings.Repeat("#", configLimit+1), "too many"},
	} {
		_, err := parseProfiles([]byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.200s\n got %v, want an error with %q", c.text, err, c.says)
		}
	}
}

func FuzzConfiguration(f *testing.F) {
	f.Add([]byte(packing))
	f.Add([]byte(configHead + "profiles: [{plugins: {score: {disabled: [{name: '*'}]}}}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		profiles, err := parseProfiles(data)
		if err != nil {
			return
		}
		s := testSnapshot([]*v1.Node{testNode("a"), testNode("b")})
		s.profiles = profiles
		for name := range profiles {
			p := newPendingPod(testPod("p", bySchedulerNamed(name), ownedBy("rs"), asks("cpu", "1", "memory", "1Gi")))
			if n, d := newSearcher(1).decide(p, s); n == nil {
				t.Fatal(d.message())
			}
		}
	})
}

func bySchedulerNamed(name string) podOption { return func(p *v1.Pod) { p.Spec.SchedulerName = name } }

// Of two nodes, one half full, the default profile takes the empty one and the packing profile the other.
func TestProfilesDecideDifferently(t *testing.T) {
	s := testSnapshot([]*v1.Node{testNode("empty"), testNode("half")}, testPod("q", onNode("half"), asks("cpu", "2", "memory", "4Gi")))
	s.profiles = mustParse(t, packing)
	for name, want := range map[string]string{Name: "empty", "packing": "half"} {
		n, d := newSearcher(1).decide(newPendingPod(testPod("p", bySchedulerNamed(name), asks("cpu", "1", "memory", "2Gi"))), s)
		if n == nil {
			t.Fatal(d.message())
		}
		if n.name != want {
			t.Errorf("%s puts the pod on %s, want %s", name, n.name, want)
		}
	}
}

// Constraints that the administrator chose in place of the default ones: replicas spread over racks.
func TestReplicasSpreadAsTheProfileSays(t *testing.T) {
	rack := func(name string) func(*v1.Node) { return labelled("rack", name) }
	s := testSnapshot([]*v1.Node{testNode("a", rack("1")), testNode("b", rack("1")), testNode("c", rack("2"))})
	s.profiles = mustParse(t, packing)
	s.workloads.setController(workloadKey{"apps/v1/ReplicaSet", "default", "rs"}, labels.SelectorFromSet(labels.Set{"app": "a"}))
	x, racks := newSearcher(1), map[string]int{}
	for i := range 8 {
		n, d := x.decide(newPendingPod(testPod(name("p", i), bySchedulerNamed("packing"), ownedBy("rs"), hasLabels("app", "a"))), s)
		if n == nil {
			t.Fatal(d.message())
		}
		s.setPod(newPod(testPod(name("p", i), hasLabels("app", "a"), ownedBy("rs"))), n.name)
		racks[n.object.Labels["rack"]]++
	}
	if racks["2"] < 3 {
		t.Errorf("pods by rack: %v", racks)
	}
}

// The event of a binding says what else there was to choose from.
func TestChoicesAreExplained(t *testing.T) {
	full := testPod("q", onNode("b"), asks("cpu", "4", "memory", "8Gi"))
	half := testPod("q", onNode("b"), asks("cpu", "2", "memory", "4Gi"))
	asking := asks("cpu", "1", "memory", "2Gi")
	two := []*v1.Node{testNode("a"), testNode("b")}
	for _, c := range []struct {
		name  string
		nodes []*v1.Node
		on    []*v1.Pod
		pod   *v1.Pod
		want  string
	}{
		{"one node", two[:1], nil, testPod("p", asking), ""},
		{"one fits", two, []*v1.Pod{full}, testPod("p", asking), ", the only one that fits of 2"},
		{"the better", two, []*v1.Pod{half}, testPod("p", asking),
			", with a score of 450 the best of 2 that fit; next is b with 400 (NodeResourcesFit 75, there 25)"},
		{"by preference", two, nil, testPod("p", asking, prefers(7, v1.LabelHostname, "a")),
			", with a score of 650 the best of 2 that fit; next is b with 450 (NodeAffinity 200, there 0)"},
		{"a daemon's", two, nil, testPod("p", requiresNodes("a")), ""},
		{"kept", two, nil, testPod("p", func(p *v1.Pod) { p.Status.NominatedNodeName = "a" }), ", where room was made for it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newSearcher(1)
			n, d := x.decide(newPendingPod(c.pod), testSnapshot(c.nodes, c.on...))
			if n == nil {
				t.Fatal(d.message())
			}
			if got := x.choice.String(); n.name != "a" || got != c.want {
				t.Errorf("%s%s, want a%s", n.name, got, c.want)
			}
		})
	}
	x := newSearcher(1)
	n, _ := x.decide(newPendingPod(testPod("p", asking)), testSnapshot(two))
	other := map[string]string{"a": "b", "b": "a"}[n.name]
	if got := x.choice.String(); !strings.HasSuffix(got, "; "+other+" has the same") {
		t.Errorf("of two equal nodes: %s", got)
	}
}
