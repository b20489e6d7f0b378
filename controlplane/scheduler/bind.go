// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"context"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// callTimeout bounds one API call. Calls do not end with the scheduler's context: a decision whose
// outcome nobody waits for would be one that nobody knows.
const callTimeout = 15 * time.Second

// bind writes a decision and, if that fails, takes it back.
func (s *Scheduler) bind(item *pending, nodeName string, how *choice) {
	p := item.pod
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	began := time.Now()
	err := s.client.CoreV1().Pods(p.key.Namespace).Bind(ctx, &v1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.key.Namespace, Name: p.key.Name, UID: p.uid},
		Target:     v1.ObjectReference{Kind: "Node", Name: nodeName},
	}, metav1.CreateOptions{})
	s.metrics.bound(began)
	if err == nil {
		s.mu.Lock()
		delete(s.binding, p.uid)
		s.mu.Unlock()
		s.metrics.placed(s.now().Sub(item.since), item.attempts)
		s.log.Debug("pod bound", "pod", p.key, "node", nodeName)
		s.recorder.of(p.object).Eventf(p.object, v1.EventTypeNormal, "Scheduled", "Successfully assigned %s/%s to %s%s", p.key.Namespace, p.key.Name, nodeName, how)
		return
	}
	s.bindingFailed(item, nodeName, fmt.Errorf("running Bind plugin %q: %w", "DefaultBinder", err))
}

// bindingFailed finds out whether the pod is bound all the same, and otherwise takes the decision back.
func (s *Scheduler) bindingFailed(item *pending, nodeName string, err error) {
	p := item.pod
	s.log.Warn("binding a pod failed", "pod", p.key, "node", nodeName, "err", err)
	live, settled := s.settle(item)
	if settled && live != nil && live.Spec.NodeName != "" {
		// Bound after all, by the call whose answer got lost or by someone else.
		s.mu.Lock()
		delete(s.binding, p.uid)
		s.mu.Unlock()
		s.onBound(newPod(live))
		return
	}
	s.forget(item, live, settled)
	if live != nil {
		s.reports.tell(report{
			pod: live, reason: v1.PodReasonSchedulerError, nominated: live.Status.NominatedNodeName,
			message: err.Error(),
		})
	}
}

// settle asks the API server what became of the pod, for an error does not say whether the binding
// happened. live is nil when the pod is gone; settled is false when there was no answer.
func (s *Scheduler) settle(item *pending) (live *v1.Pod, settled bool) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	live, err := s.client.CoreV1().Pods(item.pod.key.Namespace).Get(ctx, item.pod.key.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, true
	case err != nil:
		return nil, false
	case live.UID != item.pod.uid: // another pod of the same name
		return nil, true
	}
	return live, true
}

// forget gives back what the pod was assumed to take, unless the informer has said meanwhile that
// it is bound, and queues it again.
func (s *Scheduler) forget(item *pending, live *v1.Pod, settled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	uid := item.pod.uid
	delete(s.binding, uid)
	var room *node
	if s.snapshot.pods[uid] == item.pod { // still the assumption
		room = s.snapshot.removePod(uid)
		s.wakeForPod(podChange{before: item.pod}, now)
	} else if s.snapshot.pods[uid] != nil {
		return
	}
	if settled && live == nil || live != nil && !s.ours(live) {
		s.wakeFor(room, now)
		return
	}
	if live != nil {
		item.pod = newPendingPod(live)
	} else {
		item.pod = newPendingPod(item.pod.object)
	}
	s.queue.byUID[uid] = item
	s.queue.retry(item, now)
	s.wakeFor(room, now)
	s.poke()
}

// makeRoom asks victims to go, in the background, and keeps the room for p meanwhile.
func (s *Scheduler) makeRoom(p *pod, room *preemption, now time.Time) {
	name := room.node.name
	if p.nominated != "" && p.nominated != name {
		s.release(p, now)
	}
	// Pods of lower priority that waited for room here must look elsewhere.
	for _, other := range room.node.nominated {
		if other.priority < p.priority {
			s.snapshot.nominate(other, "")
			if item := s.queue.byUID[other.uid]; item != nil {
				s.queue.wake(item, now)
				s.poke()
			}
		}
	}
	s.snapshot.nominate(p, name)
	var victims []*pod
	for _, victim := range room.victims {
		if !s.doomed[victim.uid] && victim.object.DeletionTimestamp == nil {
			s.doomed[victim.uid] = true
			victims = append(victims, victim)
		}
	}
	s.metrics.victims(len(victims))
	s.work.Go(func() {
		for _, victim := range victims {
			s.evict(victim, p, name)
		}
	})
}

// evict marks and deletes one victim. When that fails the pod that wanted its place tries again.
func (s *Scheduler) evict(victim, p *pod, nodeName string) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	err := patchCondition(ctx, s.client, victim.object, v1.PodCondition{
		Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonPreemptionByScheduler,
		Message: p.object.Spec.SchedulerName + ": preempting to accommodate a higher priority pod",
	}, nil)
	if err == nil {
		err = s.client.CoreV1().Pods(victim.key.Namespace).Delete(ctx, victim.key.Name,
			metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(victim.uid))})
	}
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		s.log.Warn("preempting a pod failed", "victim", victim.key, "for", p.key, "node", nodeName, "err", err)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.doomed, victim.uid)
		if item := s.queue.byUID[p.uid]; item != nil {
			item.erred = true
			s.queue.wake(item, s.now())
			s.poke()
		}
		return
	}
	s.log.Info("pod preempted", "victim", victim.key, "for", p.key, "node", nodeName)
	s.recorder.of(p.object).Eventf(victim.object, v1.EventTypeNormal, "Preempted", "Preempted by pod %s on node %s", p.uid, nodeName)
}
