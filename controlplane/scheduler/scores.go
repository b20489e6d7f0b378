// SPDX-License-Identifier: Apache-2.0

package scheduler

import "math"

// maxScore is the best a node can get from one score before its weight.
const maxScore = 100

// scale says how raw values become 0..maxScore.
type scale int

const (
	asIs    scale = iota // already 0..maxScore
	highest              // the best node of those compared gets maxScore
	lowest               // the node with the smallest value gets the most
)

// A score says how good a node that fits would be. Scores are pure.
type score struct {
	name    string
	weight  int64
	scale   scale
	applies func(p *pod) bool
	of      func(p *pod, n *node, s *snapshot) int64
}

// scores is the list, with Kubernetes' default weights.
var scores = [...]score{
	{"TaintToleration", 3, lowest, always, softTaints},
	{"NodeAffinity", 2, highest, func(p *pod) bool { return p.preferred != nil }, preferredAffinity},
	{"Spread", 2, lowest, func(p *pod) bool { return p.owner != "" }, replicasHere},
	{"LeastAllocated", 1, asIs, always, leastAllocated},
	// A pod without requests changes no balance, and would always go to the same node.
	{"BalancedAllocation", 1, asIs, func(p *pod) bool { return p.requests.milliCPU > 0 || p.requests.memory > 0 }, balancedAllocation},
	{"ImageLocality", 1, asIs, func(p *pod) bool { return len(p.images) > 0 }, imageLocality},
}

func always(*pod) bool { return true }

// runScores fills total (as long as nodes) and uses raw (as long) as scratch space.
func runScores(p *pod, nodes []*node, s *snapshot, total, raw []int64) {
	clear(total)
	for i := range scores {
		sc := &scores[i]
		if !sc.applies(p) {
			continue
		}
		var most int64
		for j, n := range nodes {
			raw[j] = sc.of(p, n, s)
			most = max(most, raw[j])
		}
		for j := range nodes {
			total[j] += sc.weight * normalised(raw[j], most, sc.scale)
		}
	}
}

func normalised(value, most int64, sc scale) int64 {
	switch {
	case sc == asIs:
		return value
	case most == 0 && sc == lowest:
		return maxScore
	case most == 0:
		return 0
	case sc == lowest:
		return maxScore - maxScore*value/most
	default:
		return maxScore * value / most
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

// replicasHere counts pods of the same controller on the node.
func replicasHere(p *pod, n *node, _ *snapshot) int64 {
	return int64(n.owners[p.owner])
}

// leastAllocated is the part of cpu and memory that stays free, averaged.
func leastAllocated(p *pod, n *node, _ *snapshot) int64 {
	var sum, resources int64
	free := func(requested, allocatable int64) {
		if allocatable == 0 {
			return
		}
		resources++
		if requested <= allocatable {
			sum += (allocatable - requested) * maxScore / allocatable
		}
	}
	free(n.scoredCPU+p.requests.scoredCPU, n.allocatable.milliCPU)
	free(n.scoredMemory+p.requests.scoredMemory, n.allocatable.memory)
	if resources == 0 {
		return 0
	}
	return sum / resources
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
