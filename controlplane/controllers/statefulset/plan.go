// SPDX-License-Identifier: Apache-2.0

// Package statefulset keeps a StatefulSet's pods: each with a name, a number and claims of its own that outlive it,
// started, stopped and replaced in order.
//
// Compute decides which pods and claims to create, change and delete, and counts; it is pure. The controller's
// expectations see to it that no decision is made from a cache that has not yet seen the outcome of the one before.
package statefulset

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// Kind is how pods, claims and revisions name their owner.
var Kind = appsv1.SchemeGroupVersion.WithKind("StatefulSet")

// burst is how many pods one sync creates, and how many it deletes, at most; the next sync continues.
const burst = 500

// Revision is a template and the name under which it is recorded.
type Revision struct {
	Name     string
	Template *corev1.PodTemplateSpec
}

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Set *appsv1.StatefulSet
	// Pods are all that the set controls; they have its name and a number.
	Pods []*corev1.Pod
	// Current is what the set ran before, and what pods below the partition keep; Update is its template of today.
	Current, Update Revision
	// Claim finds a claim in the set's namespace; nil if there is none of that name.
	Claim func(name string) *corev1.PersistentVolumeClaim
}

// Plan is what to do, in this order.
type Plan struct {
	// UpdateClaims are claims with new owners.
	UpdateClaims []*corev1.PersistentVolumeClaim
	// Conflicts name claims that another controller manages: the retention policy passes them over.
	Conflicts []string
	// CreateClaims are missing claims of pods that wait for them.
	CreateClaims []NewClaim
	// UpdatePods are pods with the identity or the volumes that they had lost.
	UpdatePods []*corev1.Pod
	Create     []NewPod
	Delete     []*corev1.Pod
	// Blocked are pods that cannot be created before one of their claims is gone.
	Blocked []Blocked
}

// NewPod is a pod to create after its claims.
type NewPod struct {
	Pod    *corev1.Pod
	Claims []NewClaim
}

// NewClaim is a claim to create for a pod.
type NewClaim struct {
	Claim *corev1.PersistentVolumeClaim
	Pod   *corev1.Pod
}

// Blocked is why a pod cannot be created.
type Blocked struct {
	Pod    *corev1.Pod
	Reason string
}

// Compute decides what to do next about a StatefulSet.
func Compute(s Snapshot, now time.Time) Plan {
	if s.Set.DeletionTimestamp != nil {
		return Plan{}
	}
	p := newPlanner(s, now)
	// Each step begins only when the one before leaves nothing to wait for: first pods that should be there, then
	// those that should not, then those of former templates.
	if p.keepReplicas() && p.deleteCondemned() {
		p.rollOut()
	}
	p.plan.Create = p.plan.Create[:min(len(p.plan.Create), burst)]
	p.plan.Delete = p.plan.Delete[:min(len(p.plan.Delete), burst)]
	return p.plan
}

type planner struct {
	Snapshot
	now     metav1.Time
	ordered bool // one after the other
	start   int
	// end is the first number after the last replica. A set may ask for two billion, so nothing here grows with
	// what it asks for, only with what there is.
	end int
	// replicas are the pods that should be there, by number; condemned are all others, the highest number first.
	replicas  map[int]*corev1.Pod
	condemned []*corev1.Pod
	deleted   map[*corev1.Pod]bool
	plan      Plan
}

func newPlanner(s Snapshot, now time.Time) *planner {
	p := &planner{
		Snapshot: s, now: metav1.NewTime(now), start: startOrdinal(s.Set),
		ordered:  s.Set.Spec.PodManagementPolicy != appsv1.ParallelPodManagement,
		replicas: make(map[int]*corev1.Pod, len(s.Pods)), deleted: map[*corev1.Pod]bool{},
	}
	p.end = p.start + int(*s.Set.Spec.Replicas)
	for _, pod := range s.Pods {
		n, ok := Ordinal(s.Set, pod)
		switch {
		case !ok: // not claimed
		case inRange(s.Set, n):
			p.replicas[n] = pod
		default:
			p.condemned = append(p.condemned, pod)
		}
	}
	slices.SortFunc(p.condemned, func(a, b *corev1.Pod) int { return cmp.Compare(p.ordinal(b), p.ordinal(a)) })
	return p
}

// ordinal is the number of a pod that is known to have one.
func (p *planner) ordinal(pod *corev1.Pod) int {
	n, _ := Ordinal(p.Set, pod)
	return n
}

func (p *planner) isAvailable(pod *corev1.Pod) bool {
	return pod != nil && pod.DeletionTimestamp == nil && podutil.IsPodAvailable(pod, p.Set.Spec.MinReadySeconds, p.now)
}

func (p *planner) delete(pod *corev1.Pod) {
	if pod.DeletionTimestamp == nil && !p.deleted[pod] {
		p.deleted[pod] = true
		p.plan.Delete = append(p.plan.Delete, pod)
	}
}

// keepReplicas creates the pods that are missing, replaces those that ended, and mends the others. It reports whether
// the next step may begin.
func (p *planner) keepReplicas() bool {
	for n := p.start; n < p.end; n++ {
		if !p.keep(n, p.replicas[n]) && p.ordered {
			return false
		}
		if len(p.plan.Create)+len(p.plan.Blocked) == burst {
			return false
		}
	}
	return len(p.plan.Create) == 0
}

// keep reports whether the pod is there and well, so that its successor may begin.
func (p *planner) keep(ordinal int, pod *corev1.Pod) bool {
	if pod == nil {
		p.create(ordinal)
		return false
	}
	if podutil.IsPodTerminal(pod) {
		// Evicted, rejected, or ended by a reboot of its node: its exit code says nothing. The successor has the
		// same name, so this one must be gone first.
		p.delete(pod)
		return false
	}
	if pod.Status.Phase == corev1.PodPending {
		p.plan.CreateClaims = append(p.plan.CreateClaims, p.missingClaims(pod)...)
	}
	if p.ordered && !p.isAvailable(pod) {
		return false
	}
	if pod.DeletionTimestamp == nil {
		if mended := mend(p.Set, pod, ordinal); mended != nil {
			p.plan.UpdatePods = append(p.plan.UpdatePods, mended)
			p.plan.CreateClaims = append(p.plan.CreateClaims, p.missingClaims(pod)...)
		}
	}
	p.retain(ordinal, pod)
	return true
}

func (p *planner) create(ordinal int) {
	pod := newPod(p.Set, p.revisionFor(ordinal), ordinal)
	for i := range p.Set.Spec.VolumeClaimTemplates {
		claim := p.Claim(claimName(p.Set, i, ordinal))
		switch {
		case claim == nil:
		case isStale(p.Set, claim, pod):
			// The collector deletes it after its pod; the next pod must not begin with what was given up. The
			// claim's deletion brings the next sync.
			p.plan.Blocked = append(p.plan.Blocked, Blocked{pod, ""})
			return
		case claim.DeletionTimestamp != nil:
			p.plan.Blocked = append(p.plan.Blocked, Blocked{pod, fmt.Sprintf("pvc %s is being deleted", claim.Name)})
			return
		}
	}
	p.retain(ordinal, pod)
	p.plan.Create = append(p.plan.Create, NewPod{Pod: pod, Claims: p.missingClaims(pod)})
}

// revisionFor is the template of a new pod: the current one below the partition.
func (p *planner) revisionFor(ordinal int) Revision {
	strategy := p.Set.Spec.UpdateStrategy
	keep := 0
	switch {
	case strategy.RollingUpdate != nil && strategy.RollingUpdate.Partition != nil:
		keep = int(*strategy.RollingUpdate.Partition)
	case strategy.RollingUpdate == nil && strategy.Type == appsv1.RollingUpdateStatefulSetStrategyType:
		keep = int(p.Set.Status.CurrentReplicas)
	}
	if ordinal < p.start+keep {
		return p.Current
	}
	return p.Update
}

func (p *planner) missingClaims(pod *corev1.Pod) []NewClaim {
	var missing []NewClaim
	ordinal := p.ordinal(pod)
	for i := range p.Set.Spec.VolumeClaimTemplates {
		if p.Claim(claimName(p.Set, i, ordinal)) == nil {
			missing = append(missing, NewClaim{newClaim(p.Set, i, ordinal), pod})
		}
	}
	return missing
}

// retain gives a pod's claims the owners that the retention policy wants.
func (p *planner) retain(ordinal int, pod *corev1.Pod) {
	for i := range p.Set.Spec.VolumeClaimTemplates {
		claim := p.Claim(claimName(p.Set, i, ordinal))
		if claim == nil {
			continue
		}
		owners, write, conflict := claimOwners(p.Set, claim, pod, inRange(p.Set, ordinal))
		if write {
			owned := claim.DeepCopy()
			owned.OwnerReferences = owners
			p.plan.UpdateClaims = append(p.plan.UpdateClaims, owned)
			if conflict {
				p.plan.Conflicts = append(p.plan.Conflicts, claim.Name)
			}
		}
	}
}

// deleteCondemned scales down from the highest number, one at a time if pods are ordered, and then waits for every
// other to be well; a pod that is not may go if it is the first that is not.
func (p *planner) deleteCondemned() bool {
	// Before any goes: the collector deletes with a pod only what the pod owns.
	for _, pod := range p.condemned {
		p.retain(p.ordinal(pod), pod)
	}
	if !p.ordered {
		for _, pod := range p.condemned {
			p.delete(pod)
		}
		return true
	}
	if len(p.condemned) == 0 {
		return true
	}
	var firstUnwell *corev1.Pod
	for _, pod := range slices.Backward(p.condemned) {
		if !p.isAvailable(pod) {
			firstUnwell = pod
			break
		}
	}
	// One that has ended will never be well.
	if pod := p.condemned[0]; p.isAvailable(pod) || pod == firstUnwell || podutil.IsPodTerminal(pod) {
		p.delete(pod)
	}
	return false
}

// rollOut deletes pods of former templates from the highest number down to the partition.
func (p *planner) rollOut() {
	strategy := p.Set.Spec.UpdateStrategy
	if strategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
		return
	}
	partition := 0
	var most *intstr.IntOrString
	if r := strategy.RollingUpdate; r != nil {
		if r.Partition != nil {
			partition = int(*r.Partition)
		}
		most = r.MaxUnavailable
	}
	if most != nil {
		p.rollOutMany(partition, *most)
		return
	}
	for n := p.end - 1; n >= p.start+partition; n-- {
		switch pod := p.replicas[n]; {
		case pod != nil && pod.DeletionTimestamp == nil && revisionOf(pod) != p.Update.Name:
			p.delete(pod)
			return
		case !p.isAvailable(pod):
			return // it is waited for
		}
	}
}

// rollOutMany deletes as many as may be unavailable at a time.
func (p *planner) rollOutMany(partition int, most intstr.IntOrString) {
	size := p.end - p.start
	allowed, err := intstr.GetScaledValueFromIntOrPercent(&most, size, false)
	if err != nil {
		return // validation admits only whole numbers and percentages
	}
	// Rounded down to zero it would end every rollout.
	allowed = max(allowed, 1) - size
	for _, pod := range p.replicas {
		if p.isAvailable(pod) {
			allowed++
		}
	}
	for _, n := range slices.Backward(slices.Sorted(maps.Keys(p.replicas))) {
		pod := p.replicas[n]
		if allowed <= 0 || n < p.start+partition {
			return
		}
		if pod.DeletionTimestamp == nil && revisionOf(pod) != p.Update.Name {
			p.delete(pod)
			allowed--
		}
	}
}

// Status counts the set's pods. Conditions are for others to write.
func Status(s Snapshot, collisions *int32, now time.Time) appsv1.StatefulSetStatus {
	p := newPlanner(s, now)
	status := appsv1.StatefulSetStatus{
		ObservedGeneration: s.Set.Generation,
		CurrentRevision:    s.Current.Name,
		UpdateRevision:     s.Update.Name,
		CollisionCount:     collisions,
		Conditions:         s.Set.Status.Conditions,
	}
	for _, pod := range slices.Concat(slices.Collect(maps.Values(p.replicas)), p.condemned) {
		status.Replicas++
		if pod.Status.Phase == corev1.PodRunning && podutil.IsPodReady(pod) {
			status.ReadyReplicas++
			if podutil.IsPodAvailable(pod, s.Set.Spec.MinReadySeconds, p.now) {
				status.AvailableReplicas++
			}
		}
		if pod.DeletionTimestamp == nil {
			if revisionOf(pod) == s.Current.Name {
				status.CurrentReplicas++
			}
			if revisionOf(pod) == s.Update.Name {
				status.UpdatedReplicas++
			}
		}
	}
	// A rollout that has reached every pod is over: from now on its template is the current one.
	n := *s.Set.Spec.Replicas
	if s.Set.Spec.UpdateStrategy.Type == appsv1.RollingUpdateStatefulSetStrategyType &&
		status.UpdatedReplicas == n && status.ReadyReplicas == n && status.Replicas == n {
		status.CurrentRevision, status.CurrentReplicas = status.UpdateRevision, status.UpdatedReplicas
	}
	return status
}
