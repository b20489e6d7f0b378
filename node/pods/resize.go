// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/resource"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

// Resize in place (KEP 1287): whoever changes the resources of a pod's spec asks; the node allots them, if it has them
// to give, and then has the pod's cgroups follow.

// allotment is what the node lets a pod have.
type allotment struct {
	// pod is the pod with the resources that it was given, which its spec may exceed. It is nobody's to change.
	pod *corev1.Pod
	// pending is why the spec's resources were not given; nil if they were.
	pending *pending
}

// pending is why a resize waits. Reasons are those of core/v1: Deferred, Infeasible.
type pending struct {
	Reason     string
	Message    string
	Generation int64
	Since      time.Time
}

// resizable names the resources that can change while a container runs.
var resizable = []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory}

// allot decides what a pod may have whose spec asks for more, or less, than it was given. others are the pods of the
// node with what they were given.
func allot(desired *corev1.Pod, was allotment, others []*corev1.Pod, allocatable corev1.ResourceList, now time.Time) allotment {
	have := withResources(desired, was.pod)
	if have == desired {
		return allotment{pod: desired}
	}
	wait := func(reason, message string) allotment {
		p := &pending{Reason: reason, Message: message, Generation: desired.Generation, Since: now}
		if was.pending != nil && was.pending.Reason == reason && was.pending.Generation == desired.Generation {
			p.Since = was.pending.Since
		}
		return allotment{pod: have, pending: p}
	}
	wanted, given := resource.PodRequests(desired, resource.PodResourcesOptions{}), resource.PodRequests(have, resource.PodResourcesOptions{})
	more := false
	for _, name := range resizable {
		want, total := wanted[name], allocatable[name]
		if want.Cmp(given[name]) <= 0 {
			continue
		}
		more = true
		if want.Cmp(total) > 0 {
			return wait(corev1.PodReasonInfeasible, fmt.Sprintf("Node didn't have enough capacity: %s, requested: %d, capacity: %d",
				name, amount(name, &want), amount(name, &total)))
		}
	}
	if !more {
		return allotment{pod: desired}
	}
	others = slices.DeleteFunc(slices.Clone(others), func(p *corev1.Pod) bool {
		return p.UID == desired.UID || podutil.IsPodPhaseTerminal(p.Status.Phase)
	})
	if r := admitResources(desired, others, allocatable); r != nil {
		return wait(corev1.PodReasonDeferred, r.Message)
	}
	return allotment{pod: desired}
}

// withResources is the pod with the resources that another version of it has; the pod itself if they are the same.
func withResources(pod, of *corev1.Pod) *corev1.Pod {
	same := sameRequirements(pod.Spec.Resources, of.Spec.Resources)
	have := map[string]*corev1.ResourceRequirements{}
	for _, c := range containersOf(of) {
		have[c.Name] = &c.Resources
	}
	for _, c := range containersOf(pod) {
		same = same && (have[c.Name] == nil || sameRequirements(&c.Resources, have[c.Name]))
	}
	if same {
		return pod
	}
	out := *pod
	out.Spec.Resources = of.Spec.Resources
	out.Spec.Containers, out.Spec.InitContainers = slices.Clone(pod.Spec.Containers), slices.Clone(pod.Spec.InitContainers)
	for _, list := range [][]corev1.Container{out.Spec.Containers, out.Spec.InitContainers} {
		for i := range list {
			if r := have[list[i].Name]; r != nil {
				list[i].Resources = *r
			}
		}
	}
	return &out
}

// asMade is the pod with the resources that its containers were made with, or were resized to since.
func asMade(pod *corev1.Pod, containers []runtime.Container) *corev1.Pod {
	newest := map[string]*runtime.Container{}
	for i := range containers {
		c := &containers[i]
		if l := newest[c.Name]; c.Resources != nil && (l == nil || c.Attempt > l.Attempt) {
			newest[c.Name] = c
		}
	}
	made := &corev1.Pod{Spec: corev1.PodSpec{Resources: pod.Spec.Resources}}
	for name, c := range newest {
		made.Spec.Containers = append(made.Spec.Containers, corev1.Container{Name: name, Resources: *c.Resources})
	}
	return withResources(pod, made)
}

// sameRequirements compares what can be resized.
func sameRequirements(a, b *corev1.ResourceRequirements) bool {
	return len(differing(a, b)) == 0
}

// differing names the resources of which a and b have other requests or limits.
func differing(a, b *corev1.ResourceRequirements) []corev1.ResourceName {
	if a == nil || b == nil {
		a, b = cmp.Or(a, &corev1.ResourceRequirements{}), cmp.Or(b, &corev1.ResourceRequirements{})
	}
	var out []corev1.ResourceName
	for _, name := range resizable {
		request, limit := a.Requests[name], a.Limits[name]
		if request.Cmp(b.Requests[name]) != 0 || limit.Cmp(b.Limits[name]) != 0 {
			out = append(out, name)
		}
	}
	return out
}

// restartsFor reports whether one of the changes is of a resource that the container wants to be restarted for.
func restartsFor(c *corev1.Container, changes []corev1.ResourceName) bool {
	return slices.ContainsFunc(c.ResizePolicy, func(p corev1.ContainerResizePolicy) bool {
		return p.RestartPolicy == corev1.RestartContainer && slices.Contains(changes, p.ResourceName)
	})
}

// resizeOf names what of a running container is not what its pod was given.
func resizeOf(c *corev1.Container, l *runtime.Container) []corev1.ResourceName {
	if l == nil || l.State != runtime.Running || l.Resources == nil {
		return nil
	}
	return differing(&c.Resources, l.Resources)
}

// resizing reports whether something of the pod does not have the resources yet that it was given.
func (v *view) resizing() bool {
	return slices.ContainsFunc(v.all(), func(c *corev1.Container) bool { return len(resizeOf(c, v.latest[c.Name])) > 0 })
}

// planResize has the cgroups of the pod follow what it was given. Containers that want to be restarted for it are keep's:
// for them the pod's cgroup must be wide enough, before they have ended and after.
func (v *view) planResize(p *Plan) {
	o := v.o
	if o.Sandbox == nil {
		return
	}
	need := !v.roomy() || !v.resizing() && *o.Limits != podLimits(v.pod, o.PodPids)
	for _, c := range v.all() {
		if changes := resizeOf(c, v.latest[c.Name]); len(changes) > 0 && !restartsFor(c, changes) {
			need = true
		}
	}
	if need && p.due(o.ResizeFailure, o.Now) {
		p.do(Action{Kind: Resize})
	}
}

// roomy reports whether the pod's cgroup lets its containers have what they were given.
func (v *view) roomy() bool {
	return v.o.Limits != nil && wider(*v.o.Limits, podLimits(v.pod, v.o.PodPids)) == *v.o.Limits
}

// resizeConditions says how far a resize is; conditions of one that is done go.
func (v *view) resizeConditions(s *corev1.PodStatus, set func(t corev1.PodConditionType, ok bool, reason, message string)) {
	over := podutil.IsPodPhaseTerminal(s.Phase)
	if p := v.o.Pending; p != nil && !over {
		set(corev1.PodResizePending, true, p.Reason, p.Message)
	} else {
		dropCondition(s, corev1.PodResizePending)
	}
	switch f := v.o.ResizeFailure; {
	case over || !v.resizing() && f == nil:
		dropCondition(s, corev1.PodResizeInProgress)
	case f != nil:
		set(corev1.PodResizeInProgress, true, corev1.PodReasonError, f.Message)
	default:
		set(corev1.PodResizeInProgress, true, "", "")
	}
}

func dropCondition(s *corev1.PodStatus, t corev1.PodConditionType) {
	s.Conditions = slices.DeleteFunc(s.Conditions, func(c corev1.PodCondition) bool { return c.Type == t })
}

// reallot decides again on what a pod of another version may have, and then on those that wait for room. Of two pods one
// comes first. Until all pods of the node are known nothing is given away.
func (s *Set) reallot(w *worker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.complete {
		s.deferred[w.shown.Load().UID] = w
		return
	}
	s.allotOne(w)
	s.allotDeferred()
}

// allotMade has a pod that an earlier agent ran keep what its containers have, until all pods of the node are known.
// s.mu is held.
func (s *Set) allotMade(w *worker) {
	desired := w.shown.Load()
	made := asMade(desired, w.containers)
	if made == desired {
		return
	}
	a := &allotment{pod: made}
	for _, c := range desired.Status.Conditions {
		if c.Type == corev1.PodResizePending {
			a.pending = &pending{Reason: c.Reason, Message: c.Message, Generation: c.ObservedGeneration, Since: c.LastTransitionTime.Time}
		}
	}
	w.allotted.Store(a)
	s.deferred[desired.UID] = w
	if s.complete {
		s.allotDeferred()
	}
}

// allotDeferred looks whether there is room now for those that wait for it, the most important first. s.mu is held.
func (s *Set) allotDeferred() {
	waiting := make([]*worker, 0, len(s.deferred))
	for _, d := range s.deferred {
		waiting = append(waiting, d)
	}
	slices.SortFunc(waiting, func(a, b *worker) int {
		return moreUrgent(a.shown.Load(), a.allotted.Load(), b.shown.Load(), b.allotted.Load())
	})
	for _, d := range waiting {
		s.allotOne(d)
	}
}

// moreUrgent orders resizes that wait: by priority, by class of service, by how long they have waited (KEP 1287).
func moreUrgent(p *corev1.Pod, a *allotment, q *corev1.Pod, b *allotment) int {
	class := map[corev1.PodQOSClass]int{corev1.PodQOSGuaranteed: 0, corev1.PodQOSBurstable: 1, corev1.PodQOSBestEffort: 2}
	return cmp.Or(
		cmp.Compare(podPriority(q), podPriority(p)),
		cmp.Compare(class[qos.GetPodQOS(p)], class[qos.GetPodQOS(q)]),
		a.since().Compare(b.since()),
		cmp.Compare(p.UID, q.UID),
	)
}

func (a *allotment) since() time.Time {
	if a.pending == nil {
		return time.Time{}
	}
	return a.pending.Since
}

func podPriority(p *corev1.Pod) int32 {
	if p.Spec.Priority == nil {
		return 0
	}
	return *p.Spec.Priority
}

// allotOne is reallot for one pod alone.
func (s *Set) allotOne(w *worker) {
	defer s.reweigh()
	desired, was := w.shown.Load(), w.allotted.Load()
	if was.pending == nil && withResources(desired, was.pod) == desired {
		w.allotted.Store(&allotment{pod: desired})
		delete(s.deferred, desired.UID)
		return
	}
	now := allot(desired, *was, s.taken(), s.cfg.Allocatable, time.Now())
	w.allotted.Store(&now)
	if now.pending != nil && now.pending.Reason == corev1.PodReasonDeferred && !w.out.Load() {
		s.deferred[desired.UID] = w
	} else {
		delete(s.deferred, desired.UID)
	}
	switch {
	case now.pending == nil && withResources(desired, was.pod) != desired:
		s.event(desired, "", corev1.EventTypeNormal, events.ResizeStarted, "%s", events.PodResizeStartedMsg(klog.Background(), desired, desired.Generation))
		w.post(func() {
			w.resizing, w.volumes.Stale = true, true // downward API volumes show what it was given
			w.resizeFailure = nil
			w.retries.forget(string(Resize))
		})
	case now.pending != nil && (was.pending == nil || was.pending.Reason != now.pending.Reason || was.pending.Generation != now.pending.Generation):
		reason := events.ResizeDeferred
		if now.pending.Reason == corev1.PodReasonInfeasible {
			reason = events.ResizeInfeasible
		}
		s.event(desired, "", corev1.EventTypeWarning, reason, "%s",
			events.PodResizePendingMsg(klog.Background(), desired, now.pending.Reason, now.pending.Message, desired.Generation))
		w.post(func() {})
	}
}

// taken lists the pods that take something of the node, with what they were given. s.mu is held.
func (s *Set) taken() []*corev1.Pod {
	out := make([]*corev1.Pod, 0, len(s.workers))
	for _, w := range s.workers {
		if !w.out.Load() {
			out = append(out, w.allotted.Load().pod)
		}
	}
	return out
}

// leave tells that the pod, which has this uid, takes nothing of the node any more: it is refused, over, deleted or
// about to be.
func (w *worker) leave(uid types.UID) {
	if w.out.Swap(true) {
		return
	}
	s := w.set
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reweigh()
	delete(s.deferred, uid)
	if s.complete {
		s.allotDeferred()
	}
}

// granted is the pod with the resources that the node has given it.
func (w *worker) granted() *corev1.Pod { return withResources(w.pod, w.allotted.Load().pod) }

// resize is the action: what it returns runs in the worker's goroutine.
func (w *worker) resize(a Action, pod *corev1.Pod) func(ctx context.Context) func() {
	containers := slices.Clone(w.containers)
	return func(ctx context.Context) func() {
		limits, err := w.set.resizePod(ctx, pod, containers)
		return func() {
			w.listed = false
			if limits != nil {
				w.limits = limits
			}
			if err == nil {
				w.resizeFailure = nil
				w.retries.forget(a.key())
				return
			}
			if ctx.Err() != nil {
				return
			}
			w.set.stats.failed.WithLabelValues(string(a.Kind)).Inc()
			f := &Failure{Reason: corev1.PodReasonError, Message: err.Error(), RetryAt: w.retries.failed(a.key(), firstRetry, retryLimit)}
			if w.resizeFailure == nil { // not for each try
				w.set.event(pod, "", corev1.EventTypeWarning, events.ResizeError, "%s", events.PodResizeErrorMsg(klog.Background(), pod, pod.Generation, f.Message))
			}
			w.resizeFailure = f
		}
	}
}

// tellResized says once that a resize is complete.
func (w *worker) tellResized(o *Observed) {
	if !w.resizing || o.Limits == nil || o.ResizeFailure != nil || o.Pending != nil {
		return
	}
	pod := w.granted()
	if v := look(pod, o); v.resizing() || *o.Limits != podLimits(pod, o.PodPids) {
		return
	}
	w.resizing = false
	w.set.event(pod, "", corev1.EventTypeNormal, events.ResizeCompleted, "%s", events.PodResizeCompletedMsg(klog.Background(), pod, pod.Generation))
}

// resizePod has the pod's cgroups follow. The pod's own is widened before its containers and narrowed after them, as no
// container's may have more than the pod's. Begun anew after an error it does the same again. limits are what the pod's
// cgroup has now; nil if that is not known.
func (s *Set) resizePod(ctx context.Context, pod *corev1.Pod, containers []runtime.Container) (limits *cgroup.Limits, err error) {
	want := podLimits(pod, s.cfg.Terms.PodPids)
	wide := wider(podLimits(asMade(pod, containers), s.cfg.Terms.PodPids), want)
	if err := s.cfg.Sandboxes.Limit(ctx, pod.UID, wide); err != nil {
		return nil, err
	}
	var errs []error
	v := look(pod, &Observed{Containers: containers})
	for _, c := range v.all() {
		l := v.latest[c.Name]
		if changes := resizeOf(c, l); len(changes) > 0 && !restartsFor(c, changes) {
			errs = append(errs, s.cfg.Runtime.Update(ctx, l.ID, c.Resources))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return &wide, err
	}
	for _, c := range v.all() {
		if restartsFor(c, resizeOf(c, v.latest[c.Name])) {
			return &wide, nil // it still has what it had
		}
	}
	if want == wide {
		return &wide, nil
	}
	if err := s.cfg.Sandboxes.Limit(ctx, pod.UID, want); err != nil {
		return &wide, err
	}
	return &want, nil
}

// wider is what leaves room for both; no limit is the widest.
func wider(a, b cgroup.Limits) cgroup.Limits {
	w := cgroup.Limits{CPUShares: max(a.CPUShares, b.CPUShares), Pids: b.Pids}
	if a.CPUQuota > 0 && b.CPUQuota > 0 {
		w.CPUPeriod, w.CPUQuota = b.CPUPeriod, max(a.CPUQuota, b.CPUQuota)
	}
	if a.MemoryBytes > 0 && b.MemoryBytes > 0 {
		w.MemoryBytes = max(a.MemoryBytes, b.MemoryBytes)
	}
	return w
}
