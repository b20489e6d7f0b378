// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"skep.io/skep/dataplane/maps"
)

// set is what one direction of some pods' traffic must satisfy. It never changes: other rules are
// another set, with another number.
type set struct {
	number    uint32
	key       string
	direction direction
	policies  []*Policy
	rules     []rule
	target    *Pod // the pod on the receiving side, for names of ports; nil for egress
	users     int  // directions of pods that lead here
	// left out, as the table was full: these identities are denied
	left map[uint32]bool
}

// setKey is the same for pods that share a set.
func setKey(d direction, policies []*Policy, pod *Pod) string {
	var b strings.Builder
	fmt.Fprint(&b, d)
	named := false
	for _, p := range policies {
		fmt.Fprintf(&b, " %d", p.revision)
		for _, r := range p.rules[d] {
			for _, port := range r.ports {
				named = named || port.name != ""
			}
		}
	}
	if named && d == ingress {
		fmt.Fprint(&b, pod.Ports)
	}
	return b.String()
}

func newSet(number uint32, key string, d direction, policies []*Policy, pod *Pod) *set {
	s := &set{number: number, key: key, direction: d, policies: policies, left: map[uint32]bool{}}
	if d == ingress {
		s.target = pod
	}
	for _, p := range policies {
		s.rules = append(s.rules, p.rules[d]...)
	}
	return s
}

func (s *set) names() []string {
	out := make([]string, 0, len(s.policies))
	for _, p := range s.policies {
		out = append(out, p.name.Name)
	}
	return out
}

// base is what does not depend on pods: the rules for everybody, and those for IP blocks.
func (s *set) base() (keys []maps.PolicyKey, blocks []Peer) {
	var anybody ports
	for i := range s.rules {
		if s.rules[i].anyPeer {
			s.rules[i].open(&anybody, s.target, false)
		}
	}
	keys = anybody.keys(s.number, maps.PeerAny)
	classes := map[string]uint32{}
	for _, r := range regions(s.rules) {
		peer := uint32(0)
		if len(r.rules) > 0 {
			var known bool
			if peer, known = classes[r.class()]; !known {
				peer = maps.PeerBlock + uint32(len(classes))
				classes[r.class()] = peer
				var use ports
				for _, i := range r.rules {
					s.rules[i].open(&use, s.target, false)
				}
				keys = append(keys, use.keys(s.number, peer)...)
			}
		}
		blocks = append(blocks, Peer{maps.IdentityKeyOf(s.number, r.prefix), peer})
	}
	return keys, blocks
}

// of is what the set lets a pod do by its labels and names, beyond what everybody may.
func (s *set) of(pod *Pod, namespace labels.Set, identity uint32) []maps.PolicyKey {
	target := s.target
	if s.direction == egress {
		target = pod
	}
	var use ports
	for i := range s.rules {
		r := &s.rules[i]
		switch {
		case r.anyPeer && s.direction == egress:
			r.open(&use, target, true)
		case r.matches(pod, namespace):
			r.open(&use, target, false)
		}
	}
	if use.empty() {
		return nil
	}
	return use.keys(s.number, identity)
}
