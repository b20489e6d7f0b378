// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"maps"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// listen connects the informers; stop disconnects them.
func (s *Scheduler) listen(factory informers.SharedInformerFactory) (synced []cache.InformerSynced, stop func(), err error) {
	core, apps := factory.Core().V1(), factory.Apps().V1()
	var stops []func()
	stop = func() {
		for _, one := range stops {
			one()
		}
	}
	synced = []cache.InformerSynced{factory.Policy().V1().PodDisruptionBudgets().Informer().HasSynced}
	for _, source := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{core.Pods().Informer(), handle(s.onPod, s.onPodGone)},
		{core.Nodes().Informer(), handle(s.onNode, s.onNodeGone)},
		{core.Namespaces().Informer(), handle(s.onNamespace, s.onNamespaceGone)},
		{core.Services().Informer(), handle(s.onService, s.onServiceGone)},
		{core.ReplicationControllers().Informer(), handleWorkload(s, "v1/ReplicationController", func(o *v1.ReplicationController) labels.Selector {
			return labels.SelectorFromSet(o.Spec.Selector)
		})},
		{core.PersistentVolumeClaims().Informer(), handle(s.onClaim, s.onClaimGone)},
		{core.PersistentVolumes().Informer(), handle(s.onVolume, s.onVolumeGone)},
		{factory.Storage().V1().StorageClasses().Informer(), handle(s.onClass, s.onClassGone)},
		{apps.ReplicaSets().Informer(), handleWorkload(s, "apps/v1/ReplicaSet", func(o *appsv1.ReplicaSet) labels.Selector { return parsed(o.Spec.Selector) })},
		{apps.StatefulSets().Informer(), handleWorkload(s, "apps/v1/StatefulSet", func(o *appsv1.StatefulSet) labels.Selector { return parsed(o.Spec.Selector) })},
	} {
		registration, err := source.informer.AddEventHandler(source.handler)
		if err != nil {
			stop()
			return nil, nil, err
		}
		stops = append(stops, func() { _ = source.informer.RemoveEventHandler(registration) }) // fails only for a handle that is not its own
		synced = append(synced, registration.HasSynced)
	}
	return synced, stop, nil
}

// handle calls set with a nil before when an object comes, and gone with its last state.
func handle[T any](set func(before, after *T), gone func(*T)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { set(nil, obj.(*T)) },
		UpdateFunc: func(before, after any) { set(before.(*T), after.(*T)) },
		DeleteFunc: func(obj any) {
			if object, ok := last[*T](obj); ok {
				gone(object)
			}
		},
	}
}

// handleWorkload follows the selectors of controllers of one kind, which scores spread by. No pod
// waits for them.
func handleWorkload[T any, P interface {
	*T
	metav1.Object
}](s *Scheduler, kind string, selector func(P) labels.Selector) cache.ResourceEventHandler {
	set := func(object P, selector labels.Selector) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.snapshot.workloads.setController(workloadKey{kind, object.GetNamespace(), object.GetName()}, selector)
	}
	return handle(func(before, after *T) {
		// Their status changes all the time, their selectors hardly ever.
		if before == nil || P(before).GetGeneration() != P(after).GetGeneration() || P(before).GetUID() != P(after).GetUID() {
			set(after, selector(after))
		}
	}, func(object *T) { set(object, nil) })
}

func (s *Scheduler) onNamespace(before, after *v1.Namespace) {
	if before != nil && maps.Equal(before.Labels, after.Labels) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot.topology.setNamespace(after.Name, after.Labels)
	s.wakeForNamespace(s.now())
}

func (s *Scheduler) onNamespaceGone(object *v1.Namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot.topology.setNamespace(object.Name, nil)
}

func (s *Scheduler) onService(before, after *v1.Service) {
	if before != nil && maps.Equal(before.Spec.Selector, after.Spec.Selector) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot.workloads.setService(after.Namespace, after.Name, after.Spec.Selector)
}

func (s *Scheduler) onServiceGone(object *v1.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot.workloads.setService(object.Namespace, object.Name, nil)
}

// last returns the final state of a deleted object, also when the deletion itself was missed.
func last[T any](obj any) (T, bool) {
	if tombstone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = tombstone.Obj
	}
	object, ok := obj.(T)
	return object, ok
}

// finished pods hold no resources.
func finished(object *v1.Pod) bool {
	return object.Status.Phase == v1.PodSucceeded || object.Status.Phase == v1.PodFailed
}

// ours says whether an unbound pod is for this scheduler to place now.
func (s *Scheduler) ours(object *v1.Pod) bool {
	return s.snapshot.profiles[object.Spec.SchedulerName] != nil && object.DeletionTimestamp == nil && len(object.Spec.SchedulingGates) == 0
}

func (s *Scheduler) onPod(before, after *v1.Pod) {
	if before != nil && before.UID != after.UID {
		// Another pod of the same name: the informer did not see, or joined, what was in between.
		s.onPodGone(before)
		before = nil
	}
	switch {
	case finished(after):
		s.onPodGone(after)
	case after.Spec.NodeName != "":
		s.onBound(newPod(after))
	case !s.ours(after):
		s.onPodGone(after)
	case before != nil && s.ours(before) && apiequality.Semantic.DeepEqual(before.Spec, after.Spec) && maps.Equal(before.Labels, after.Labels):
		// Only status or annotations changed, most likely by our own report: no reason to try again.
		s.mu.Lock()
		defer s.mu.Unlock()
		if item := s.queue.byUID[after.UID]; item != nil {
			item.pod.object = after
		}
	default:
		s.onPending(newPendingPod(after))
	}
}

// onBound accounts a pod where the API says it is, whoever put it there.
func (s *Scheduler) onBound(p *pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.dequeue(p, now)
	earlier := s.snapshot.pods[p.uid]
	var room *node // that the change set free
	if earlier != nil && (earlier.node != p.object.Spec.NodeName || shrank(earlier, p)) {
		room = s.snapshot.byName[earlier.node]
	}
	s.snapshot.setPod(p, p.object.Spec.NodeName)
	s.wakeFor(room, now)
	s.wakeForPod(podChange{before: earlier, after: p}, now)
}

// shrank says whether a resize gave something back.
func shrank(before, after *pod) bool {
	a, b := &before.requests, &after.requests
	return b.milliCPU < a.milliCPU || b.memory < a.memory || b.ephemeral < a.ephemeral
}

func (s *Scheduler) onPending(p *pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.binding[p.uid] != nil || s.snapshot.pods[p.uid] != nil {
		return // decided already; if the binding fails, the newest version is fetched
	}
	if earlier := s.queue.byUID[p.uid]; earlier != nil && earlier.pod.nominated != "" && earlier.pod.nominated != p.nominated {
		s.release(earlier.pod, s.now())
	}
	if nominated := p.nominated; nominated != "" {
		p.nominated = ""
		s.snapshot.nominate(p, nominated)
	}
	s.queue.put(p, s.now())
	s.poke()
}

func (s *Scheduler) onPodGone(object *v1.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if item := s.queue.byUID[object.UID]; item != nil {
		s.dequeue(item.pod, now)
	}
	delete(s.doomed, object.UID)
	defer s.pokeWait(object.UID)
	earlier := s.snapshot.pods[object.UID]
	if earlier == nil {
		return
	}
	s.wakeFor(s.snapshot.removePod(object.UID), now)
	s.wakeForPod(podChange{before: earlier}, now)
}

// dequeue forgets that a pod waits, and the room that was kept for it.
func (s *Scheduler) dequeue(p *pod, now time.Time) {
	if item := s.queue.byUID[p.uid]; item != nil {
		s.queue.remove(p.uid)
		if item.pod.nominated != "" {
			s.release(item.pod, now)
		}
	}
}

func (s *Scheduler) onNode(before, after *v1.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.snapshot.setNode(after)
	if before == nil || matters(before, after) {
		s.wakeFor(n, s.now())
		s.wakeForDomains(before, after, len(n.pods), s.now())
	}
}

func (s *Scheduler) onNodeGone(object *v1.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	n := s.snapshot.byName[object.Name]
	if n == nil {
		return
	}
	var waiting []*pod
	for _, p := range n.nominated {
		waiting = append(waiting, p)
	}
	for uid := range n.pods {
		s.pokeWait(uid)
	}
	s.snapshot.removeNode(object.Name)
	s.wakeForDomains(object, nil, len(n.pods), now)
	for _, p := range waiting {
		s.snapshot.nominate(p, "")
		if item := s.queue.byUID[p.uid]; item != nil {
			s.queue.wake(item, now)
			s.poke()
		}
	}
}

// wakeFor wakes the pods that could now get onto n, and no others: because they fit, or because
// pods of lower priority are all that is in their way. n may be nil.
func (s *Scheduler) wakeFor(n *node, now time.Time) {
	if n == nil || n.object == nil || len(s.queue.asleep) == 0 {
		return
	}
	for _, item := range s.queue.asleep {
		q := s.search.ask(item.pod, s.snapshot)
		v, _ := s.search.check(q, n)
		if v == fits || (v == rejected && s.couldPreempt(item.pod, n)) {
			s.queue.wake(item, now)
			s.poke()
		} else {
			s.queue.blocked(item, 1<<q.failed) // perhaps by something else than at its last try
		}
	}
}

func (s *Scheduler) couldPreempt(p *pod, n *node) bool {
	if policy := p.object.Spec.PreemptionPolicy; policy != nil && *policy == v1.PreemptNever || !s.snapshot.anyBelow(p.priority) {
		return false
	}
	for _, other := range n.pods {
		if other.priority < p.priority && !s.doomed[other.uid] {
			return true
		}
	}
	return false
}

func (s *Scheduler) disruptionBudgets() []*policyv1.PodDisruptionBudget {
	budgets, _ := s.budgets.List(labels.Everything()) // reads the informer's cache: cannot fail
	return budgets
}
