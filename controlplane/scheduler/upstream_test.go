// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/backend/cache"
	"k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/feature"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/interpodaffinity"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/podtopologyspread"
	frameworkruntime "k8s.io/kubernetes/pkg/scheduler/framework/runtime"
	schedulermetrics "k8s.io/kubernetes/pkg/scheduler/metrics"
	"pgregory.net/rapid"
)

// cosmos is a cluster as the API server knows it.
type cosmos struct {
	nodes       map[string]*v1.Node
	pods        map[string]*v1.Pod // placed, by name
	namespaces  map[string]map[string]string
	services    map[string]*v1.Service
	replicaSets map[string]*appsv1.ReplicaSet
}

// upstream asks kube-scheduler's own plugins, which compute everything anew from the objects.
type upstream struct {
	filter fwk.FilterPlugin
	state  fwk.CycleState
	skip   bool // for filtering
	infos  []fwk.NodeInfo
}

func askUpstream(t *rapid.T, c *cosmos, p *v1.Pod, make frameworkruntime.PluginFactory, args runtime.Object) *upstream {
	var pods []*v1.Pod
	for _, placed := range c.pods {
		if c.nodes[placed.Spec.NodeName] != nil {
			pods = append(pods, placed)
		}
	}
	lister := cache.NewSnapshot(pods, slices.Collect(maps.Values(c.nodes)))
	factory := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	for name, set := range c.namespaces {
		must(t, factory.Core().V1().Namespaces().Informer().GetIndexer().Add(&v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: set}}))
	}
	for _, object := range c.services {
		must(t, factory.Core().V1().Services().Informer().GetIndexer().Add(object))
	}
	for _, object := range c.replicaSets {
		must(t, factory.Apps().V1().ReplicaSets().Informer().GetIndexer().Add(object))
	}
	handle, err := frameworkruntime.NewFramework(t.Context(), nil, nil, frameworkruntime.WithSnapshotSharedLister(lister), frameworkruntime.WithInformerFactory(factory))
	must(t, err)
	plugin, err := make(t.Context(), args, handle)
	must(t, err)
	u := &upstream{filter: plugin.(fwk.FilterPlugin), state: framework.NewCycleState()}
	u.infos, err = lister.NodeInfos().List()
	must(t, err)
	_, status := plugin.(fwk.PreFilterPlugin).PreFilter(t.Context(), u.state, p, u.infos)
	if !status.IsSuccess() && !status.IsSkip() {
		t.Fatalf("upstream's prefilter: %v", status)
	}
	u.skip = status.IsSkip()
	return u
}

func must(t *rapid.T, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

func (u *upstream) check(ctx context.Context, p *v1.Pod, info fwk.NodeInfo) (verdict, []string) {
	if u.skip {
		return fits, nil
	}
	status := u.filter.Filter(ctx, u.state, p, info)
	switch status.Code() {
	case fwk.Success:
		return fits, nil
	case fwk.UnschedulableAndUnresolvable:
		return unresolvable, status.Reasons()
	}
	return rejected, status.Reasons()
}

// scores returns nil when the plugin has no opinion.
func (u *upstream) scores(t *rapid.T, p *v1.Pod, infos []fwk.NodeInfo) map[string]int64 {
	status := u.filter.(fwk.PreScorePlugin).PreScore(t.Context(), u.state, p, infos)
	if status.IsSkip() {
		return nil
	}
	must(t, status.AsError())
	var list fwk.NodeScoreList
	for _, info := range infos {
		value, status := u.filter.(fwk.ScorePlugin).Score(t.Context(), u.state, p, info)
		must(t, status.AsError())
		list = append(list, fwk.NodeScore{Name: info.Node().Name, Score: value})
	}
	must(t, u.filter.(fwk.ScorePlugin).ScoreExtensions().NormalizeScore(t.Context(), u.state, p, list).AsError())
	result := map[string]int64{}
	for _, score := range list {
		result[score.Name] = score.Score
	}
	return result
}

// TestLikeUpstream changes a cluster at random and asks, in between, where a pod could go and how
// good each node would be: the incremental index must answer as kube-scheduler does, which counts
// from the start each time.
func TestLikeUpstream(t *testing.T) {
	schedulermetrics.InitMetrics() // upstream's plugins count
	gates := feature.NewSchedulerFeaturesFromGates(utilfeature.DefaultFeatureGate)
	plugins := map[string]struct {
		make frameworkruntime.PluginFactory
		args runtime.Object
	}{
		"PodTopologySpread": {frameworkruntime.FactoryAdapter(gates, podtopologyspread.New), &config.PodTopologySpreadArgs{DefaultingType: config.SystemDefaulting}},
		"InterPodAffinity":  {frameworkruntime.FactoryAdapter(gates, interpodaffinity.New), &config.InterPodAffinityArgs{HardPodAffinityWeight: 1}},
	}
	rapid.Check(t, func(t *rapid.T) {
		s := newSnapshot()
		s.topology.limit = 12 // so that tallies are dropped and counted anew
		x := newSearcher(1)
		c := &cosmos{map[string]*v1.Node{}, map[string]*v1.Pod{}, map[string]map[string]string{}, map[string]*v1.Service{}, map[string]*appsv1.ReplicaSet{}}
		created := 0
		waiting := map[string]*pod{} // nominated
		t.Repeat(map[string]func(*rapid.T){
			"node": func(t *rapid.T) {
				object := drawNode(t)
				c.nodes[object.Name] = object
				s.setNode(object)
			},
			"node goes": func(t *rapid.T) {
				name := drawKey(t, c.nodes)
				delete(c.nodes, name)
				s.removeNode(name)
			},
			"namespace": func(t *rapid.T) {
				name := rapid.SampledFrom(testNamespaces).Draw(t, "namespace")
				set := map[string]string{"team": rapid.SampledFrom([]string{"x", "y"}).Draw(t, "team")}
				c.namespaces[name] = set
				s.topology.setNamespace(name, set)
			},
			"service": func(t *rapid.T) {
				object := &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: rapid.SampledFrom([]string{"s", "t"}).Draw(t, "name")}}
				if rapid.Bool().Draw(t, "selects") {
					object.Spec.Selector = map[string]string{"app": drawApp(t)}
				}
				c.services[object.Name] = object
				s.workloads.setService(object.Namespace, object.Name, object.Spec.Selector)
			},
			"replica set": func(t *rapid.T) {
				object := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "rs"},
					Spec: appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": drawApp(t)}}}}
				c.replicaSets[object.Name] = object
				s.workloads.setController(workloadKey{"apps/v1/ReplicaSet", "default", "rs"}, parsed(object.Spec.Selector))
			},
			"pod": func(t *rapid.T) {
				created++
				object := drawPod(t, fmt.Sprintf("p%d", created))
				object.Spec.NodeName = drawNodeName(t)
				c.pods[object.Name] = object
				s.setPod(newPod(object), object.Spec.NodeName)
			},
			"pod changes": func(t *rapid.T) {
				name := drawKey(t, c.pods)
				object := drawPod(t, name)
				object.Namespace, object.Spec.NodeName = c.pods[name].Namespace, drawNodeName(t)
				c.pods[name] = object
				s.setPod(newPod(object), object.Spec.NodeName)
			},
			"pod goes": func(t *rapid.T) {
				name := drawKey(t, c.pods)
				s.removePod(c.pods[name].UID)
				delete(c.pods, name)
			},
			"nominate": func(t *rapid.T) {
				created++
				p := newPendingPod(drawPod(t, fmt.Sprintf("p%d", created)))
				s.nominate(p, drawNodeName(t))
				waiting[p.key.Name] = p
			},
			"nominated goes": func(t *rapid.T) {
				name := drawKey(t, waiting)
				s.nominate(waiting[name], "")
				delete(waiting, name)
			},
			"tries": func(t *rapid.T) {
				// What preemption and nominations do: change the snapshot for a moment.
				p := newPendingPod(drawPod(t, "asked"))
				q := x.ask(p, s)
				for _, n := range s.nodes {
					x.check(q, n)
					x.victims(q, n, nil, someTime)
				}
			},
			"ask": func(t *rapid.T) {
				object := drawPod(t, "asked")
				q := x.ask(newPendingPod(object), s)
				for name, plugin := range plugins {
					u := askUpstream(t, c, object, plugin.make, plugin.args)
					check := filters[slices.IndexFunc(filters[:], func(f filter) bool { return f.name == name })].check
					for _, info := range u.infos {
						n := s.byName[info.Node().Name]
						if v, _ := nodeAffinity(q, n, nil); v != fits {
							continue // rejected before this filter is asked
						}
						if v, _ := taintToleration(q, n, nil); v != fits {
							continue
						}
						want, wantWhy := u.check(t.Context(), object, info)
						got, gotWhy := check(q, n, nil)
						if got != want || !slices.Equal(gotWhy, wantWhy) {
							t.Fatalf("%s on %s: got %v %q, want %v %q", name, n.name, got, gotWhy, want, wantWhy)
						}
					}
				}
				q.resolveScores()
				for name, plugin := range plugins {
					u := askUpstream(t, c, object, plugin.make, plugin.args)
					compareScores(t, name, u, q, s, object)
				}
			},
			"": func(t *rapid.T) {},
		})
	})
}

// compareScores is for the nodes that pass what filters decide by the node alone.
func compareScores(t *rapid.T, name string, u *upstream, q *query, s *snapshot, object *v1.Pod) {
	var infos []fwk.NodeInfo
	var nodes []*node
	for _, info := range u.infos {
		n := s.byName[info.Node().Name]
		affine, _ := nodeAffinity(q, n, nil)
		tolerated, _ := taintToleration(q, n, nil)
		if affine == fits && tolerated == fits {
			infos, nodes = append(infos, info), append(nodes, n)
		}
	}
	if len(nodes) == 0 {
		return
	}
	want := u.scores(t, object, infos)
	sc := scores[scoreNamed(name)]
	got := make([]int64, len(nodes))
	if sc.applies(q) {
		sc.of(q, nodes, got)
		sc.scale(got)
	}
	for i, n := range nodes {
		if got[i] != want[n.name] { // no opinion is 0 everywhere
			t.Fatalf("%s scores %s %d, want %d", name, n.name, got[i], want[n.name])
		}
	}
}

var testNamespaces = []string{"default", "other", "third"}

func drawKey[T any](t *rapid.T, from map[string]T) string {
	if len(from) == 0 {
		t.Skip("none there")
	}
	return rapid.SampledFrom(slices.Sorted(maps.Keys(from))).Draw(t, "key")
}

func drawApp(t *rapid.T) string { return rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "app") }

func drawNodeName(t *rapid.T) string { return fmt.Sprintf("n%d", rapid.IntRange(0, 6).Draw(t, "node")) }

func drawNode(t *rapid.T) *v1.Node {
	object := testNode(drawNodeName(t))
	if zone := rapid.SampledFrom([]string{"", "east", "west", "north"}).Draw(t, "zone"); zone != "" {
		object.Labels[v1.LabelTopologyZone] = zone
	}
	if rapid.IntRange(0, 5).Draw(t, "nameless") == 0 {
		delete(object.Labels, v1.LabelHostname)
	}
	if rapid.IntRange(0, 3).Draw(t, "taint") == 0 {
		tainted("k", rapid.SampledFrom([]v1.TaintEffect{v1.TaintEffectNoSchedule, v1.TaintEffectPreferNoSchedule}).Draw(t, "effect"))(object)
	}
	return object
}

func drawSelector(t *rapid.T) *metav1.LabelSelector {
	switch rapid.IntRange(0, 6).Draw(t, "selector") {
	case 0:
		return nil
	case 1:
		return &metav1.LabelSelector{}
	case 2:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"a", drawApp(t)}}}}
	case 3:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpNotIn, Values: []string{drawApp(t)}}}}
	default:
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": drawApp(t)}}
	}
}

func drawTerm(t *rapid.T) v1.PodAffinityTerm {
	term := v1.PodAffinityTerm{LabelSelector: drawSelector(t), TopologyKey: rapid.SampledFrom([]string{v1.LabelTopologyZone, v1.LabelHostname}).Draw(t, "key")}
	switch rapid.IntRange(0, 4).Draw(t, "namespaces") {
	case 0:
		term.Namespaces = []string{"other", "default"}
	case 1:
		term.NamespaceSelector = &metav1.LabelSelector{}
	case 2:
		term.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "x"}}
	}
	return term
}

func drawPod(t *rapid.T, name string) *v1.Pod {
	object := testPod(name, hasLabels("app", drawApp(t)), priority(int32(rapid.IntRange(0, 2).Draw(t, "priority"))))
	object.UID = types.UID("uid-" + name)
	object.Namespace = rapid.SampledFrom(testNamespaces).Draw(t, "namespace")
	if rapid.Bool().Draw(t, "version") {
		hasLabels("version", rapid.SampledFrom([]string{"1", "2"}).Draw(t, "number"))(object)
	}
	if rapid.IntRange(0, 5).Draw(t, "terminating") == 0 {
		object.DeletionTimestamp = &metav1.Time{Time: someTime}
	}
	if rapid.Bool().Draw(t, "owned") {
		ownedBy("rs")(object)
	}
	if rapid.IntRange(0, 4).Draw(t, "node selector") == 0 {
		selects(v1.LabelTopologyZone, "east")(object)
	}
	if rapid.IntRange(0, 2).Draw(t, "tolerates") == 0 {
		toleratesAll(object)
	}
	drawAffinity(t, object)
	drawSpread(t, object)
	return object
}

func drawAffinity(t *rapid.T, object *v1.Pod) {
	few := rapid.IntRange(0, 2)
	if rapid.Bool().Draw(t, "no affinity") {
		return
	}
	near, apart := &v1.PodAffinity{}, &v1.PodAntiAffinity{}
	if rapid.Bool().Draw(t, "near") {
		for range few.Draw(t, "near") {
			near.RequiredDuringSchedulingIgnoredDuringExecution = append(near.RequiredDuringSchedulingIgnoredDuringExecution, drawTerm(t))
		}
	}
	for range few.Draw(t, "apart") {
		apart.RequiredDuringSchedulingIgnoredDuringExecution = append(apart.RequiredDuringSchedulingIgnoredDuringExecution, drawTerm(t))
	}
	weight := rapid.Int32Range(1, 100)
	for range few.Draw(t, "rather near") {
		near.PreferredDuringSchedulingIgnoredDuringExecution = append(near.PreferredDuringSchedulingIgnoredDuringExecution,
			v1.WeightedPodAffinityTerm{Weight: weight.Draw(t, "weight"), PodAffinityTerm: drawTerm(t)})
	}
	for range few.Draw(t, "rather apart") {
		apart.PreferredDuringSchedulingIgnoredDuringExecution = append(apart.PreferredDuringSchedulingIgnoredDuringExecution,
			v1.WeightedPodAffinityTerm{Weight: weight.Draw(t, "weight"), PodAffinityTerm: drawTerm(t)})
	}
	if object.Spec.Affinity == nil {
		object.Spec.Affinity = &v1.Affinity{}
	}
	object.Spec.Affinity.PodAffinity, object.Spec.Affinity.PodAntiAffinity = near, apart
}

func drawSpread(t *rapid.T, object *v1.Pod) {
	policies := rapid.SampledFrom([]*v1.NodeInclusionPolicy{nil, pointer(v1.NodeInclusionPolicyHonor), pointer(v1.NodeInclusionPolicyIgnore)})
	for i := range rapid.IntRange(0, 3).Draw(t, "constraints") {
		c := v1.TopologySpreadConstraint{
			MaxSkew:            rapid.Int32Range(1, 3).Draw(t, "skew"),
			TopologyKey:        []string{v1.LabelTopologyZone, v1.LabelHostname, v1.LabelTopologyZone}[i],
			WhenUnsatisfiable:  rapid.SampledFrom([]v1.UnsatisfiableConstraintAction{v1.DoNotSchedule, v1.ScheduleAnyway}).Draw(t, "action"),
			LabelSelector:      drawSelector(t),
			NodeAffinityPolicy: policies.Draw(t, "affinity policy"),
			NodeTaintsPolicy:   policies.Draw(t, "taints policy"),
		}
		if c.WhenUnsatisfiable == v1.DoNotSchedule && rapid.Bool().Draw(t, "least") {
			c.MinDomains = pointer(rapid.Int32Range(1, 3).Draw(t, "domains"))
		}
		if rapid.IntRange(0, 3).Draw(t, "keys") == 0 {
			c.MatchLabelKeys = []string{"version"}
		}
		object.Spec.TopologySpreadConstraints = append(object.Spec.TopologySpreadConstraints, c)
	}
}

func pointer[T any](value T) *T { return &value }
