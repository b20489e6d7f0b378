// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"skep.io/skep/dataplane/maps"
)

func (d draws) namespacedPod() *v1beta1.NamespacedPod {
	return &v1beta1.NamespacedPod{NamespaceSelector: *d.selector(), PodSelector: *d.selector()}
}

func (d draws) action() v1beta1.ClusterNetworkPolicyRuleAction {
	return rapid.SampledFrom([]v1beta1.ClusterNetworkPolicyRuleAction{"Accept", "Deny", "Pass"}).Draw(d.T, "action")
}

// protocols: names only where every peer has some.
func (d draws) protocols(names bool) (out []v1beta1.ClusterNetworkPolicyProtocol) {
	port := func() *v1beta1.Port {
		if rapid.Bool().Draw(d.T, "one port") {
			return &v1beta1.Port{Number: rapid.SampledFrom([]int32{80, 81, 8080}).Draw(d.T, "port")}
		}
		return &v1beta1.Port{Range: &v1beta1.PortRange{Start: rapid.Int32Range(1, 80).Draw(d.T, "start"), End: rapid.Int32Range(81, 65535).Draw(d.T, "end")}}
	}
	for range rapid.IntRange(0, 2).Draw(d.T, "protocols") {
		var p v1beta1.ClusterNetworkPolicyProtocol
		switch what := rapid.IntRange(0, 4).Draw(d.T, "protocol"); {
		case what == 0 && names:
			p.DestinationNamedPort = "http"
		case what == 1:
			p.UDP = &v1beta1.ClusterNetworkPolicyProtocolUDP{DestinationPort: port()}
		case what == 2:
			p.SCTP = &v1beta1.ClusterNetworkPolicyProtocolSCTP{DestinationPort: port()}
		case what == 3:
			p.TCP = &v1beta1.ClusterNetworkPolicyProtocolTCP{}
		default:
			p.TCP = &v1beta1.ClusterNetworkPolicyProtocolTCP{DestinationPort: port()}
		}
		out = append(out, p)
	}
	return out
}

func (d draws) clusterPolicy(name string) *v1beta1.ClusterNetworkPolicy {
	o := &v1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	o.Spec.Tier = rapid.SampledFrom([]v1beta1.Tier{v1beta1.AdminTier, v1beta1.BaselineTier}).Draw(d.T, "tier")
	o.Spec.Priority = rapid.Int32Range(0, 2).Draw(d.T, "priority")
	if rapid.Bool().Draw(d.T, "subject") {
		o.Spec.Subject.Namespaces = d.selector()
	} else {
		o.Spec.Subject.Pods = d.namespacedPod()
	}
	for range rapid.IntRange(0, 3).Draw(d.T, "ingress rules") {
		r := v1beta1.ClusterNetworkPolicyIngressRule{Action: d.action(), Protocols: d.protocols(true)}
		for range rapid.IntRange(1, 2).Draw(d.T, "peers") {
			var p v1beta1.ClusterNetworkPolicyIngressPeer
			switch rapid.IntRange(0, 9).Draw(d.T, "peer") {
			case 0: // of a version that this one does not know
			case 1, 2, 3, 4:
				p.Namespaces = d.selector()
			default:
				p.Pods = d.namespacedPod()
			}
			r.From = append(r.From, p)
		}
		o.Spec.Ingress = append(o.Spec.Ingress, r)
	}
	for range rapid.IntRange(0, 3).Draw(d.T, "egress rules") {
		r := v1beta1.ClusterNetworkPolicyEgressRule{Action: d.action()}
		names := true
		for range rapid.IntRange(1, 2).Draw(d.T, "peers") {
			var p v1beta1.ClusterNetworkPolicyEgressPeer
			switch rapid.IntRange(0, 9).Draw(d.T, "peer") {
			case 0:
			case 1, 2:
				p.Namespaces = d.selector()
			case 3, 4:
				p.Pods = d.namespacedPod()
			case 5, 6:
				p.Nodes, names = d.selector(), false
			default:
				for range rapid.IntRange(1, 2).Draw(d.T, "networks") {
					p.Networks = append(p.Networks, v1beta1.CIDR(rapid.SampledFrom(cidrs).Draw(d.T, "network")))
				}
				names = false
			}
			r.To = append(r.To, p)
		}
		r.Protocols = d.protocols(names)
		o.Spec.Egress = append(o.Spec.Egress, r)
	}
	return o
}

func everybody() *metav1.LabelSelector { return &metav1.LabelSelector{} }

func denyAll(name string, tier v1beta1.Tier, action v1beta1.ClusterNetworkPolicyRuleAction) *v1beta1.ClusterNetworkPolicy {
	return &v1beta1.ClusterNetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: v1beta1.ClusterNetworkPolicySpec{
			Tier: tier, Subject: v1beta1.ClusterNetworkPolicySubject{Namespaces: everybody()},
			Ingress: []v1beta1.ClusterNetworkPolicyIngressRule{{Action: action, From: []v1beta1.ClusterNetworkPolicyIngressPeer{{Namespaces: everybody()}}}},
		},
	}
}

// TestWhichRule: a drop names the tier and the policy whose rule denies, or the NetworkPolicies that let nothing pass.
func TestWhichRule(t *testing.T) {
	w, k, table := fixture()
	local := localOf(w.Cluster.Pods[0]).NamespacedName
	peer := PodOf(w.Cluster.Pods[1]).Addrs[0]
	check := func(want ...string) {
		t.Helper()
		if err := table.Flush(k); err != nil {
			t.Fatal(err)
		}
		set := k.slots[1].Ingress
		allowed, rule := k.judge(set, peer, maps.TCP, 80)
		var names []string
		if !allowed {
			names, _ = table.Denial(set, rule, local, "ingress")
		}
		if !slices.Equal(names, want) {
			t.Errorf("denied by %v, want %v", names, want)
		}
	}
	check()
	table.SetClusterPolicy(denyAll("base", v1beta1.BaselineTier, "Deny"))
	check("Baseline/base")
	table.SetPolicy(policy("isolate", networkingv1.NetworkPolicySpec{}))
	check("ns/isolate")
	first := denyAll("first", v1beta1.AdminTier, "Accept")
	table.SetClusterPolicy(first)
	check()
	second := denyAll("second", v1beta1.AdminTier, "Deny")
	second.Spec.Priority = 1
	table.SetClusterPolicy(second)
	check()
	first = first.DeepCopy()
	first.Spec.Priority = 2
	table.SetClusterPolicy(first)
	check("Admin/second")
	table.SetClusterPolicy(denyAll("passes", v1beta1.AdminTier, "Pass"))
	check("ns/isolate")
	table.DeletePolicy(types.NamespacedName{Namespace: "ns", Name: "isolate"})
	check("Baseline/base")
}

// TestUnknownNamespace: while the labels of a pod's namespace are not known, it is closed.
func TestUnknownNamespace(t *testing.T) {
	w, k, table := fixture()
	namespaces := w.Namespaces
	w.Namespaces = nil
	table.SetClusterPolicy(denyAll("any", v1beta1.AdminTier, "Accept"))
	if err := table.Flush(k); err != nil || k.slots[1].Ingress != maps.PolicyClosed {
		t.Errorf("slot has %+v, %v", k.slots[1], err)
	}
	w.Namespaces = namespaces
	table.SetNamespace("ns")
	if err := table.Flush(k); err != nil || k.slots[1].Ingress == maps.PolicyClosed || k.slots[1].Ingress == 0 {
		t.Errorf("known: slot has %+v, %v", k.slots[1], err)
	}
}

// TestFullTiers: a pod for whose rules there is no room is denied, though nothing denies the others.
func TestFullTiers(t *testing.T) {
	w, k, table := fixture()
	for i := range 150 {
		p := w.Cluster.Pods[1].DeepCopy()
		p.Name, p.Labels, p.Status.PodIPs[0].IP = fmt.Sprint("r", i), map[string]string{"n": fmt.Sprint(i)}, fmt.Sprintf("10.42.1.%d", i)
		w.Cluster.Pods = append(w.Cluster.Pods, p)
	}
	table.SetClusterPolicy(denyAll("all", v1beta1.AdminTier, "Accept"))
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	denied := 0
	set := k.slots[1].Ingress
	for _, p := range w.Cluster.Pods[1:] {
		allowed, rule := k.judge(set, PodOf(p).Addrs[0], maps.TCP, 80)
		if allowed {
			continue
		}
		denied++
		if names, why := table.Denial(set, rule, localOf(w.Cluster.Pods[0]).NamespacedName, "ingress"); why != NotInForce || !slices.Equal(names, []string{"Admin/all"}) {
			t.Errorf("%s is denied by %v: %q", p.Name, names, why)
		}
	}
	// One entry is everybody's; the pod asks itself, too.
	if want := len(w.Cluster.Pods) - 99; denied != want {
		t.Errorf("%d are denied, want %d", denied, want)
	}
	if got := table.Problems()[types.NamespacedName{Name: "all"}]; !strings.Contains(got, "kinds of pods are denied") {
		t.Errorf("problem is %q", got)
	}
	table.DeleteClusterPolicy("all")
	if err := table.Flush(k); err != nil {
		t.Fatal(err)
	}
	if err := table.Collect(k, func(SetInfo, uint64) {}); err != nil || table.entries != 0 || len(k.policy)+len(k.identities) > 0 {
		t.Errorf("left: %v, %d counted, %v", k, table.entries, err)
	}
}
