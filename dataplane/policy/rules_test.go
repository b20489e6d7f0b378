// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/policy/model"
)

// TestPorts: the entries hold exactly the ports of the ranges, and no more entries than are needed.
func TestPorts(t *testing.T) {
	for _, c := range []struct {
		ranges []portRange
		want   int
	}{
		{[]portRange{{0, 65535}}, 1}, {[]portRange{{80, 80}}, 1}, {[]portRange{{1, 65534}}, 30}, {[]portRange{{80, 81}, {82, 83}, {80, 80}}, 1},
		{[]portRange{{30000, 32767}}, 5}, {[]portRange{{65535, 65535}}, 1},
	} {
		var p ports
		for _, r := range c.ranges {
			p.add(maps.TCP, r)
		}
		if got := p.entries(1, 2); len(got) != c.want {
			t.Errorf("%v: %d entries, want %d: %v", c.ranges, len(got), c.want, got)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		var p ports
		in := map[uint16]bool{}
		for range rapid.IntRange(1, 3).Draw(t, "ranges") {
			r := portRange{first: rapid.Uint16().Draw(t, "first")}
			r.last = r.first + rapid.Uint16Range(0, 65535-r.first).Draw(t, "more")
			p.add(maps.UDP, r)
			for n := uint32(r.first); n <= uint32(r.last); n++ {
				in[uint16(n)] = true
			}
		}
		for _, e := range p.entries(1, 2) {
			k := e.Key
			n := 1 << (maps.PolicyBitsPort - k.Bits)
			for i := range n {
				port := k.Port.Number() + uint16(i)
				if !in[port] {
					t.Fatalf("%d is let through, or twice", port)
				}
				delete(in, port)
			}
		}
		if len(in) > 0 {
			t.Fatalf("%d ports are missing", len(in))
		}
	})
}

// fixture is a namespace with a pod of this node, and another pod.
func fixture() (*world, *kernel, *Table) {
	pod := func(name, ip string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), Labels: map[string]string{"app": name}},
			Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: ip}}},
		}
	}
	w := &world{model.Cluster{
		Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{"team": "a"}}}},
		Pods:       []*corev1.Pod{pod("local", "10.42.0.1"), pod("remote", "10.42.0.2")},
	}}
	table := NewTable(w, Limits{Entries: 100, Set: 50, Blocks: 70}, maps.PolicyState{Epoch: 1})
	table.Attach(1, localOf(w.Cluster.Pods[0]), maps.PolicySets{})
	return w, newKernel(), table
}

func policy(name string, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
	if spec.PolicyTypes == nil {
		spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	}
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: spec}
}

// TestBlocksOfTheNode: of the policies of all pods only as many IP blocks are written as the node has room for.
func TestBlocksOfTheNode(t *testing.T) {
	_, k, table := fixture() // 50 fit one set, 70 all
	var peers []networkingv1.NetworkPolicyPeer
	for i := range 40 {
		peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("192.0.2.%d/32", i)}})
	}
	table.SetPolicy(policy("in", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}}}))
	if problems := table.Problems(); len(problems) > 0 {
		t.Fatal(problems)
	}
	table.SetPolicy(policy("out", networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}, Egress: []networkingv1.NetworkPolicyEgressRule{{To: peers}}}))
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	why := table.Problems()[types.NamespacedName{Namespace: "ns", Name: "out"}]
	if want := "need 1 entries and 40 IP blocks; 50 fit one pod, and 100 and 70 the node, which has 1 and 40 already"; !strings.Contains(why, want) {
		t.Errorf("%q does not say %q", why, want)
	}
	if got := k.slots[1]; got.Egress != maps.PolicyClosed || got.Ingress == maps.PolicyClosed {
		t.Errorf("sets %+v", got)
	}
}

// TestBadPolicies: what makes no sense, or does not fit, closes the pods it selects, and is said.
func TestBadPolicies(t *testing.T) {
	from := func(p networkingv1.NetworkPolicyPeer, ports ...networkingv1.NetworkPolicyPort) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}},
			{From: []networkingv1.NetworkPolicyPeer{p}, Ports: ports},
		}}
	}
	all := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{}}
	bad := metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Like"}}}
	var many networkingv1.NetworkPolicySpec
	for i := range 51 {
		many.Ingress = append(many.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(int32(2*i + 1)))}}})
	}
	var blocks networkingv1.NetworkPolicySpec
	for i := range 51 {
		blocks.Ingress = append(blocks.Ingress, from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("192.0.2.%d/32", i)}}).Ingress[1])
	}
	for name, c := range map[string]struct {
		spec networkingv1.NetworkPolicySpec
		want string
	}{
		"cidr":      {from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/33"}}), "ingress[1]: peer 0: cidr"},
		"except":    {from(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"x"}}}), "except"},
		"peer":      {from(networkingv1.NetworkPolicyPeer{}), "neither"},
		"selector":  {from(networkingv1.NetworkPolicyPeer{PodSelector: &bad}), "Like"},
		"namespace": {from(networkingv1.NetworkPolicyPeer{NamespaceSelector: &bad}), "Like"},
		"pods":      {networkingv1.NetworkPolicySpec{PodSelector: bad}, "podSelector"},
		"protocol":  {from(all, networkingv1.NetworkPolicyPort{Protocol: new(corev1.Protocol("QUIC"))}), "QUIC"},
		"port":      {from(all, networkingv1.NetworkPolicyPort{Port: new(intstr.FromInt32(70000))}), "70000"},
		"range":     {from(all, networkingv1.NetworkPolicyPort{Port: new(intstr.FromInt32(80)), EndPort: new(int32(79))}), "endPort 79"},
		"type":      {networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Sideways"}}, "Sideways"},
		"entries":   {many, "need 52 entries and 0 IP blocks; 50 fit"},
		"blocks":    {blocks, "51 IP blocks"},
	} {
		t.Run(name, func(t *testing.T) {
			_, k, table := fixture()
			good := policy("good", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{
				{Ports: []networkingv1.NetworkPolicyPort{{Protocol: new(corev1.ProtocolUDP), Port: new(intstr.FromInt32(53))}}}}})
			np := policy(name, c.spec)
			table.SetPolicy(good)
			table.SetPolicy(np)
			if err := table.Flush(k); err != nil {
				t.Fatal(err)
			}
			if k.slots[1].Ingress != maps.PolicyClosed {
				t.Errorf("slot has %+v", k.slots[1])
			}
			key := types.NamespacedName{Namespace: "ns", Name: name}
			if got := table.Problems()[key]; !strings.Contains(got, c.want) {
				t.Errorf("problem is %q, want %q", got, c.want)
			}
			table.DeletePolicy(key)
			if err := table.Flush(k); err != nil {
				t.Fatal(err)
			}
			if s := k.slots[1].Ingress; s == 0 || s == maps.PolicyClosed || len(table.Problems()) > 0 {
				t.Errorf("after it is gone: slot has %+v, problems %v", k.slots[1], table.Problems())
			}
		})
	}
}

// TestFull: pods for whom no entry is left are denied, and that is said; others are not.
func TestFull(t *testing.T) {
	w, k, table := fixture()
	for i := range 120 {
		p := w.Cluster.Pods[1].DeepCopy()
		p.Name, p.Labels, p.Status.PodIPs[0].IP = fmt.Sprint("r", i), map[string]string{"n": fmt.Sprint(i)}, fmt.Sprintf("10.42.1.%d", i)
		w.Cluster.Pods = append(w.Cluster.Pods, p)
	}
	table.SetPolicy(policy("all", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{
		{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}}}}))
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	if len(k.policy) != 100 {
		t.Errorf("%d entries", len(k.policy))
	}
	if got := table.Problems()[types.NamespacedName{Namespace: "ns", Name: "all"}]; !strings.Contains(got, "22 kinds of pods are denied") {
		t.Errorf("problem is %q", got)
	}
	table.DeletePolicy(types.NamespacedName{Namespace: "ns", Name: "all"})
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	if err := table.Collect(k, func(SetInfo, uint64) {}); err != nil {
		t.Fatal(err)
	}
	if table.entries != 0 || len(k.policy)+len(k.identities)+len(k.drops) > 0 || k.state.Version != 0 {
		t.Errorf("left: %v, %d counted", k, table.entries)
	}
}

// TestNothingForNothing: what changes no verdict writes nothing, so that no flow is judged again.
func TestNothingForNothing(t *testing.T) {
	w, k, table := fixture()
	deny := policy("deny", networkingv1.NetworkPolicySpec{})
	table.SetPolicy(deny)
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	before := k.writes
	relabelled := deny.DeepCopy()
	relabelled.Labels, relabelled.ResourceVersion = map[string]string{"a": "b"}, "2"
	table.SetPolicy(relabelled)
	elsewhere := deny.DeepCopy()
	elsewhere.Namespace = "other"
	table.SetPolicy(elsewhere)
	table.SetPolicy(policy("others", networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "nobody"}}}))
	table.SetPod(PodOf(w.Cluster.Pods[1]))
	table.DeletePod(types.NamespacedName{Namespace: "ns", Name: "remote"})
	table.SetNamespace("ns")
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	if k.writes != before {
		t.Errorf("%d writes", k.writes-before)
	}
}

// TestUnknownPod: a pod that is not known yet, or only its predecessor is, stays closed where there are policies.
func TestUnknownPod(t *testing.T) {
	w, k, table := fixture()
	flush := func() maps.PolicySets {
		t.Helper()
		if err := table.Flush(k); err != nil {
			t.Fatal(err)
		}
		return k.slots[2]
	}
	closed := maps.PolicySets{Ingress: maps.PolicyClosed, Egress: maps.PolicyClosed}
	next := Local{types.NamespacedName{Namespace: "ns", Name: "remote"}, "another"}
	table.Expect(2, next, maps.PolicySets{}, false)
	if got := flush(); got != closed || k.state.Version == 0 {
		t.Errorf("while nothing is known: %+v", got)
	}
	table.ResolveAll()
	if got := flush(); got != (maps.PolicySets{}) || k.state.Version != 0 {
		t.Errorf("without policies: %+v", got)
	}
	table.SetPolicy(policy("deny", networkingv1.NetworkPolicySpec{}))
	if got := flush(); got != closed {
		t.Errorf("with a policy: %+v", got)
	}
	w.Cluster.Pods[1].UID = "another"
	table.SetPod(PodOf(w.Cluster.Pods[1]))
	got := flush()
	if got.Ingress == maps.PolicyClosed || got.Ingress == 0 || got.Egress != 0 {
		t.Errorf("known: %+v", got)
	}
	w.Cluster.Pods = w.Cluster.Pods[:1]
	table.DeletePod(next.NamespacedName)
	if again := flush(); again != got {
		t.Errorf("deleted but still running: %+v, was %+v", again, got)
	}
}

// TestCostOfOnePod: what a new pod of a known kind costs does not depend on how many there are.
func TestCostOfOnePod(t *testing.T) {
	cost := func(n int) int {
		w, k, table := fixture()
		table.SetPolicy(policy("all", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}}}}))
		add := func(i int) {
			p := w.Cluster.Pods[1].DeepCopy()
			p.Name, p.Status.PodIPs[0].IP = fmt.Sprint("r", i), fmt.Sprintf("10.42.%d.%d", 1+i/250, i%250)
			w.Cluster.Pods = append(w.Cluster.Pods, p)
			table.SetPod(PodOf(p))
			if err := table.Flush(k); err != nil {
				t.Fatal(err)
			}
		}
		for i := range n {
			add(i)
		}
		before := k.writes
		add(n)
		return k.writes - before
	}
	if few, many := cost(2), cost(300); few != many || few > 3 {
		t.Errorf("%d writes among 2 pods, %d among 300", few, many)
	}
}

// TestCostOfOnePolicy: what a policy costs that comes, changes or goes does not depend on how many others select the same
// pods, and what its pods are let do by those is not written again.
func TestCostOfOnePolicy(t *testing.T) {
	const rules = 100
	one := func(n int, port int32) *networkingv1.NetworkPolicy {
		var r []networkingv1.NetworkPolicyIngressRule
		for i := range rules {
			r = append(r, networkingv1.NetworkPolicyIngressRule{
				From:  []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.%d.%d.0/24", n, i)}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(port + int32(i)))}},
			})
		}
		r = append(r, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(int32(10000 + n)))}}})
		return policy(fmt.Sprint("p", n), networkingv1.NetworkPolicySpec{Ingress: r})
	}
	cost := func(among int) (comes, changes, goes int) {
		w, k, table := fixture()
		table.limits = Limits{Entries: 1 << 20, Set: 1 << 16, Blocks: 1 << 20}
		count := func(change func()) int {
			before, set := k.writes, k.slots[1].Ingress
			change()
			if err := table.Flush(k); err != nil {
				t.Fatal(err)
			}
			if err := table.Collect(k, func(SetInfo, uint64) {}); err != nil {
				t.Fatal(err)
			}
			if set != 0 && k.slots[1].Ingress != set {
				t.Errorf("another set, for all of %d policies", among)
			}
			k.check(t, w)
			return k.writes - before
		}
		set := func(np *networkingv1.NetworkPolicy) func() {
			return func() {
				w.Policies = replace(w.Policies, types.NamespacedName{Namespace: np.Namespace, Name: np.Name}, np)
				table.SetPolicy(np)
			}
		}
		for n := range among {
			count(set(one(n, 1000)))
		}
		comes = count(set(one(200, 2000)))
		changes = count(set(one(200, 3000)))
		goes = count(func() {
			name := types.NamespacedName{Namespace: "ns", Name: "p200"}
			w.Policies = replace(w.Policies, name)
			table.DeletePolicy(name)
		})
		return comes, changes, goes
	}
	c1, u1, g1 := cost(1)
	c2, u2, g2 := cost(40)
	if c1 != c2 || u1 != u2 || g1 != g2 {
		t.Errorf("beside one policy it costs %d, %d and %d writes to come, change and go; beside 40 %d, %d and %d", c1, u1, g1, c2, u2, g2)
	}
	if c1 > 3*rules || u1 > 9*rules || g1 > 3*rules {
		t.Errorf("%d rules cost %d, %d and %d writes to come, change and go", rules, c1, u1, g1)
	}
}

// TestDropsOfChangingSets: a set's drops are those of the policies that it had.
func TestDropsOfChangingSets(t *testing.T) {
	_, k, table := fixture()
	told := map[string]uint64{}
	final := func(i SetInfo, n uint64) { told[strings.Join(i.Policies, ",")] += n }
	do := func(change func(), drops uint64) {
		t.Helper()
		change()
		if err := table.Flush(k); err != nil {
			t.Fatal(err)
		}
		if err := table.Collect(k, final); err != nil {
			t.Fatal(err)
		}
		for set := range k.drops {
			k.drops[set] += drops
		}
	}
	do(func() { table.SetPolicy(policy("a", networkingv1.NetworkPolicySpec{})) }, 3)
	do(func() { table.SetPolicy(policy("b", networkingv1.NetworkPolicySpec{})) }, 5)
	if err := table.Drops(k, final); err != nil {
		t.Fatal(err)
	}
	if told["a"] != 3 || told["a,b"] != 5 {
		t.Errorf("told: %v", told)
	}
	set := k.slots[1].Ingress
	if names, _ := table.Denial(set, 0, types.NamespacedName{Namespace: "ns", Name: "local"}, "ingress"); len(names) != 2 {
		t.Errorf("the set is of %v", names)
	}
}

// TestPolicyThatSaysItElsewhere: who may do something before and after a policy changes may do it all the while, for programs
// too that look up one entry before and the next one later.
func TestPolicyThatSaysItElsewhere(t *testing.T) {
	from := map[string][]networkingv1.NetworkPolicyPeer{
		"everybody": nil,
		"pod":       {{PodSelector: &metav1.LabelSelector{}}},
		"block":     {{IPBlock: &networkingv1.IPBlock{CIDR: "10.42.0.2/32"}}},
	}
	for before, peers := range from {
		for after, others := range from {
			w, k, table := fixture()
			set := func(peers []networkingv1.NetworkPolicyPeer) {
				port := []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(80))}}
				np := policy("p", networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers, Ports: port}}})
				w.Policies = []*networkingv1.NetworkPolicy{np}
				table.SetPolicy(np)
				if err := table.Flush(k); err != nil {
					t.Fatal(err)
				}
				k.check(t, w)
			}
			set(peers)
			in := k.slots[1].Ingress
			k.look = func() {
				k.remember()
				for i := range k.past {
					for j := i; j < len(k.past); j++ {
						at := [3]content{k.past[i], k.past[j], k.now()}
						if passes, _ := judge(at, in, netip.MustParseAddr("10.42.0.2"), maps.TCP, 80); !passes {
							t.Errorf("from %s to %s: denied in between", before, after)
						}
					}
				}
			}
			k.past = nil
			k.remember()
			set(others)
			if k.slots[1].Ingress != in {
				t.Errorf("from %s to %s: another set", before, after)
			}
		}
	}
}
