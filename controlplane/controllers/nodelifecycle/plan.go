// SPDX-License-Identifier: Apache-2.0

// Package nodelifecycle watches over nodes: one that shows no sign of life becomes Unknown, conditions
// become taints, and pods of a dead node become unready.
//
// Signs of life are a renewed lease and a new heartbeat in the Ready condition, timed by this process'
// clock, so that clocks of nodes do not matter. Compute decides about one node, ZoneState about many.
package nodelifecycle

import (
	"slices"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Timing is how patient the controller is.
type Timing struct {
	// Grace after the last sign of life until a node is Unknown, StartupGrace for one that never had a
	// Ready condition.
	Grace, StartupGrace time.Duration
}

// DefaultTiming is what a kubelet's ten-second lease renewals are made for.
var DefaultTiming = Timing{Grace: 40 * time.Second, StartupGrace: time.Minute}

// Health is what is remembered about a node.
type Health struct {
	// Seen is when the last sign of life came, by this process' clock.
	Seen      time.Time
	heartbeat metav1.Time
	hasReady  bool
	renewed   *metav1.MicroTime
}

// Observe brings a node's health up to date. The zero Health is that of a node never seen.
func (h Health) Observe(node *corev1.Node, lease *coordinationv1.Lease, now time.Time) Health {
	ready := conditionOf(node, corev1.NodeReady)
	switch {
	case ready == nil && h.Seen.IsZero():
		h.Seen = node.CreationTimestamp.Time
	case ready != nil && (h.Seen.IsZero() || !h.hasReady || !h.heartbeat.Equal(&ready.LastHeartbeatTime)):
		h.Seen = now
	}
	if h.hasReady = ready != nil; h.hasReady {
		h.heartbeat = ready.LastHeartbeatTime
	}
	if lease != nil && lease.Spec.RenewTime != nil && (h.renewed == nil || h.renewed.Before(lease.Spec.RenewTime)) {
		h.renewed = lease.Spec.RenewTime
		h.Seen = now
	}
	return h
}

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Node   *corev1.Node
	Health Health
	Timing Timing
	// AllDisrupted says that no node of the cluster is ready. Then the fault is more likely on this side, and
	// nobody is evicted.
	AllDisrupted bool
}

// Plan is what should be written.
type Plan struct {
	// Conditions, if not nil, replace the node's. Everything else waits until they are stored.
	Conditions []corev1.NodeCondition
	// NotReady says that these conditions end a time of being ready.
	NotReady bool
	// Taints, if Retaint, replace the node's.
	Taints  []corev1.Taint
	Retaint bool
	// Evict, if not nil, is a NoExecute taint to add when the zone's rate allows.
	Evict *corev1.Taint
	// Labels to set.
	Labels map[string]string
	// MarkPods says that the node's pods cannot be ready.
	MarkPods bool
	// RequeueAfter is when silence will have lasted too long; zero if it already has.
	RequeueAfter time.Duration
}

// Compute decides about one node.
func Compute(s Snapshot, now time.Time) Plan {
	grace := s.Timing.Grace
	ready := conditionOf(s.Node, corev1.NodeReady)
	if ready == nil {
		grace = s.Timing.StartupGrace
	}
	var plan Plan
	if silence := now.Sub(s.Health.Seen); silence > grace {
		if conditions, changed := unknown(s.Node, now); changed {
			return Plan{Conditions: conditions, NotReady: ready != nil && ready.Status == corev1.ConditionTrue}
		}
	} else {
		plan.RequeueAfter = grace - silence + time.Millisecond
	}
	plan.MarkPods = ready != nil && ready.Status == corev1.ConditionUnknown
	plan.Labels = labelsFor(s.Node)
	plan.retaint(s, ready, now)
	return plan
}

// unknown is what is left to say about a node that is silent. NetworkUnavailable is not the node's to say
// and stays.
func unknown(node *corev1.Node, now time.Time) (conditions []corev1.NodeCondition, changed bool) {
	conditions = slices.Clone(node.Status.Conditions)
	for _, t := range []corev1.NodeConditionType{corev1.NodeReady, corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		i := slices.IndexFunc(conditions, func(c corev1.NodeCondition) bool { return c.Type == t })
		switch {
		case i < 0:
			conditions = append(conditions, corev1.NodeCondition{
				Type: t, Status: corev1.ConditionUnknown,
				Reason: "NodeStatusNeverUpdated", Message: "Kubelet never posted node status.",
				LastHeartbeatTime: node.CreationTimestamp, LastTransitionTime: metav1.NewTime(now),
			})
			changed = true
		case conditions[i].Status != corev1.ConditionUnknown:
			conditions[i].Status = corev1.ConditionUnknown
			conditions[i].Reason, conditions[i].Message = "NodeStatusUnknown", "Kubelet stopped posting node status."
			conditions[i].LastTransitionTime = metav1.NewTime(now)
			changed = true
		}
	}
	return conditions, changed
}

// conditionTaints says which condition in which status keeps new pods away, and under what key.
var conditionTaints = []struct {
	condition corev1.NodeConditionType
	status    corev1.ConditionStatus
	key       string
}{
	{corev1.NodeReady, corev1.ConditionFalse, corev1.TaintNodeNotReady},
	{corev1.NodeReady, corev1.ConditionUnknown, corev1.TaintNodeUnreachable},
	{corev1.NodeMemoryPressure, corev1.ConditionTrue, corev1.TaintNodeMemoryPressure},
	{corev1.NodeDiskPressure, corev1.ConditionTrue, corev1.TaintNodeDiskPressure},
	{corev1.NodeNetworkUnavailable, corev1.ConditionTrue, corev1.TaintNodeNetworkUnavailable},
	{corev1.NodePIDPressure, corev1.ConditionTrue, corev1.TaintNodePIDPressure},
}

// retaint makes the taints of this controller those that the conditions ask for and leaves others alone.
func (plan *Plan) retaint(s Snapshot, ready *corev1.NodeCondition, now time.Time) {
	wanted := map[corev1.Taint]bool{}
	ours := map[corev1.Taint]bool{
		{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule}: true,
		{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}:       true,
		{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}:    true,
	}
	for _, ct := range conditionTaints {
		taint := corev1.Taint{Key: ct.key, Effect: corev1.TaintEffectNoSchedule}
		ours[taint] = true
		if c := conditionOf(s.Node, ct.condition); c != nil && c.Status == ct.status {
			wanted[taint] = true
		}
	}
	if s.Node.Spec.Unschedulable {
		wanted[corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule}] = true
	}
	evicts := slices.ContainsFunc(s.Node.Spec.Taints, func(t corev1.Taint) bool {
		return t.Effect == corev1.TaintEffectNoExecute && ours[bare(t)]
	})
	switch evict := evictionTaint(ready); {
	case ready == nil:
		// Nothing is known: leave what there is.
		for _, t := range s.Node.Spec.Taints {
			if t.Effect == corev1.TaintEffectNoExecute && ours[bare(t)] {
				wanted[bare(t)] = true
			}
		}
	case evict == nil || s.AllDisrupted:
	case evicts:
		// Its pods are being evicted already: only the reason may change, and that costs no rate.
		wanted[*evict] = true
	default:
		evict.TimeAdded = &metav1.Time{Time: now}
		plan.Evict = evict
	}

	for _, t := range s.Node.Spec.Taints {
		switch {
		case !ours[bare(t)]:
			plan.Taints = append(plan.Taints, t)
		case wanted[bare(t)]:
			plan.Taints = append(plan.Taints, t)
			delete(wanted, bare(t))
		default:
			plan.Retaint = true
		}
	}
	for _, t := range sorted(wanted) {
		t.TimeAdded = &metav1.Time{Time: now}
		plan.Taints = append(plan.Taints, t)
		plan.Retaint = true
	}
}

// evictionTaint is what drives pods off a node, or nil if it is well.
func evictionTaint(ready *corev1.NodeCondition) *corev1.Taint {
	switch {
	case ready == nil || ready.Status == corev1.ConditionTrue:
		return nil
	case ready.Status == corev1.ConditionFalse:
		return &corev1.Taint{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}
	default:
		return &corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}
	}
}

// bare is a taint's identity: key and effect.
func bare(t corev1.Taint) corev1.Taint { return corev1.Taint{Key: t.Key, Effect: t.Effect} }

func sorted(set map[corev1.Taint]bool) []corev1.Taint {
	var taints []corev1.Taint
	for t := range set {
		taints = append(taints, t)
	}
	slices.SortFunc(taints, func(a, b corev1.Taint) int {
		if a.Effect != b.Effect {
			// NoSchedule before NoExecute, the order in which upstream adds them.
			if a.Effect == corev1.TaintEffectNoSchedule {
				return -1
			}
			return 1
		}
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return taints
}

// labelsFor keeps the beta forms of the operating system and architecture labels equal to the stable ones.
func labelsFor(node *corev1.Node) map[string]string {
	var set map[string]string
	for _, pair := range [][2]string{{corev1.LabelOSStable, "beta.kubernetes.io/os"}, {corev1.LabelArchStable, "beta.kubernetes.io/arch"}} {
		value, ok := node.Labels[pair[0]]
		if beta, has := node.Labels[pair[1]]; ok && (!has || beta != value) {
			if set == nil {
				set = map[string]string{}
			}
			set[pair[1]] = value
		}
	}
	return set
}

func conditionOf(node *corev1.Node, t corev1.NodeConditionType) *corev1.NodeCondition {
	for i := range node.Status.Conditions {
		if node.Status.Conditions[i].Type == t {
			return &node.Status.Conditions[i]
		}
	}
	return nil
}
