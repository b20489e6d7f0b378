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
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/policy/model"
)

// world is a Cluster made of API objects. Pods whose name starts with "l" are of this node.
type world struct{ model.Cluster }

func (w *world) Pod(n types.NamespacedName) *Pod {
	for _, p := range w.Cluster.Pods {
		if p.Namespace == n.Namespace && p.Name == n.Name {
			return PodOf(p)
		}
	}
	return nil
}

func (w *world) Pods(namespace string) (out []*Pod) {
	for _, p := range w.Cluster.Pods {
		if namespace == "" || p.Namespace == namespace {
			out = append(out, PodOf(p))
		}
	}
	return out
}

func (w *world) Namespace(name string) labels.Set {
	for _, n := range w.Namespaces {
		if n.Name == name {
			return n.Labels
		}
	}
	return nil
}

func (w *world) Nodes(s labels.Selector) (out []netip.Addr) {
	for _, n := range w.Cluster.Nodes {
		if s.Matches(labels.Set(n.Labels)) {
			out = append(out, nodeAddresses(n)...)
		}
	}
	return out
}

func (w *world) locals() (out []*corev1.Pod) {
	for _, p := range w.Cluster.Pods {
		if strings.HasPrefix(p.Name, "l") {
			out = append(out, p)
		}
	}
	return out
}

func slotOf(p *corev1.Pod) uint32 {
	return uint32(netip.MustParseAddr(p.Status.PodIPs[0].IP).As4()[3])
}

func localOf(p *corev1.Pod) Local {
	return Local{types.NamespacedName{Namespace: p.Namespace, Name: p.Name}, p.UID}
}

var protos = map[corev1.Protocol]uint8{corev1.ProtocolTCP: maps.TCP, corev1.ProtocolUDP: maps.UDP, corev1.ProtocolSCTP: maps.SCTP, "": 1}

// connections between every pair of addresses that may be told apart.
func (w *world) connections() (out []model.Connection) {
	var addrs []netip.Addr
	for _, p := range w.Cluster.Pods {
		for _, ip := range p.Status.PodIPs {
			addrs = append(addrs, netip.MustParseAddr(ip.IP))
		}
	}
	for _, s := range []string{"10.42.0.200", "10.42.1.1", "192.0.2.9", "192.0.2.77", "2001:db8::9", "2001:db8:1::9"} {
		addrs = append(addrs, netip.MustParseAddr(s))
	}
	for _, from := range addrs {
		for _, to := range addrs {
			if from.Is4() != to.Is4() || w.pod(from) == nil && w.pod(to) == nil {
				continue
			}
			out = append(out, model.Connection{From: from, To: to})
			for _, port := range []int32{1, 80, 81, 8080, 65535} {
				out = append(out, model.Connection{From: from, To: to, Proto: corev1.ProtocolTCP, Port: port})
			}
			out = append(out, model.Connection{From: from, To: to, Proto: corev1.ProtocolUDP, Port: 80},
				model.Connection{From: from, To: to, Proto: corev1.ProtocolSCTP, Port: 80})
		}
	}
	return out
}

func (w *world) pod(a netip.Addr) *corev1.Pod {
	for _, p := range w.Cluster.Pods {
		for _, ip := range p.Status.PodIPs {
			if ip.IP == a.String() {
				return p
			}
		}
	}
	return nil
}

// verdicts of the model: ingress and egress, as far as this node judges them.
func (w *world) verdicts(conns []model.Connection) [][2]bool {
	out := make([][2]bool, len(conns))
	for i, c := range conns {
		out[i] = [2]bool{w.Ingress(c), w.Egress(c)}
	}
	return out
}

// programs judge as the BPF programs do, with the sets that a slot has or that a reader may still hold.
func (k *kernel) programs(w *world, c model.Connection, sets func(slot uint32) maps.PolicySets) [2]bool {
	out := [2]bool{true, true}
	if c.From == c.To || k.state.Version == 0 {
		return out
	}
	if p := w.pod(c.To); p != nil && strings.HasPrefix(p.Name, "l") {
		out[ingress] = k.allows(sets(slotOf(p)).Ingress, c.From, protos[c.Proto], uint16(c.Port))
	}
	if p := w.pod(c.From); p != nil && strings.HasPrefix(p.Name, "l") {
		out[egress] = k.allows(sets(slotOf(p)).Egress, c.To, protos[c.Proto], uint16(c.Port))
	}
	return out
}

func (k *kernel) check(t fataler, w *world) {
	for _, c := range w.connections() {
		got := k.programs(w, c, func(slot uint32) maps.PolicySets { return k.slots[slot] })
		if p := w.pod(c.To); p != nil && strings.HasPrefix(p.Name, "l") && got[ingress] != w.Ingress(c) {
			t.Fatalf("ingress %+v: the maps say %t, the model %t; %v", c, got[ingress], w.Ingress(c), k)
		}
		if p := w.pod(c.From); p != nil && strings.HasPrefix(p.Name, "l") && got[egress] != w.Egress(c) {
			t.Fatalf("egress %+v: the maps say %t, the model %t; %v", c, got[egress], w.Egress(c), k)
		}
	}
}

type fataler interface{ Fatalf(string, ...any) }

// draws of random objects, few enough that they often meet.
type draws struct{ *rapid.T }

func (d draws) labels(name string) map[string]string {
	out := map[string]string{}
	for _, key := range []string{"app", "tier"} {
		if v := rapid.SampledFrom([]string{"", "a", "b"}).Draw(d.T, name); v != "" {
			out[key] = v
		}
	}
	return out
}

func (d draws) selector() *metav1.LabelSelector {
	switch rapid.IntRange(0, 4).Draw(d.T, "selector") {
	case 0:
		return &metav1.LabelSelector{}
	case 1:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "tier", Operator: metav1.LabelSelectorOpDoesNotExist}}}
	case 2:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"a"}}}}
	}
	return &metav1.LabelSelector{MatchLabels: d.labels("match")}
}

var cidrs = []string{"0.0.0.0/0", "::/0", "10.42.0.0/24", "10.42.0.0/25", "10.42.0.2/32", "192.0.2.0/24", "192.0.2.64/26", "2001:db8::/32", "2001:db8::/48", "fd00::2/128"}

func (d draws) peers() (out []networkingv1.NetworkPolicyPeer) {
	for range rapid.IntRange(0, 2).Draw(d.T, "peers") {
		var p networkingv1.NetworkPolicyPeer
		switch rapid.IntRange(0, 3).Draw(d.T, "peer") {
		case 0:
			p.PodSelector = d.selector()
		case 1:
			p.NamespaceSelector = d.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = d.selector(), d.selector()
		default:
			p.IPBlock = &networkingv1.IPBlock{CIDR: rapid.SampledFrom(cidrs).Draw(d.T, "cidr")}
			for range rapid.IntRange(0, 2).Draw(d.T, "excepts") {
				p.IPBlock.Except = append(p.IPBlock.Except, rapid.SampledFrom(cidrs).Draw(d.T, "except"))
			}
		}
		out = append(out, p)
	}
	return out
}

func (d draws) ports() (out []networkingv1.NetworkPolicyPort) {
	for range rapid.IntRange(0, 2).Draw(d.T, "ports") {
		var p networkingv1.NetworkPolicyPort
		if proto := rapid.SampledFrom([]corev1.Protocol{"", "TCP", "UDP", "SCTP"}).Draw(d.T, "protocol"); proto != "" {
			p.Protocol = &proto
		}
		switch rapid.IntRange(0, 4).Draw(d.T, "port") {
		case 0:
			p.Port = new(intstr.FromString("http"))
		case 1:
			p.Port = new(intstr.FromInt32(80))
		case 2:
			p.Port, p.EndPort = new(intstr.FromInt32(rapid.Int32Range(1, 81).Draw(d.T, "first"))), new(rapid.Int32Range(81, 65535).Draw(d.T, "last"))
		case 3:
			p.Port, p.EndPort = new(intstr.FromInt32(1)), new(int32(65535))
		}
		out = append(out, p)
	}
	return out
}

func (d draws) policy(namespace, name string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	np.Spec.PodSelector = *d.selector()
	if rapid.Bool().Draw(d.T, "is ingress") {
		np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		for range rapid.IntRange(0, 2).Draw(d.T, "rules") {
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: d.peers(), Ports: d.ports()})
		}
	}
	if len(np.Spec.PolicyTypes) == 0 || rapid.Bool().Draw(d.T, "is egress") {
		np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		for range rapid.IntRange(0, 2).Draw(d.T, "rules") {
			np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: d.peers(), Ports: d.ports()})
		}
	}
	return np
}

func (d draws) pod(i int) *corev1.Pod {
	name := fmt.Sprintf("%c%d", "lr"[i%2], i)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns", i/2%2), Name: name, UID: types.UID(name), Labels: d.labels("label")}}
	p.Spec.Containers = []corev1.Container{{Name: "c"}}
	if port := rapid.SampledFrom([]int32{0, 80, 8080}).Draw(d.T, "named"); port != 0 {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "http", Protocol: corev1.ProtocolTCP, ContainerPort: port}}
	}
	p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.42.0.%d", i+1)}, {IP: fmt.Sprintf("fd00::%d", i+1)}}
	return p
}

func replace[T metav1.Object](list []T, name types.NamespacedName, with ...T) []T {
	out := append([]T(nil), with...)
	for _, o := range list {
		if o.GetNamespace() != name.Namespace || o.GetName() != name.Name {
			out = append(out, o)
		}
	}
	return out
}

// TestTableProperty: after any sequence of changes, restarts and failures of one write in ten, the maps say
// what the model says; at no step, and for no program that read a set before, is a connection judged in a
// way that is neither that of before nor that of after; and nothing is left over.
func TestTableProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := draws{t}
		w, k := &world{}, newKernel()
		chance := rapid.SampledFrom([]int{0, 10, 3}).Draw(t, "one in")
		rng := rapid.Uint64().Draw(t, "seed") | 1
		inject := func() bool {
			rng ^= rng << 13
			rng ^= rng >> 7
			rng ^= rng << 17
			return chance > 0 && rng%uint64(chance) == 0
		}
		limits := Limits{Entries: 1 << 20, Set: 1 << 16, Blocks: 1 << 20}
		for i := range 2 {
			w.Namespaces = append(w.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("ns", i), Labels: d.labels("namespace")}})
		}
		w.Cluster.Nodes = []*corev1.Node{{Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Address: "192.0.2.9"}, {Address: "2001:db8::9"}, {Address: "node"}}}}}
		k.state.Epoch = 1
		table := NewTable(w, limits, k.state)

		var conns []model.Connection
		var before, after [][2]bool
		// look judges every connection whose verdict did not change: by what is in the maps now, by the
		// sets that a program may have read just before, and by what it may have looked up there before.
		look := func() {
			k.remember()
			draw := func(from int) int {
				inject()
				return from + int(rng%uint64(len(k.past)-from))
			}
			first := draw(0)
			second := draw(first)
			torn := [3]content{k.past[first], k.past[second], k.now()}
			for i, c := range conns {
				for d := ingress; d <= egress; d++ {
					if before[i][d] != after[i][d] {
						continue
					}
					pod := w.pod(c.To)
					if d == egress {
						pod = w.pod(c.From)
					}
					if pod == nil || !strings.HasPrefix(pod.Name, "l") {
						continue
					}
					slot := slotOf(pod)
					peer := c.From
					if d == egress {
						peer = c.To
					}
					read := torn[0].slots[slot]
					set := [2]uint32{read.Ingress, read.Egress}[d]
					if between, _ := judge(torn, set, peer, protos[c.Proto], uint16(c.Port)); between != before[i][d] && k.state.Version != 0 && c.From != c.To {
						t.Fatalf("%s of %+v is %t for a program that reads meanwhile, but was and will be %t; by %v of %v", d, c, between, before[i][d], read, k)
					}
					for _, sets := range append([]maps.PolicySets{k.slots[slot]}, k.readers[slot]...) {
						got := k.programs(w, c, func(uint32) maps.PolicySets { return sets })
						if got[d] != before[i][d] {
							t.Fatalf("%s of %+v is %t for a moment, but was and will be %t; by %v of %v", d, c, got[d], before[i][d], sets, k)
						}
					}
				}
			}
		}
		change := func(do func()) {
			conns = w.connections()
			before = w.verdicts(conns)
			do()
			after = w.verdicts(conns)
			clear(k.readers)
			k.past = nil
			k.remember()
			k.look, k.fail = look, inject
			for range 1000 {
				if table.Flush(k) == nil {
					break
				}
			}
			k.look, k.fail = func() {}, func() bool { return false }
			if err := table.Flush(k); err != nil {
				t.Fatal(err)
			}
			k.check(t, w)
		}
		for range rapid.IntRange(1, 15).Draw(t, "steps") {
			switch rapid.IntRange(0, 16).Draw(t, "what") {
			case 0, 1, 2, 3:
				np := d.policy(fmt.Sprint("ns", rapid.IntRange(0, 1).Draw(t, "namespace")), fmt.Sprint("p", rapid.IntRange(0, 2).Draw(t, "name")))
				change(func() {
					w.Policies = replace(w.Policies, types.NamespacedName{Namespace: np.Namespace, Name: np.Name}, np)
					table.SetPolicy(np)
				})
			case 4:
				name := types.NamespacedName{Namespace: fmt.Sprint("ns", rapid.IntRange(0, 1).Draw(t, "namespace")), Name: fmt.Sprint("p", rapid.IntRange(0, 2).Draw(t, "name"))}
				change(func() {
					w.Policies = replace(w.Policies, name)
					table.DeletePolicy(name)
				})
			case 5, 6, 7, 8:
				pod := d.pod(rapid.IntRange(0, 7).Draw(t, "pod"))
				change(func() {
					w.Cluster.Pods = replace(w.Cluster.Pods, types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}, pod)
					table.SetPod(PodOf(pod))
					if strings.HasPrefix(pod.Name, "l") {
						table.Attach(slotOf(pod), localOf(pod), k.slots[slotOf(pod)])
					}
				})
			case 9:
				if len(w.Cluster.Pods) == 0 {
					continue
				}
				pod := rapid.SampledFrom(w.Cluster.Pods).Draw(t, "gone")
				change(func() {
					name := types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
					w.Cluster.Pods = replace(w.Cluster.Pods, name)
					table.DeletePod(name)
					if strings.HasPrefix(pod.Name, "l") {
						table.Detach(slotOf(pod))
					}
				})
			case 10:
				ns := rapid.SampledFrom(w.Namespaces).Draw(t, "changed")
				l := d.labels("namespace")
				change(func() {
					ns.Labels = l
					table.SetNamespace(ns.Name)
				})
			case 11, 12, 13:
				o := d.clusterPolicy(fmt.Sprint("c", rapid.IntRange(0, 2).Draw(t, "name")))
				change(func() {
					w.ClusterPolicies = replace(w.ClusterPolicies, types.NamespacedName{Name: o.Name}, o)
					table.SetClusterPolicy(o)
				})
			case 14:
				name := fmt.Sprint("c", rapid.IntRange(0, 2).Draw(t, "name"))
				change(func() {
					w.ClusterPolicies = replace(w.ClusterPolicies, types.NamespacedName{Name: name})
					table.DeleteClusterPolicy(name)
				})
			case 15:
				l := d.labels("node")
				change(func() {
					w.Cluster.Nodes[0] = w.Cluster.Nodes[0].DeepCopy()
					w.Cluster.Nodes[0].Labels = l
					table.SetNodes()
				})
			default: // the process dies and another starts
				k.state.Epoch++
				late := rapid.Bool().Draw(t, "policies are known before pods are attached again")
				change(func() {
					table = NewTable(w, limits, k.state)
					for _, p := range w.locals() { // all of them before the first is attached
						table.Inherit(slotOf(p), k.slots[slotOf(p)])
					}
					for _, p := range w.locals() {
						if !late {
							table.Expect(slotOf(p), localOf(p), k.slots[slotOf(p)], true)
						}
					}
					for _, np := range w.Policies {
						table.Learn(np)
					}
					for _, o := range w.ClusterPolicies {
						table.LearnCluster(o)
					}
					table.ResolveAll()
				})
				if late {
					change(func() {
						for _, p := range w.locals() {
							table.Attach(slotOf(p), localOf(p), k.slots[slotOf(p)])
						}
					})
				}
				k.prune(k.state.Epoch)
			}
			if rapid.Bool().Draw(t, "collect") {
				k.look, k.fail = look, inject
				_ = table.Collect(k, func(SetInfo, uint64) {})
				k.look, k.fail = func() {}, func() bool { return false }
				k.check(t, w)
			}
		}
		if err := table.Collect(k, func(SetInfo, uint64) {}); err != nil {
			t.Fatal(err)
		}
		k.check(t, w)
		if len(k.policy) != table.entries {
			t.Fatalf("%d entries in the kernel, %d are counted", len(k.policy), table.entries)
		}
		// A table that starts now writes the same.
		fresh, other := NewTable(w, limits, maps.PolicyState{Epoch: 1}), newKernel()
		for _, p := range w.locals() {
			fresh.Expect(slotOf(p), localOf(p), maps.PolicySets{}, true)
		}
		for _, np := range w.Policies {
			fresh.Learn(np)
		}
		for _, o := range w.ClusterPolicies {
			fresh.LearnCluster(o)
		}
		fresh.ResolveAll()
		if err := fresh.Flush(other); err != nil {
			t.Fatal(err)
		}
		if len(other.policy) != len(k.policy) || len(other.identities) != len(k.identities) || len(other.drops) != len(k.drops) || (other.state.Version == 0) != (k.state.Version == 0) {
			t.Fatalf("left over: %v; a table that starts now has %v", k, other)
		}
	})
}

func (k *kernel) prune(epoch uint32) {
	scope := epoch << 24
	for key := range k.policy {
		if maps.EpochOf(key.Set) != scope {
			delete(k.policy, key)
		}
	}
	for key := range k.identities {
		if maps.EpochOf(key.Scope) != scope {
			delete(k.identities, key)
		}
	}
	for set := range k.drops {
		if maps.EpochOf(set) != scope {
			delete(k.drops, set)
		}
	}
	clear(k.readers)
}
