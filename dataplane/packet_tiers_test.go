// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"skep.io/skep/dataplane/maps"
)

// TestTiers: the programs ask administrators' rules before and after NetworkPolicies, as the tables are tested to.
func TestTiers(t *testing.T) {
	pods := func(app string) *v1beta1.NamespacedPod { return &v1beta1.NamespacedPod{PodSelector: appIs(app)} }
	eachPolicy(t, func(t *testing.T, r *policyRig, i int, s segment) {
		set := func(tier v1beta1.Tier, rules ...v1beta1.ClusterNetworkPolicyEgressRule) {
			t.Helper()
			r.table.SetClusterPolicy(&v1beta1.ClusterNetworkPolicy{
				ObjectMeta: metav1.ObjectMeta{Name: "wide"},
				Spec:       v1beta1.ClusterNetworkPolicySpec{Tier: tier, Subject: v1beta1.ClusterNetworkPolicySubject{Pods: pods("a")}, Egress: rules},
			})
			r.flush(t)
		}
		at8080 := &v1beta1.Port{Number: 8080}
		toB := func(a v1beta1.ClusterNetworkPolicyRuleAction) v1beta1.ClusterNetworkPolicyEgressRule {
			return v1beta1.ClusterNetworkPolicyEgressRule{
				Action: a, To: []v1beta1.ClusterNetworkPolicyEgressPeer{{Pods: pods("b")}},
				Protocols: []v1beta1.ClusterNetworkPolicyProtocol{
					{TCP: &v1beta1.ClusterNetworkPolicyProtocolTCP{DestinationPort: at8080}},
					{UDP: &v1beta1.ClusterNetworkPolicyProtocolUDP{DestinationPort: at8080}},
					{SCTP: &v1beta1.ClusterNetworkPolicyProtocolSCTP{DestinationPort: at8080}},
				},
			}
		}
		everything := v1beta1.ClusterNetworkPolicyEgressRule{
			Action: "Deny", To: []v1beta1.ClusterNetworkPolicyEgressPeer{{Networks: []v1beta1.CIDR{"0.0.0.0/0", "::/0"}}},
		}
		nodes := v1beta1.ClusterNetworkPolicyEgressRule{
			Action: "Accept", To: []v1beta1.ClusterNetworkPolicyEgressPeer{{Nodes: &metav1.LabelSelector{}}},
		}
		try := func(what string, port uint16, want uint32) {
			t.Helper()
			r.wants(t, what, "from_pod", r.between(s, podA[i], podB[i], port).bytes(), want)
		}
		node := func(what string, want uint32) {
			t.Helper()
			r.wants(t, what, "from_pod", r.between(s, podA[i], nodeIP[i], 10250).bytes(), want)
		}
		r.set(t, out("a"))
		try("isolated", 8080, drop)
		node("the node, of an isolated pod", next)

		set(v1beta1.AdminTier, toB("Accept"), everything)
		try("accepted by the administrator", 8080, redirect)
		try("another port", 8081, drop)
		node("the node, denied by the administrator", drop)
		r.wants(t, "names", "from_pod", r.between(s, podA[i], gateway[i], 53).bytes(), next)
		r.wants(t, "another pod", "from_pod", r.between(s, podB[i], podC[i], 8080).bytes(), next)
		set(v1beta1.AdminTier, nodes, everything)
		node("the node, accepted first", next)
		try("denied", 8080, drop)

		set(v1beta1.BaselineTier, toB("Accept"))
		try("a NetworkPolicy comes before the baseline", 8080, drop)
		r.set(t, out("a", podPeer("b")))
		set(v1beta1.BaselineTier, everything)
		try("and lets it pass", 8080, redirect)
		r.unset(t, "out-a")
		try("without one the baseline decides", 8080, drop)
		set(v1beta1.BaselineTier, toB("Pass"), everything)
		try("which may pass it on", 8080, redirect)
		try("and denies the rest", 8081, drop)
		r.table.DeleteClusterPolicy("wide")
		r.flush(t)
		try("open again", 8081, redirect)
		if state, err := r.Maps().PolicyState(); err != nil || state.Version != 0 {
			t.Errorf("state %+v, %v", state, err)
		}
	})
	if maps.TierRules != 4094 {
		t.Error("bpf/policy.h says how many rules fit")
	}
}
