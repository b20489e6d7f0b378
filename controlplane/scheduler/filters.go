// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	v1 "k8s.io/api/core/v1"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/klog/v2"
)

// verdict is a filter's answer.
type verdict int

const (
	fits verdict = iota
	// rejected: the node does not fit now, but would if other pods went away.
	rejected
	// unresolvable: no other pod's going could make the node fit.
	unresolvable
)

// A filter says whether a pod can run on a node. It appends to why one reason for each thing that
// is in the way, in the words that Kubernetes users know. Filters are pure and do not allocate
// beyond why.
type filter struct {
	name  string
	check func(q *query, n *node, why []string) (verdict, []string)
}

// filters is the list, in the order in which a node's first failure is reported (Kubernetes'
// default order).
var filters = [...]filter{
	{"NodeUnschedulable", nodeUnschedulable},
	{"NodeName", nodeName},
	{"TaintToleration", taintToleration},
	{"NodeAffinity", nodeAffinity},
	{"NodePorts", nodePorts},
	{"NodeResourcesFit", nodeResourcesFit},
	{"VolumeRestrictions", volumeRestrictions},
	{"VolumeBinding", volumeBinding},
	{"PodTopologySpread", topologySpread},
	{"InterPodAffinity", podAffinity},
}

const (
	reasonUnschedulable = "node(s) were unschedulable"
	reasonNodeName      = "node(s) didn't match the requested node name"
	reasonTaints        = "node(s) had untolerated taint(s)"
	reasonAffinity      = "node(s) didn't match Pod's node affinity/selector"
	reasonPorts         = "node(s) didn't have free ports for the requested pod ports"
	reasonPods          = "Too many pods"
	reasonCPU           = "Insufficient cpu"
	reasonMemory        = "Insufficient memory"
	reasonEphemeral     = "Insufficient ephemeral-storage"
)

// comparisonTolerations is off as in Kubernetes 1.36 (feature TaintTolerationComparisonOperators).
const comparisonTolerations = false

// runFilters stops at the first filter that rejects, and notes it in q.failed.
func runFilters(q *query, n *node, why []string) (verdict, []string) {
	for i := range filters {
		if v, why := filters[i].check(q, n, why); v != fits {
			q.failed = i
			return v, why
		}
	}
	return fits, why
}

func tolerates(p *pod, taint *v1.Taint) bool {
	return corev1helpers.TolerationsTolerateTaint(klog.Logger{}, p.object.Spec.Tolerations, taint, comparisonTolerations)
}

var unschedulableTaint = v1.Taint{Key: v1.TaintNodeUnschedulable, Effect: v1.TaintEffectNoSchedule}

func nodeUnschedulable(q *query, n *node, why []string) (verdict, []string) {
	if n.object.Spec.Unschedulable && !tolerates(q.pod, &unschedulableTaint) {
		return unresolvable, append(why, reasonUnschedulable)
	}
	return fits, why
}

func nodeName(q *query, n *node, why []string) (verdict, []string) {
	if want := q.pod.object.Spec.NodeName; want != "" && want != n.name {
		return unresolvable, append(why, reasonNodeName)
	}
	return fits, why
}

func taintToleration(q *query, n *node, why []string) (verdict, []string) {
	if !toleratesHard(q.pod, n) {
		return unresolvable, append(why, reasonTaints)
	}
	return fits, why
}

func nodeAffinity(q *query, n *node, why []string) (verdict, []string) {
	if q.pod.required == nil {
		return fits, why
	}
	// Terms that do not parse match nothing, as the API server let them in before it checked.
	if match, _ := q.pod.required.Match(n.object); !match {
		return unresolvable, append(why, reasonAffinity)
	}
	return fits, why
}

func nodePorts(q *query, n *node, why []string) (verdict, []string) {
	for _, want := range q.pod.ports {
		for used := range n.ports {
			if want.conflicts(used) {
				return rejected, append(why, reasonPorts)
			}
		}
	}
	return fits, why
}

func nodeResourcesFit(q *query, n *node, why []string) (verdict, []string) {
	v := fits
	// lacks notes one resource; what the whole node could not give is beyond other pods' going.
	lacks := func(want, allocatable int64, reason string) {
		why = append(why, reason)
		if v != unresolvable {
			v = rejected
		}
		if want > allocatable {
			v = unresolvable
		}
	}
	if len(n.pods)+1 > n.maxPods {
		why = append(why, reasonPods)
		v = rejected
	}
	r := &q.pod.requests
	if r.empty() {
		return v, why
	}
	if r.milliCPU > 0 && r.milliCPU > n.allocatable.milliCPU-n.requested.milliCPU {
		lacks(r.milliCPU, n.allocatable.milliCPU, reasonCPU)
	}
	if r.memory > 0 && r.memory > n.allocatable.memory-n.requested.memory {
		lacks(r.memory, n.allocatable.memory, reasonMemory)
	}
	if r.ephemeral > 0 && r.ephemeral > n.allocatable.ephemeral-n.requested.ephemeral {
		lacks(r.ephemeral, n.allocatable.ephemeral, reasonEphemeral)
	}
	for i := range r.extended {
		e := &r.extended[i]
		allocatable := n.allocatable.extended[e.name]
		if e.amount > allocatable-n.requested.extended[e.name] {
			lacks(e.amount, allocatable, e.reason)
		}
	}
	return v, why
}
