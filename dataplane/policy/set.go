// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"skep.io/skep/dataplane/maps"
)

// set is what one direction of some pods' traffic must satisfy. NetworkPolicies come and go in place (change.go); what else
// changes is another set, with another number.
type set struct {
	number    uint32
	key       string
	direction direction
	policies  []*Policy
	rules     []*rule
	target    *Pod // the pod on the receiving side, for names of ports; nil for egress
	users     int  // directions of pods that lead here
	// left out, as the table was full: these identities are denied
	left map[uint32]bool

	isolated bool                   // there is a NetworkPolicy
	tiered   bool                   // there is a ClusterNetworkPolicy
	tiers    string                 // the part of the key that is about those
	places   map[maps.Tier][]string // the policy of each of their rules

	anybody []maps.PolicyEntry // what everybody may do
	blocks  *blocks
	points  []point           // in order
	classes map[string]*class // by content
	peers   uint32            // numbers of classes that were given out
	size    int               // entries of anybody and of classes
}

// class is addresses of which IP blocks say the same. What is said of a class never changes.
type class struct {
	peer    uint32
	content string
	entries []maps.PolicyEntry
	points  int
}

// setKey is the same for pods that share a set. tiers is its part that is about ClusterNetworkPolicies.
func setKey(d direction, policies []*Policy, pod *Pod, cluster Cluster) (key, tiers string) {
	var b, t strings.Builder
	fmt.Fprint(&b, d)
	named := false
	for _, p := range policies {
		named = named || p.named(d)
		if p.tier == 0 {
			fmt.Fprintf(&b, " %d", p.revision)
			continue
		}
		fmt.Fprintf(&t, " %d", p.revision)
		for i := range p.rules[d] {
			if nodes := p.rules[d][i].nodes; len(nodes) > 0 {
				fmt.Fprint(&t, nodeBlocks(cluster, nodes))
			}
		}
	}
	if named && d == ingress {
		fmt.Fprint(&b, pod.Ports)
	}
	if t.Len() > 0 {
		fmt.Fprint(&b, pod.Namespace) // whose drops are counted
	}
	return b.String() + t.String(), t.String()
}

// newSet has no rules yet; those that it gets are returned.
func newSet(key, tiers string, d direction, policies []*Policy, pod *Pod, cluster Cluster) (*set, []*rule) {
	s := &set{
		key: key, tiers: tiers, direction: d, policies: policies, left: map[uint32]bool{}, places: map[maps.Tier][]string{},
		blocks: newBlocks(), classes: map[string]*class{},
	}
	if d == ingress {
		s.target = pod
	}
	var rules []*rule
	for _, p := range policies {
		s.isolated = s.isolated || p.tier == 0
		s.tiered = s.tiered || p.tier != 0
		for i := range p.rules[d] {
			r := &p.rules[d][i]
			if p.tier != 0 {
				s.places[p.tier] = append(s.places[p.tier], p.String())
				placed := *r
				placed.tier, placed.place = p.tier, len(s.places[p.tier])
				placed.blocks = append(slices.Clone(r.blocks), nodeBlocks(cluster, r.nodes)...)
				r = &placed
			}
			rules = append(rules, r)
		}
	}
	return s, rules
}

// names are those of NetworkPolicies, in their namespace, and TIER/NAME.
func (s *set) names() []string {
	out := make([]string, 0, len(s.policies))
	for _, p := range s.policies {
		if p.tier == 0 {
			out = append(out, p.name.Name)
		} else {
			out = append(out, p.String())
		}
	}
	return out
}

// entries are what these rules say of a peer.
func (s *set) entries(peer uint32, rules []*rule, target *Pod) []maps.PolicyEntry {
	if s.tiered {
		var all []contribution
		for _, r := range rules {
			all = s.contributes(all, r, target, false)
		}
		return s.verdicts(peer, all, peer == maps.PeerAny)
	}
	var use ports
	for _, r := range rules {
		r.open(&use, target, false)
	}
	return use.entries(s.number, peer)
}

// of is what the set says of a pod by its labels and names, beyond what it says of everybody.
func (s *set) of(pod *Pod, namespace labels.Set, identity uint32) []maps.PolicyEntry {
	target := s.target
	if s.direction == egress {
		target = pod
	}
	var use ports
	var all []contribution
	for _, r := range s.rules {
		named := r.anyPeer && s.direction == egress // the rest is said of everybody
		if !named && !r.matches(pod, namespace) {
			continue
		}
		if s.tiered {
			all = s.contributes(all, r, target, named)
		} else {
			r.open(&use, target, named)
		}
	}
	switch {
	case s.tiered && len(all) > 0:
		return s.verdicts(identity, all, false)
	case use.empty():
		return nil
	}
	return use.entries(s.number, identity)
}

// scope is the namespace that all pods of rules are in, or empty.
func (s *set) scope(rules []*rule) string {
	if s.tiered {
		return ""
	}
	for _, r := range rules {
		if r.anyPeer && s.direction == egress && r.named() {
			return ""
		}
		for i := range r.pods {
			if r.pods[i].namespaces != nil {
				return ""
			}
		}
	}
	return s.policies[0].name.Namespace
}

// concerns says whether one of the rules may say something of a pod by its labels and names.
func (s *set) concerns(rules []*rule, pod *Pod, namespace labels.Set) bool {
	for _, r := range rules {
		if r.anyPeer && s.direction == egress && r.named() || r.matches(pod, namespace) {
			return true
		}
	}
	return false
}

// written is what the maps have of an identity. One that was left out is denied: by nothing that lets it pass or, where
// that would not deny it, by one entry.
func (s *set) written(id *identity) []maps.PolicyEntry {
	switch {
	case !s.left[id.number]:
		return s.of(id.pod, id.namespace, id.number)
	case s.tiered:
		return s.closed(id.number)
	}
	return nil
}
