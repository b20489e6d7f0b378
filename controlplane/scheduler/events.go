// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"time"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// listen connects the informers; stop disconnects them.
func (s *Scheduler) listen(factory informers.SharedInformerFactory) (synced []cache.InformerSynced, stop func(), err error) {
	pods, nodes := factory.Core().V1().Pods().Informer(), factory.Core().V1().Nodes().Informer()
	budgets := factory.Policy().V1().PodDisruptionBudgets().Informer()
	ofPods, err := pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { s.onPod(nil, obj.(*v1.Pod)) },
		UpdateFunc: func(before, after any) { s.onPod(before.(*v1.Pod), after.(*v1.Pod)) },
		DeleteFunc: func(obj any) {
			if object, ok := last[*v1.Pod](obj); ok {
				s.onPodGone(object)
			}
		},
	})
	if err != nil {
		return nil, nil, err
	}
	ofNodes, err := nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { s.onNode(nil, obj.(*v1.Node)) },
		UpdateFunc: func(before, after any) { s.onNode(before.(*v1.Node), after.(*v1.Node)) },
		DeleteFunc: func(obj any) {
			if object, ok := last[*v1.Node](obj); ok {
				s.onNodeGone(object)
			}
		},
	})
	if err != nil {
		return nil, nil, err
	}
	stop = func() {
		_ = pods.RemoveEventHandler(ofPods)   // fails only for a handle that is not its own
		_ = nodes.RemoveEventHandler(ofNodes) // likewise
	}
	return []cache.InformerSynced{ofPods.HasSynced, ofNodes.HasSynced, budgets.HasSynced}, stop, nil
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
func ours(object *v1.Pod) bool {
	return object.Spec.SchedulerName == Name && object.DeletionTimestamp == nil && len(object.Spec.SchedulingGates) == 0
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
	case !ours(after):
		s.onPodGone(after)
	case before != nil && ours(before) && apiequality.Semantic.DeepEqual(before.Spec, after.Spec):
		// Only status or labels changed, most likely by our own report: no reason to try again.
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
	if nominated := p.nominated; nominated != "" {
		p.nominated = ""
		s.snapshot.nominate(p, nominated)
	}
	if earlier := s.queue.byUID[p.uid]; earlier != nil && earlier.pod.nominated != "" && earlier.pod.nominated != p.nominated {
		s.release(earlier.pod, s.now())
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
	s.wakeFor(s.snapshot.removePod(object.UID), now)
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
	s.snapshot.removeNode(object.Name)
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
		v, _ := s.search.check(item.pod, n)
		if v == fits || (v == rejected && s.couldPreempt(item.pod, n)) {
			s.queue.wake(item, now)
			s.poke()
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
