// SPDX-License-Identifier: Apache-2.0

package replicaset

import (
	"errors"
	"fmt"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"skep.io/skep/controlplane/controllers/runner"
)

var now = time.Unix(1700000000, 0)

func replicaSet(n int32) *appsv1.ReplicaSet {
	labels := map[string]string{"app": "web"}
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "rs", Generation: 7},
		Spec: appsv1.ReplicaSetSpec{
			Replicas: &n, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}},
		},
	}
}

type podOption func(*corev1.Pod)

func pod(name string, options ...podOption) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, UID: types.UID(name), Labels: map[string]string{"app": "web"},
			CreationTimestamp: metav1.NewTime(now.Add(-time.Hour)),
		},
		Spec:   corev1.PodSpec{NodeName: "n1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	readySince(time.Hour)(p)
	for _, option := range options {
		option(p)
	}
	return p
}

func readySince(d time.Duration) podOption {
	return func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now.Add(-d))}}
	}
}

func unready(p *corev1.Pod) { p.Status.Conditions = nil }
func pending(p *corev1.Pod) { p.Status.Phase = corev1.PodPending; p.Status.Conditions = nil }
func unassigned(p *corev1.Pod) {
	p.Spec.NodeName, p.Status.Phase, p.Status.Conditions = "", corev1.PodPending, nil
}
func on(node string) podOption { return func(p *corev1.Pod) { p.Spec.NodeName = node } }
func cost(c string) podOption {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.PodDeletionCost: c} }
}
func created(ago time.Duration) podOption {
	return func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(now.Add(-ago)) }
}
func restarts(n int32) podOption {
	return func(p *corev1.Pod) { p.Status.ContainerStatuses = []corev1.ContainerStatus{{RestartCount: n}} }
}

// Which pod goes when one is too many: each row has the victim first.
func TestDeletionOrder(t *testing.T) {
	for _, tt := range []struct {
		name         string
		victim, stay *corev1.Pod
	}{
		{"unassigned before assigned", pod("a", unassigned), pod("b", pending)},
		{"pending before running", pod("a", pending), pod("b", unready)},
		{"unready before ready", pod("a", unready), pod("b")},
		{"cheaper before dearer", pod("a", cost("-5")), pod("b")},
		{"doubled up before alone", pod("a", on("crowded")), pod("b", on("quiet"))},
		{"ready for less time first", pod("a", readySince(time.Minute)), pod("b", readySince(time.Hour))},
		{"more restarts first", pod("a", restarts(3)), pod("b", restarts(1))},
		{"younger first", pod("a", created(time.Minute)), pod("b", created(time.Hour))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, active := range [][]*corev1.Pod{{tt.victim, tt.stay}, {tt.stay, tt.victim}} {
				related := append([]*corev1.Pod{pod("kin", on("crowded"))}, active...)
				plan := Compute(Snapshot{ReplicaSet: replicaSet(1), Active: active, Related: func() []*corev1.Pod { return related }}, now)
				if plan.Create != 0 || len(plan.Delete) != 1 || plan.Delete[0] != tt.victim {
					t.Fatalf("plan %+v", plan)
				}
			}
		})
	}
}

func TestNumbers(t *testing.T) {
	deleted := replicaSet(3)
	deleted.DeletionTimestamp = &metav1.Time{Time: now}
	for _, tt := range []struct {
		name           string
		rs             *appsv1.ReplicaSet
		active         int
		create, remove int
	}{
		{"nothing yet", replicaSet(3), 0, 3, 0},
		{"enough", replicaSet(3), 3, 0, 0},
		{"too many", replicaSet(3), 5, 0, 2},
		{"none wanted", replicaSet(0), 2, 0, 2},
		{"creates in bursts", replicaSet(1200), 0, 500, 0},
		{"deletes in bursts", replicaSet(0), 700, 0, 500},
		{"being deleted", deleted, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := Snapshot{ReplicaSet: tt.rs, Related: func() []*corev1.Pod { return nil }}
			for i := range tt.active {
				s.Active = append(s.Active, pod(fmt.Sprint(i)))
			}
			if plan := Compute(s, now); plan.Create != tt.create || len(plan.Delete) != tt.remove {
				t.Errorf("create %d, delete %d", plan.Create, len(plan.Delete))
			}
		})
	}
}

func TestStatus(t *testing.T) {
	rs := replicaSet(5)
	rs.Spec.MinReadySeconds = 10
	rs.Spec.Template.Labels["tier"] = "front"
	full := func(p *corev1.Pod) { p.Labels = map[string]string{"app": "web", "tier": "front", "more": "is fine"} }
	s := Snapshot{
		ReplicaSet:  rs,
		Active:      []*corev1.Pod{pod("a", full), pod("b", readySince(4*time.Second)), pod("c", unready), pod("d", readySince(10*time.Second))},
		Terminating: []*corev1.Pod{pod("e")},
	}
	got := Status(s, nil, true, now)
	want := [...]int32{4, 1, 3, 2, 1}
	if have := [...]int32{got.Replicas, got.FullyLabeledReplicas, got.ReadyReplicas, got.AvailableReplicas, *got.TerminatingReplicas}; have != want {
		t.Errorf("replicas, fully labeled, ready, available, terminating = %v, want %v", have, want)
	}
	if got.ObservedGeneration != 7 {
		t.Errorf("observed generation %d", got.ObservedGeneration)
	}
	if d := runner.UntilAvailable(s.Active, rs.Spec.MinReadySeconds, now); d != 6*time.Second+time.Millisecond {
		t.Errorf("next check in %v", d)
	}
	if Status(s, nil, false, now).TerminatingReplicas != nil {
		t.Error("terminating replicas are counted although nobody stores them")
	}

	rs.Status = Status(s, errors.New("exceeded quota"), true, now)
	if c := rs.Status.Conditions; len(c) != 1 || c[0].Type != appsv1.ReplicaSetReplicaFailure || c[0].Reason != "FailedCreate" || c[0].Message != "exceeded quota" {
		t.Errorf("conditions %+v", c)
	}
	if again := Status(s, errors.New("exceeded quota again"), true, now.Add(time.Second)); StatusChanged(rs.Status, again) {
		t.Error("a failure that lasts is written again")
	}
	if healed := Status(s, nil, true, now); len(healed.Conditions) != 0 || len(rs.Status.Conditions) != 1 {
		t.Errorf("conditions %+v, cached %+v", healed.Conditions, rs.Status.Conditions)
	}
	*rs.Spec.Replicas = 1
	rs.Status.Conditions = nil
	if c := Status(s, errors.New("no"), true, now).Conditions; c[0].Reason != "FailedDelete" {
		t.Errorf("conditions %+v", c)
	}
}

// Whatever pods there are, one step brings the number as near as the burst allows and deletes no pod twice.
func TestComputeReachesTheSize(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 30).Draw(t, "size")
		s := Snapshot{ReplicaSet: replicaSet(int32(n))}
		for i := range rapid.IntRange(0, 30).Draw(t, "active") {
			s.Active = append(s.Active, pod(fmt.Sprint(i), rapid.SampledFrom([]podOption{unready, pending, unassigned, on("n2"), cost("3")}).Draw(t, "kind")))
		}
		s.Related = func() []*corev1.Pod { return s.Active }
		plan := Compute(s, now)
		seen := map[types.UID]bool{}
		for _, p := range plan.Delete {
			seen[p.UID] = true
		}
		if len(seen) != len(plan.Delete) || len(s.Active)+plan.Create-len(plan.Delete) != n {
			t.Fatalf("%d active, create %d, delete %d, want %d", len(s.Active), plan.Create, len(plan.Delete), n)
		}
	})
}
