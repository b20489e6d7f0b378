// SPDX-License-Identifier: Apache-2.0

package clusterpolicy

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	api "skep.io/skep/api/clusterpolicy"
)

// TestPlan: the condition follows the policy, names what is not honoured and what happens instead, and settles.
func TestPlan(t *testing.T) {
	everybody := &metav1.LabelSelector{}
	bad := &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Like"}}}
	p := &v1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Generation: 1}, Spec: v1beta1.ClusterNetworkPolicySpec{
		Tier: v1beta1.AdminTier, Subject: v1beta1.ClusterNetworkPolicySubject{Namespaces: everybody},
	}}
	rule := func(a v1beta1.ClusterNetworkPolicyRuleAction, peers ...v1beta1.ClusterNetworkPolicyEgressPeer) v1beta1.ClusterNetworkPolicyEgressRule {
		return v1beta1.ClusterNetworkPolicyEgressRule{Action: a, To: peers}
	}
	peer := func(p v1beta1.ClusterNetworkPolicyEgressPeer) v1beta1.ClusterNetworkPolicyEgressPeer { return p }
	named := rule("Deny", peer(v1beta1.ClusterNetworkPolicyEgressPeer{Nodes: everybody}))
	named.Protocols = []v1beta1.ClusterNetworkPolicyProtocol{{DestinationNamedPort: "http"}}
	for _, c := range []struct {
		what   string
		change func()
		want   []string // in the message; none: it is honoured
	}{
		{"good", func() {
			p.Spec.Egress = []v1beta1.ClusterNetworkPolicyEgressRule{rule("Deny", peer(v1beta1.ClusterNetworkPolicyEgressPeer{Networks: []v1beta1.CIDR{"192.0.2.0/24"}}))}
		}, nil},
		{"names", func() {
			p.Spec.Egress = []v1beta1.ClusterNetworkPolicyEgressRule{rule("Accept", peer(v1beta1.ClusterNetworkPolicyEgressPeer{DomainNames: []v1beta1.DomainName{"example.org"}}))}
		}, []string{"egress[0]: to[0]: domainNames are not supported", "matches nothing"}},
		{"a peer of a later version", func() {
			p.Spec.Egress = []v1beta1.ClusterNetworkPolicyEgressRule{rule("Pass", peer(v1beta1.ClusterNetworkPolicyEgressPeer{}))}
		}, []string{"none of namespaces", "denies everything"}},
		{"names of nodes' ports", func() { p.Spec.Egress = []v1beta1.ClusterNetworkPolicyEgressRule{named} }, []string{"destinationNamedPort"}},
		{"a selector", func() {
			p.Spec.Egress = nil
			p.Spec.Subject = v1beta1.ClusterNetworkPolicySubject{Namespaces: bad}
		}, []string{"subject", "Like", "Deny rules are in force at every pod"}},
		{"good again", func() { p.Spec.Subject = v1beta1.ClusterNetworkPolicySubject{Namespaces: everybody} }, nil},
	} {
		p = p.DeepCopy()
		p.Generation++
		c.change()
		conditions, changed := Plan(p)
		if !changed {
			t.Errorf("%s: nothing changes", c.what)
		}
		p.Status.Conditions = conditions
		got := meta.FindStatusCondition(conditions, api.Condition)
		if got == nil || got.ObservedGeneration != p.Generation || (got.Status == metav1.ConditionTrue) != (len(c.want) == 0) || len(conditions) != 1 {
			t.Fatalf("%s: %+v", c.what, conditions)
		}
		for _, text := range c.want {
			if !strings.Contains(got.Message, text) {
				t.Errorf("%s: message is %q, want %q", c.what, got.Message, text)
			}
		}
		if _, changed := Plan(p); changed {
			t.Errorf("%s: it does not settle", c.what)
		}
	}
}
