// SPDX-License-Identifier: Apache-2.0

// Package daemonset keeps one pod of a DaemonSet on every node that it fits, and replaces pods node by node when
// the template changes.
//
// Compute decides which nodes get a pod and which pods go; Status counts. Both are pure. A pod is created for one
// node, by affinity to the node's name, and the scheduler binds it.
package daemonset

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
)

// Kind is how pods and revisions name their owner.
var Kind = appsv1.SchemeGroupVersion.WithKind("DaemonSet")

// burst is how many pods one sync creates, and how many it deletes, at most; the next sync continues.
const burst = 250

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	DaemonSet *appsv1.DaemonSet
	Nodes     []*corev1.Node
	// Pods are all that the DaemonSet controls.
	Pods []*corev1.Pod
	// Hash is what pods of the DaemonSet's current template have in their label controller-revision-hash.
	Hash string
	// BackOff is how long a failed pod on a node must still be left alone; zero if it may be replaced.
	BackOff func(node string) time.Duration
}

// Plan is what to do.
type Plan struct {
	// Create names the nodes that get a pod.
	Create []string
	Delete []*corev1.Pod
	// RequeueAfter is when a failed pod may be replaced; zero if none waits.
	RequeueAfter time.Duration
}

// Compute decides what to do next about a DaemonSet.
func Compute(s Snapshot, now time.Time) Plan {
	if s.DaemonSet.DeletionTimestamp != nil {
		return Plan{}
	}
	p := newPlanner(s, now)
	p.place()
	// A rollout begins, or goes on, where every node has what it should.
	if len(p.plan.Create)+len(p.plan.Delete) == 0 && s.DaemonSet.Spec.UpdateStrategy.Type == appsv1.RollingUpdateDaemonSetStrategyType {
		p.rollOut()
	}
	p.plan.Create = p.plan.Create[:min(len(p.plan.Create), burst)]
	p.plan.Delete = p.plan.Delete[:min(len(p.plan.Delete), burst)]
	return p.plan
}

type planner struct {
	Snapshot
	now        metav1.Time
	fit        fit
	nodes      map[string]*corev1.Node
	generation *int64
	// pods by the node they are for, without those that have ended and are being deleted: nobody but the node
	// or the garbage collector has anything to do with them.
	pods map[string][]*corev1.Pod
	plan Plan
}

func newPlanner(s Snapshot, now time.Time) *planner {
	p := &planner{
		Snapshot: s, now: metav1.NewTime(now), fit: newFit(s.DaemonSet),
		nodes: make(map[string]*corev1.Node, len(s.Nodes)), pods: make(map[string][]*corev1.Pod, len(s.Pods)),
	}
	// An annotation that does not parse only means that the hash alone decides.
	p.generation, _ = util.GetTemplateGeneration(s.DaemonSet)
	for _, node := range s.Nodes {
		p.nodes[node.Name] = node
	}
	for _, pod := range s.Pods {
		if podutil.IsPodTerminal(pod) && pod.DeletionTimestamp != nil {
			continue
		}
		if node, err := util.GetTargetNodeName(pod); err == nil {
			p.pods[node] = append(p.pods[node], pod)
		}
	}
	for _, pods := range p.pods {
		slices.SortFunc(pods, byAge)
	}
	return p
}

// byAge puts bound pods before unbound ones, and older before younger.
func byAge(a, b *corev1.Pod) int {
	return cmp.Or(cmp.Compare(oneIf(a.Spec.NodeName == ""), oneIf(b.Spec.NodeName == "")),
		a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
}

// oneIf orders what is not so before what is.
func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}

// place gives every node what it should have and takes away what it should not.
func (p *planner) place() {
	for _, node := range p.Nodes {
		start, stay := p.fit.on(node)
		pods := p.pods[node.Name]
		switch {
		case start && len(pods) == 0:
			p.plan.Create = append(p.plan.Create, node.Name)
		case stay:
			p.tidy(node.Name, pods, start)
		default:
			p.delete(pods...)
		}
	}
	// A pod for a node that is gone and to which it was never bound is nobody else's.
	for _, node := range slices.Sorted(maps.Keys(p.pods)) {
		if p.nodes[node] != nil {
			continue
		}
		for _, pod := range p.pods[node] {
			if pod.Spec.NodeName == "" {
				p.delete(pod)
			}
		}
	}
}

func (p *planner) delete(pods ...*corev1.Pod) {
	for _, pod := range pods {
		if pod.DeletionTimestamp == nil {
			p.plan.Delete = append(p.plan.Delete, pod)
		}
	}
}

// tidy deletes what has ended on a node, and all but one of what runs there; two may run while one replaces the other.
func (p *planner) tidy(node string, pods []*corev1.Pod, start bool) {
	var running []*corev1.Pod
	for _, pod := range pods {
		switch {
		case pod.DeletionTimestamp != nil:
		case pod.Status.Phase == corev1.PodFailed:
			// The node may refuse every new pod as well; without a pause the two would quarrel forever.
			if wait := p.BackOff(node); wait > 0 {
				if p.plan.RequeueAfter == 0 || wait < p.plan.RequeueAfter {
					p.plan.RequeueAfter = wait
				}
				continue
			}
			p.delete(pod)
		case pod.Status.Phase == corev1.PodSucceeded:
			p.delete(pod)
		default:
			running = append(running, pod)
		}
	}
	// Of several, one that works must not go for one that does not, even if that is older.
	slices.SortStableFunc(running, func(a, b *corev1.Pod) int {
		return cmp.Compare(oneIf(!podutil.IsPodReady(a)), oneIf(!podutil.IsPodReady(b)))
	})
	if !util.AllowsSurge(p.DaemonSet) {
		if len(running) > 1 {
			p.delete(running[1:]...)
		}
		return
	}
	if len(running) == 0 && start {
		// The next pod need not wait until the one before has gone.
		p.plan.Create = append(p.plan.Create, node)
	}
	if len(running) <= 1 {
		return
	}
	var old, cur *corev1.Pod
	for _, pod := range running {
		switch isNew := pod.Labels[appsv1.ControllerRevisionHashLabelKey] == p.Hash; {
		case isNew && cur == nil:
			cur = pod
		case !isNew && old == nil:
			old = pod
		default:
			p.delete(pod)
		}
	}
	if old != nil && cur != nil && (!podutil.IsPodReady(old) || p.isAvailable(cur)) {
		p.delete(old)
	}
}

func (p *planner) isAvailable(pod *corev1.Pod) bool {
	return podutil.IsPodAvailable(pod, p.DaemonSet.Spec.MinReadySeconds, p.now)
}

func (p *planner) isUpdated(pod *corev1.Pod) bool {
	return util.IsPodUpdated(pod, p.Hash, p.generation)
}

// Status counts nodes and pods. settled says that the cache has seen what was done for the last generation.
func Status(s Snapshot, settled bool, now time.Time) appsv1.DaemonSetStatus {
	p := newPlanner(s, now)
	status := *s.DaemonSet.Status.DeepCopy()
	if settled {
		status.ObservedGeneration = s.DaemonSet.Generation
	}
	status.DesiredNumberScheduled, status.CurrentNumberScheduled, status.NumberMisscheduled = 0, 0, 0
	status.NumberReady, status.NumberAvailable, status.UpdatedNumberScheduled = 0, 0, 0
	for _, node := range s.Nodes {
		start, _ := p.fit.on(node)
		pods := p.pods[node.Name]
		if !start {
			if len(pods) > 0 {
				status.NumberMisscheduled++
			}
			continue
		}
		status.DesiredNumberScheduled++
		if len(pods) == 0 {
			continue
		}
		status.CurrentNumberScheduled++
		// While one pod replaces another, the older one counts.
		pod := pods[0]
		if podutil.IsPodReady(pod) {
			status.NumberReady++
			if p.isAvailable(pod) {
				status.NumberAvailable++
			}
		}
		if p.isUpdated(pod) {
			status.UpdatedNumberScheduled++
		}
	}
	status.NumberUnavailable = status.DesiredNumberScheduled - status.NumberAvailable
	return status
}
