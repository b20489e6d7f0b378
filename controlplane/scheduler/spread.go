// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"math"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

const (
	reasonSpreadLabel = "node(s) didn't match pod topology spread constraints (missing required label)"
	reasonSpread      = "node(s) didn't match pod topology spread constraints"
)

// spreadConstraint is a topologySpreadConstraint, ready to be asked for.
type spreadConstraint struct {
	maxSkew, minDomains int
	key                 string
	also                []string // the other keys that nodes need to count
	selector            podSelector
	self                int // 1 if it means the pod itself
	eligibleID          string
	eligible            func(*node) bool
}

// spreadTally is a constraint with the pods that it means, by domain.
type spreadTally struct {
	*spreadConstraint
	*tally
}

func (c *spreadConstraint) tally(p *pod, t *topology) spreadTally {
	return spreadTally{c, t.ask([]podSelector{c.selector}, true, true, c.key, c.also, c.eligibleID, c.eligible)}
}

// spreadConstraints are those of a pod's that have the action. p.required must be set.
func spreadConstraints(p *pod, action v1.UnsatisfiableConstraintAction) []spreadConstraint {
	var result []spreadConstraint
	var keys []string
	all := p.object.Spec.TopologySpreadConstraints
	for i := range all {
		if all[i].WhenUnsatisfiable == action {
			keys = append(keys, all[i].TopologyKey)
		}
	}
	for i := range all {
		c := &all[i]
		if c.WhenUnsatisfiable != action {
			continue
		}
		selector := withKeys(parsed(c.LabelSelector), c.MatchLabelKeys, p.object.Labels)
		one := newSpreadConstraint(p.key.Namespace, c.MaxSkew, c.TopologyKey, selector)
		if c.MinDomains != nil {
			one.minDomains = int(*c.MinDomains)
		}
		if selector.Matches(labels.Set(p.object.Labels)) {
			one.self = 1
		}
		for _, key := range keys {
			if key != c.TopologyKey && !slices.Contains(one.also, key) {
				one.also = append(one.also, key)
			}
		}
		slices.Sort(one.also)
		affinity := c.NodeAffinityPolicy == nil || *c.NodeAffinityPolicy == v1.NodeInclusionPolicyHonor
		taints := c.NodeTaintsPolicy != nil && *c.NodeTaintsPolicy == v1.NodeInclusionPolicyHonor
		one.eligibleID, one.eligible = eligibility(p, affinity, taints)
		result = append(result, one)
	}
	return result
}

func newSpreadConstraint(namespace string, maxSkew int32, key string, selector labels.Selector) spreadConstraint {
	if selector.Empty() {
		selector = labels.Nothing() // as upstream: the selector of all pods counts none
	}
	return spreadConstraint{
		maxSkew: int(maxSkew), minDomains: 1, key: key,
		selector: newPodSelector([]string{namespace}, labels.Nothing(), selector),
	}
}

// withKeys adds to a selector that pods have the same values of some labels (matchLabelKeys).
func withKeys(selector labels.Selector, keys []string, of map[string]string) labels.Selector {
	same := labels.Set{}
	for _, key := range keys {
		if value, ok := of[key]; ok {
			same[key] = value
		}
	}
	if len(same) == 0 {
		return selector
	}
	requirements, selectable := selector.Requirements()
	if !selectable {
		return selector
	}
	return labels.SelectorFromSet(same).Add(requirements...)
}

// eligibility is which nodes count for a pod's constraint, with an id that is equal when they are.
func eligibility(p *pod, affinity, taints bool) (id string, eligible func(*node) bool) {
	affinity = affinity && p.required != nil
	if !affinity && !taints {
		return "", nil
	}
	var b strings.Builder
	if affinity {
		b.WriteString(labels.Set(p.object.Spec.NodeSelector).String())
		b.WriteByte('&')
		if terms := requiredNodeTerms(p.object); terms != nil {
			b.WriteString(terms.String())
		}
	}
	if taints {
		b.WriteByte('#')
		for i := range p.object.Spec.Tolerations {
			t := &p.object.Spec.Tolerations[i]
			b.WriteString(string(t.Operator) + " " + t.Key + "=" + t.Value + ":" + string(t.Effect) + ",")
		}
	}
	return b.String(), func(n *node) bool {
		if affinity {
			if match, _ := p.required.Match(n.object); !match {
				return false
			}
		}
		return !taints || toleratesHard(p, n)
	}
}

func toleratesHard(p *pod, n *node) bool {
	for i := range n.hard {
		if !tolerates(p, &n.hard[i]) {
			return false
		}
	}
	return true
}

// defaultConstraints are for pods that have none. A nil selector means no replicas.
func (p *profile) defaultConstraints(namespace string, selector labels.Selector) []spreadConstraint {
	if selector == nil || selector.Empty() {
		return nil
	}
	all := make([]spreadConstraint, len(p.spreads))
	for i, s := range p.spreads {
		all[i] = newSpreadConstraint(namespace, s.maxSkew, s.key, selector)
	}
	return all
}

// topologySpread rejects a node in whose domain there would be more pods, by more than maxSkew, than
// in the emptiest one.
func topologySpread(q *query, n *node, why []string) (verdict, []string) {
	q.resolve()
	for i := range q.hard {
		c := &q.hard[i]
		if _, ok := n.object.Labels[c.spreadConstraint.key]; !ok {
			return unresolvable, append(why, reasonSpreadLabel)
		}
		fewest := 0
		if c.of.count >= c.minDomains {
			fewest = c.fewest()
		}
		if c.in(n)+c.self-fewest > c.maxSkew {
			return rejected, append(why, reasonSpread)
		}
	}
	return fits, why
}

// spreadScores sets raw[i] to how crowded the domains of nodes[i] are, -1 where the pod's own
// constraints do not apply.
func spreadScores(q *query, nodes []*node, raw []int64) {
	own := q.profile.ownSpreads || len(q.pod.object.Spec.TopologySpreadConstraints) > 0
	applies := func(n *node) bool {
		if !own {
			return true // nodes without a zone still spread by their names
		}
		for i := range q.soft {
			if _, ok := n.object.Labels[q.soft[i].spreadConstraint.key]; !ok {
				return false
			}
		}
		return true
	}
	counted := 0
	for i, n := range nodes {
		if raw[i] = 0; applies(n) {
			counted++
		} else {
			raw[i] = -1
		}
	}
	sums := make([]float64, len(nodes))
	for i := range q.soft {
		c := &q.soft[i]
		size := counted
		if c.spreadConstraint.key != v1.LabelHostname {
			size = distinct(nodes, raw, c.spreadConstraint.key)
		}
		// Logarithmic, so that the counts of few, large domains do not drown in those of many small.
		weight := math.Log(float64(size + 2))
		for j, n := range nodes {
			if raw[j] < 0 {
				continue
			}
			if _, ok := n.object.Labels[c.spreadConstraint.key]; ok {
				sums[j] += float64(c.in(n))*weight + float64(c.maxSkew-1)
			}
		}
	}
	for i := range raw {
		if raw[i] >= 0 {
			raw[i] = int64(math.Round(sums[i]))
		}
	}
}

// distinct counts the values of a label; its absence is one of them.
func distinct(nodes []*node, raw []int64, key string) int {
	seen := map[string]bool{}
	for i, n := range nodes {
		if raw[i] >= 0 {
			seen[n.object.Labels[key]] = true
		}
	}
	return len(seen)
}

// scaleSpread gives the emptiest domains the most, and nodes that are left out nothing.
func scaleSpread(raw []int64) {
	least, most := int64(math.MaxInt64), int64(0)
	for _, value := range raw {
		if value >= 0 {
			least, most = min(least, value), max(most, value)
		}
	}
	for i, value := range raw {
		switch {
		case value < 0:
			raw[i] = 0
		case most == 0:
			raw[i] = maxScore
		default:
			raw[i] = maxScore * (most + least - value) / most
		}
	}
}

// workloadKey names a controller of pods.
type workloadKey struct{ kind, namespace, name string }

// workloads knows which pods are replicas of one another: those of the same Services and the same
// controller.
type workloads struct {
	controllers map[workloadKey]labels.Selector
	services    finder[*service]
	byName      map[string]*service // by namespace/name
}

type service struct {
	selector podSelector
	labels   labels.Set
}

func newWorkloads() *workloads {
	return &workloads{controllers: map[workloadKey]labels.Selector{}, byName: map[string]*service{}}
}

// setService follows a Service; without selector it means no pods, and one that is gone has none.
func (w *workloads) setService(namespace, name string, selects map[string]string) {
	key := namespace + "/" + name
	if old := w.byName[key]; old != nil {
		w.services.drop(&old.selector, old)
		delete(w.byName, key)
	}
	if selects == nil {
		return
	}
	s := &service{newPodSelector([]string{namespace}, labels.Nothing(), labels.Set(selects).AsSelectorPreValidated()), selects}
	w.byName[key] = s
	w.services.put(&s.selector, s)
}

func (w *workloads) setController(key workloadKey, selector labels.Selector) {
	if selector == nil {
		delete(w.controllers, key)
		return
	}
	w.controllers[key] = selector
}

// selector of a pod's replicas; nil when nothing is known to make replicas of it.
func (w *workloads) selector(p *pod) (string, labels.Selector) {
	var merged labels.Set
	w.services.candidates(p.key.Namespace, p.object.Labels, func(s *service) {
		if s.selector.means(p.key.Namespace, nil, p.object.Labels) {
			if merged == nil {
				merged = labels.Set{}
			}
			for key, value := range s.labels {
				merged[key] = value // the pod has all of them, so they agree
			}
		}
	})
	var selector labels.Selector
	if merged != nil {
		selector = merged.AsSelector()
	}
	if owner := metav1.GetControllerOfNoCopy(p.object); owner != nil {
		if own := w.controllers[workloadKey{owner.APIVersion + "/" + owner.Kind, p.key.Namespace, owner.Name}]; own != nil {
			if selector == nil {
				return p.key.Namespace, own
			}
			if requirements, selectable := own.Requirements(); selectable {
				selector = selector.Add(requirements...)
			}
		}
	}
	return p.key.Namespace, selector
}
