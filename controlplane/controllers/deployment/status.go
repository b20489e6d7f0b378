// SPDX-License-Identifier: Apache-2.0

package deployment

import (
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
)

func (p *planner) status(s appsv1.DeploymentStatus) { p.newStatus = &s }

// counts is the status without any judgement of progress.
func (p *planner) counts() appsv1.DeploymentStatus {
	all := p.everything()
	available := util.GetAvailableReplicaCountForReplicaSets(all)
	s := appsv1.DeploymentStatus{
		ObservedGeneration: p.d.Generation,
		Replicas:           util.GetActualReplicaCountForReplicaSets(all),
		UpdatedReplicas:    util.GetActualReplicaCountForReplicaSets([]*appsv1.ReplicaSet{p.newRS}),
		ReadyReplicas:      util.GetReadyReplicaCountForReplicaSets(all),
		AvailableReplicas:  available,
		// More than wanted may be available while a Deployment shrinks.
		UnavailableReplicas: max(0, util.GetReplicaCountForReplicaSets(all)-available),
		CollisionCount:      p.d.Status.CollisionCount,
		Conditions:          slices.Clone(p.d.Status.Conditions),
	}
	if p.s.TerminatingReplicas {
		s.TerminatingReplicas = util.GetTerminatingReplicaCountForReplicaSets(all)
	}
	if available >= *p.d.Spec.Replicas-util.MaxUnavailable(*p.d) {
		setCondition(&s.Conditions, newCondition(appsv1.DeploymentAvailable, corev1.ConditionTrue,
			util.MinimumReplicasAvailable, "Deployment has minimum availability.", p.now))
	} else {
		setCondition(&s.Conditions, newCondition(appsv1.DeploymentAvailable, corev1.ConditionFalse,
			util.MinimumReplicasUnavailable, "Deployment does not have minimum availability.", p.now))
	}
	return s
}

// progress is the status of a rollout: complete, moving, or stuck for longer than the deadline.
func (p *planner) progress() appsv1.DeploymentStatus {
	s := p.counts()
	was := condition(p.d.Status.Conditions, appsv1.DeploymentProgressing)
	judged := util.HasProgressDeadline(p.d)
	if !judged {
		removeCondition(&s.Conditions, appsv1.DeploymentProgressing)
	}
	// A finished rollout is not judged again: a pod that fails later is no lack of progress.
	finished := s.Replicas == s.UpdatedReplicas && was != nil && was.Reason == util.NewRSAvailableReason

	subject := fmt.Sprintf("Deployment %q", p.d.Name)
	if p.newRS != nil {
		subject = fmt.Sprintf("ReplicaSet %q", p.newRS.Name)
	}
	switch {
	case !judged || finished:
	case p.isComplete(&s):
		setCondition(&s.Conditions, newCondition(appsv1.DeploymentProgressing, corev1.ConditionTrue,
			util.NewRSAvailableReason, subject+" has successfully progressed.", p.now))
	case util.DeploymentProgressing(p.d, &s):
		// The update time restarts the deadline, so this condition is written even if only that differs.
		c := newCondition(appsv1.DeploymentProgressing, corev1.ConditionTrue, util.ReplicaSetUpdatedReason, subject+" is progressing.", p.now)
		if was != nil && was.Status == corev1.ConditionTrue {
			c.LastTransitionTime = was.LastTransitionTime
		}
		removeCondition(&s.Conditions, appsv1.DeploymentProgressing)
		setCondition(&s.Conditions, c)
	case p.isTimedOut(&s):
		setCondition(&s.Conditions, newCondition(appsv1.DeploymentProgressing, corev1.ConditionFalse,
			util.TimedOutReason, subject+" has timed out progressing.", p.now))
	}

	if failure := p.replicaFailure(); failure != nil {
		setCondition(&s.Conditions, util.ReplicaSetToDeploymentCondition(*failure))
	} else {
		removeCondition(&s.Conditions, appsv1.DeploymentReplicaFailure)
	}
	p.nextJudging = p.untilJudged(&s)
	return s
}

func (p *planner) isComplete(s *appsv1.DeploymentStatus) bool { return util.DeploymentComplete(p.d, s) }

func (p *planner) deadline() time.Duration {
	return time.Duration(*p.d.Spec.ProgressDeadlineSeconds) * time.Second
}

func (p *planner) isTimedOut(s *appsv1.DeploymentStatus) bool {
	c := condition(s.Conditions, appsv1.DeploymentProgressing)
	switch {
	case c == nil || c.Reason == util.NewRSAvailableReason:
		return false
	case c.Reason == util.TimedOutReason:
		return true
	}
	return c.LastUpdateTime.Add(p.deadline()).Before(p.now.Time)
}

// untilJudged is how long to wait before lack of progress would be a time-out. A second is added since
// condition times are whole seconds.
func (p *planner) untilJudged(s *appsv1.DeploymentStatus) time.Duration {
	c := condition(s.Conditions, appsv1.DeploymentProgressing)
	if !util.HasProgressDeadline(p.d) || c == nil || c.Reason == util.TimedOutReason || c.Reason == util.NewRSAvailableReason || p.isComplete(s) {
		return 0
	}
	return max(0, c.LastUpdateTime.Add(p.deadline()).Sub(p.now.Time)) + time.Second
}

// replicaFailure is why pods cannot be created or deleted; the new ReplicaSet's reason comes first.
func (p *planner) replicaFailure() *appsv1.ReplicaSetCondition {
	for _, rs := range append([]*appsv1.ReplicaSet{p.newRS}, p.old...) {
		if rs == nil {
			continue
		}
		for i := range rs.Status.Conditions {
			if rs.Status.Conditions[i].Type == appsv1.ReplicaSetReplicaFailure {
				return &rs.Status.Conditions[i]
			}
		}
	}
	return nil
}

// notePause records pausing and resuming, so that the time in between does not count against the deadline.
func (p *planner) notePause() {
	if !util.HasProgressDeadline(p.d) {
		return
	}
	c := condition(p.d.Status.Conditions, appsv1.DeploymentProgressing)
	if c != nil && c.Reason == util.TimedOutReason {
		return
	}
	noted := c != nil && c.Reason == util.PausedDeployReason
	switch {
	case p.d.Spec.Paused && !noted:
		p.note(appsv1.DeploymentProgressing, corev1.ConditionUnknown, util.PausedDeployReason, "Deployment is paused")
	case !p.d.Spec.Paused && noted:
		p.note(appsv1.DeploymentProgressing, corev1.ConditionUnknown, util.ResumedDeployReason, "Deployment is resumed")
	}
}

func (p *planner) note(t appsv1.DeploymentConditionType, status corev1.ConditionStatus, reason, message string) {
	setCondition(&p.d.Status.Conditions, newCondition(t, status, reason, message, p.now))
}

func newCondition(t appsv1.DeploymentConditionType, status corev1.ConditionStatus, reason, message string, now metav1.Time) appsv1.DeploymentCondition {
	return appsv1.DeploymentCondition{
		Type: t, Status: status, Reason: reason, Message: message,
		LastUpdateTime: now, LastTransitionTime: now,
	}
}

func condition(conditions []appsv1.DeploymentCondition, t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range conditions {
		if conditions[i].Type == t {
			return &conditions[i]
		}
	}
	return nil
}

// setCondition adds or replaces a condition; one with the same status and reason stays as it is.
func setCondition(conditions *[]appsv1.DeploymentCondition, c appsv1.DeploymentCondition) {
	if was := condition(*conditions, c.Type); was != nil {
		if was.Status == c.Status && was.Reason == c.Reason {
			return
		}
		if was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
	}
	removeCondition(conditions, c.Type)
	*conditions = append(*conditions, c)
}

// removeCondition leaves the old backing array alone: it may belong to the cache.
func removeCondition(conditions *[]appsv1.DeploymentCondition, t appsv1.DeploymentConditionType) {
	var kept []appsv1.DeploymentCondition
	for _, c := range *conditions {
		if c.Type != t {
			kept = append(kept, c)
		}
	}
	*conditions = kept
}
