// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"math"
	"slices"
)

// maxScore is the best a node can get from one score before its weight.
const maxScore = 100

// A score says how good nodes that fit would be, compared with each other. Scores are pure.
type score struct {
	name   string
	weight int64
	// applies says whether the pod cares; nil: always.
	applies func(q *query) bool
	// of sets raw[i] for nodes[i]; scale, unless nil, then makes that 0..maxScore.
	of    func(q *query, nodes []*node, raw []int64)
	scale func(raw []int64)
}

// scoreCount stands apart because profiles have as many weights, and scores ask profiles.
const scoreCount = 7

// scores is the list, with Kubernetes' names and default weights; profiles may have others.
var scores = [scoreCount]score{
	{"TaintToleration", 3, nil, each(softTaints), scaleLowest},
	{"NodeAffinity", 2, func(q *query) bool { return q.pod.preferred != nil }, each(preferredAffinity), scaleHighest},
	{"PodTopologySpread", 2, func(q *query) bool { return len(q.soft) > 0 }, spreadScores, scaleSpread},
	{"InterPodAffinity", 2, func(q *query) bool { return len(q.leanings) > 0 }, affinityScores, scaleRange},
	{"NodeResourcesFit", 1, nil, resourceScores, nil},
	// A pod without requests changes no balance, and would always go to the same node.
	{"NodeResourcesBalancedAllocation", 1, func(q *query) bool { return q.pod.requests.milliCPU > 0 || q.pod.requests.memory > 0 }, each(balancedAllocation), nil},
	{"ImageLocality", 1, func(q *query) bool { return len(q.pod.images) > 0 }, each(imageLocality), nil},
}

// each makes a score of what can be said of one node without looking at the others.
func each(one func(p *pod, n *node, s *snapshot) int64) func(*query, []*node, []int64) {
	return func(q *query, nodes []*node, raw []int64) {
		for i, n := range nodes {
			raw[i] = one(q.pod, n, q.snapshot)
		}
	}
}

// runScores fills total, and of each score what it gives the nodes, with its weight. All are as long as nodes.
func runScores(q *query, nodes []*node, total []int64, parts *[scoreCount][]int64) {
	q.resolveScores()
	clear(total)
	for i := range scores {
		sc, weight, part := &scores[i], q.profile.weights[i], parts[i]
		if weight == 0 || sc.applies != nil && !sc.applies(q) {
			clear(part)
			continue
		}
		sc.of(q, nodes, part)
		if sc.scale != nil {
			sc.scale(part)
		}
		for j := range nodes {
			part[j] *= weight
			total[j] += part[j]
		}
	}
}

// scaleHighest gives the best node maxScore.
func scaleHighest(raw []int64) {
	if most := slices.Max(raw); most > 0 {
		for i := range raw {
			raw[i] = maxScore * raw[i] / most
		}
	}
}

// scaleLowest gives a node the more the smaller its value is.
func scaleLowest(raw []int64) {
	scaleHighest(raw)
	for i := range raw {
		raw[i] = maxScore - raw[i]
	}
}

// softTaints counts the PreferNoSchedule taints that the pod does not tolerate.
func softTaints(p *pod, n *node, _ *snapshot) int64 {
	var count int64
	for i := range n.soft {
		if !tolerates(p, &n.soft[i]) {
			count++
		}
	}
	return count
}

// preferredAffinity sums the weights of the preferred terms that match.
func preferredAffinity(p *pod, n *node, _ *snapshot) int64 {
	return p.preferred.Score(n.object)
}

// resourceScores are the part of cpu and memory that stays free, averaged; of what is taken, where the profile packs.
func resourceScores(q *query, nodes []*node, raw []int64) {
	r, p := &q.pod.requests, q.profile
	part := leftFree
	if p.packs {
		part = taken
	}
	for i, n := range nodes {
		cpu, cpuWeight := part(n.scoredCPU+r.scoredCPU, n.allocatable.milliCPU, p.cpuWeight)
		memory, memoryWeight := part(n.scoredMemory+r.scoredMemory, n.allocatable.memory, p.memoryWeight)
		if raw[i] = 0; cpuWeight+memoryWeight > 0 {
			raw[i] = (cpu*cpuWeight + memory*memoryWeight) / (cpuWeight + memoryWeight)
		}
	}
}

// leftFree and taken are parts of maxScore; what a node does not have weighs nothing.
func leftFree(requested, allocatable, weight int64) (part, weighs int64) {
	switch {
	case allocatable == 0:
		return 0, 0
	case requested > allocatable:
		return 0, weight
	}
	return (allocatable - requested) * maxScore / allocatable, weight
}

func taken(requested, allocatable, weight int64) (part, weighs int64) {
	if allocatable == 0 {
		return 0, 0
	}
	return min(requested, allocatable) * maxScore / allocatable, weight
}

// balancedAllocation prefers nodes on which the pod brings the used parts of cpu and memory closer
// to each other: 75 when it changes nothing, up to 100 when it evens out, down to 50 when it skews.
func balancedAllocation(p *pod, n *node, _ *snapshot) int64 {
	with := balance(n.requested.milliCPU+p.requests.milliCPU, n.requested.memory+p.requests.memory, n)
	without := balance(n.requested.milliCPU, n.requested.memory, n)
	return maxScore/2 + (maxScore/2+with-without)/2
}

// balance is maxScore less the standard deviation of the used parts.
func balance(milliCPU, memory int64, n *node) int64 {
	if n.allocatable.milliCPU == 0 || n.allocatable.memory == 0 {
		return maxScore
	}
	cpu := min(1, float64(milliCPU)/float64(n.allocatable.milliCPU))
	mem := min(1, float64(memory)/float64(n.allocatable.memory))
	return int64((1 - math.Abs(cpu-mem)/2) * maxScore)
}

// Images smaller than imageFloor do not matter; above imageCeiling a container they matter fully.
const (
	imageFloor   = 23 << 20
	imageCeiling = 1000 << 20
)

// imageLocality prefers nodes that have the pod's images, the more the larger they are. An image's
// size counts by the part of nodes that have it, so that one node with a rare image is not flooded.
func imageLocality(p *pod, n *node, s *snapshot) int64 {
	var sum int64
	for _, name := range p.images {
		if size, ok := n.images[name]; ok {
			sum += int64(float64(size) * float64(s.imageNodes[name]) / float64(len(s.nodes)))
		}
	}
	ceiling := int64(imageCeiling) * int64(len(p.images))
	sum = min(max(sum, imageFloor), ceiling)
	return maxScore * (sum - imageFloor) / (ceiling - imageFloor)
}
