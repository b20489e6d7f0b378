// SPDX-License-Identifier: Apache-2.0

package deployment

import (
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
)

var one, none = intstr.FromInt32(1), intstr.FromInt32(0)

func progressing(w *world) string {
	c := condition(w.d.Status.Conditions, appsv1.DeploymentProgressing)
	if c == nil {
		return "none"
	}
	return fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message)
}

// run syncs w and lets the ReplicaSet controller follow, n times.
func (w *world) run(n int) {
	for range n {
		w.sync()
		for _, uid := range w.uids() {
			w.resize(uid)
		}
	}
}

func (w *world) named(image string) *appsv1.ReplicaSet {
	for _, rs := range w.sets {
		if rs.Spec.Template.Spec.Containers[0].Image == image {
			return rs
		}
	}
	return nil
}

func TestFirstRollout(t *testing.T) {
	w := newWorld(deployment(3, one, one))
	w.d.Annotations = map[string]string{"note": "copied", corev1.LastAppliedConfigAnnotation: "not copied"}
	plan := Compute(w.snapshot(), w.now)
	rs := plan.Create
	if rs == nil || *rs.Spec.Replicas != 3 {
		t.Fatalf("plan %+v", plan)
	}
	hash := rs.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
	for what, got := range map[string]string{
		"name": rs.Name, "selector": "web-" + rs.Spec.Selector.MatchLabels[appsv1.DefaultDeploymentUniqueLabelKey],
		"pod label": "web-" + rs.Spec.Template.Labels[appsv1.DefaultDeploymentUniqueLabelKey],
	} {
		if got != "web-"+hash || hash == "" {
			t.Errorf("%s has %q, want hash %q", what, got, hash)
		}
	}
	want := map[string]string{
		"note": "copied", util.RevisionAnnotation: "1", util.DesiredReplicasAnnotation: "3", util.MaxReplicasAnnotation: "4",
	}
	if fmt.Sprint(rs.Annotations) != fmt.Sprint(want) {
		t.Errorf("annotations %v, want %v", rs.Annotations, want)
	}
	if ref := rs.OwnerReferences[0]; ref.Kind != "Deployment" || ref.Name != "web" || !*ref.Controller || !*ref.BlockOwnerDeletion {
		t.Errorf("owner %+v", ref)
	}
	if plan.Status == nil || plan.Status.Annotations[util.RevisionAnnotation] != "1" {
		t.Errorf("status %+v", plan.Status)
	}

	w.sync()
	if got := progressing(w); got != `True NewReplicaSetCreated Created new replica set "`+rs.Name+`"` {
		t.Error(got)
	}
	w.run(2)
	if got := progressing(w); got != `True ReplicaSetUpdated ReplicaSet "`+rs.Name+`" is progressing.` {
		t.Error(got)
	}
	if c := condition(w.d.Status.Conditions, appsv1.DeploymentAvailable); c.Status != corev1.ConditionFalse || c.Reason != "MinimumReplicasUnavailable" ||
		c.Message != "Deployment does not have minimum availability." {
		t.Errorf("%+v", c)
	}
	w.settle(t)
	if got := progressing(w); got != `True NewReplicaSetAvailable ReplicaSet "`+rs.Name+`" has successfully progressed.` {
		t.Error(got)
	}
	if c := condition(w.d.Status.Conditions, appsv1.DeploymentAvailable); c.Status != corev1.ConditionTrue || c.Reason != "MinimumReplicasAvailable" ||
		c.Message != "Deployment has minimum availability." {
		t.Errorf("%+v", c)
	}
	if s := w.d.Status; s.ObservedGeneration != 1 || s.Replicas != 3 || s.UpdatedReplicas != 3 || s.ReadyReplicas != 3 || s.AvailableReplicas != 3 || s.UnavailableReplicas != 0 {
		t.Errorf("status %+v", s)
	}
}

// The first steps of a rolling update of ten pods, as upstream's documentation gives them.
func TestFirstStepOfRollingUpdate(t *testing.T) {
	percent := intstr.FromString
	for _, tt := range []struct {
		name               string
		replicas           int32
		surge, unavailable intstr.IntOrString
		wantNew, wantOld   int32
	}{
		{"surge only", 10, intstr.FromInt32(3), none, 3, 10},
		{"unavailable only", 10, none, intstr.FromInt32(3), 0, 7},
		{"both", 10, intstr.FromInt32(2), intstr.FromInt32(2), 2, 8},
		{"default quarter rounds up surge and down unavailable", 10, percent("25%"), percent("25%"), 3, 8},
		{"quarter of one", 1, percent("25%"), percent("25%"), 1, 1},
		{"both round to nothing, so one may be missing", 4, none, percent("1%"), 0, 3},
		{"surge of everything", 4, percent("100%"), none, 4, 4},
		{"all may be missing", 4, none, percent("100%"), 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(deployment(tt.replicas, tt.surge, tt.unavailable))
			w.settle(t)
			w.setImage("v2")
			w.sync()
			got := []int32{*w.named("v2").Spec.Replicas, *w.named("v1").Spec.Replicas}
			if got[0] != tt.wantNew || got[1] != tt.wantOld {
				t.Errorf("new, old = %v, want %d, %d", got, tt.wantNew, tt.wantOld)
			}
		})
	}
}

func TestRollbackTakesTheOldReplicaSetAgain(t *testing.T) {
	w := newWorld(deployment(2, one, one))
	w.settle(t)
	w.setImage("v2")
	w.settle(t)
	w.setImage("v1")
	w.settle(t)
	if len(w.sets) != 2 {
		t.Fatalf("%d replica sets, want 2", len(w.sets))
	}
	rs := w.named("v1")
	if rs.Annotations[util.RevisionAnnotation] != "3" || rs.Annotations[util.RevisionHistoryAnnotation] != "1" || w.d.Annotations[util.RevisionAnnotation] != "3" {
		t.Errorf("annotations %v, deployment's %v", rs.Annotations, w.d.Annotations)
	}
	if *rs.Spec.Replicas != 2 || *w.named("v2").Spec.Replicas != 0 {
		t.Errorf("sizes %d, %d", *rs.Spec.Replicas, *w.named("v2").Spec.Replicas)
	}
}

func TestPauseHoldsTheTemplateButNotTheSize(t *testing.T) {
	w := newWorld(deployment(2, one, one))
	w.settle(t)
	w.d.Spec.Paused = true
	w.setImage("v2")
	w.run(3)
	if len(w.sets) != 1 {
		t.Fatal("a paused deployment rolled out")
	}
	if got := progressing(w); got != "Unknown DeploymentPaused Deployment is paused" {
		t.Error(got)
	}
	if w.d.Status.ObservedGeneration != w.d.Generation {
		t.Error("generation is not observed")
	}
	w.setReplicas(5)
	w.run(1)
	if got := *w.named("v1").Spec.Replicas; got != 5 {
		t.Errorf("size %d, want 5", got)
	}
	w.d.Spec.Paused = false
	w.sync()
	if w.named("v2") == nil {
		t.Fatal("a resumed deployment does not roll out")
	}
	w.settle(t)
	if got := progressing(w); !strings.HasPrefix(got, "True NewReplicaSetAvailable") {
		t.Error(got)
	}
}

func TestScalingInRolloutIsProportional(t *testing.T) {
	// The example of Kubernetes' documentation: 10 pods, surge 3, unavailable 2, stuck at 8 old and 5 new; then 15.
	w := newWorld(deployment(10, intstr.FromInt32(3), intstr.FromInt32(2)))
	w.settle(t)
	w.setImage("broken")
	w.run(4)
	if old, cur := *w.named("v1").Spec.Replicas, *w.named("broken").Spec.Replicas; old != 8 || cur != 5 {
		t.Fatalf("old %d, new %d", old, cur)
	}
	w.setReplicas(15)
	w.sync()
	if old, cur := *w.named("v1").Spec.Replicas, *w.named("broken").Spec.Replicas; old != 11 || cur != 7 {
		t.Errorf("old %d, new %d, want 11 and 7", old, cur)
	}
}

func TestDeadline(t *testing.T) {
	w := newWorld(deployment(1, one, none))
	w.settle(t)
	w.setImage("broken")
	w.run(4)
	plan := Compute(w.snapshot(), w.now)
	if want := 601 * time.Second; plan.RequeueAfter != want {
		t.Errorf("judged again after %v, want %v", plan.RequeueAfter, want)
	}
	w.now = w.now.Add(plan.RequeueAfter)
	w.sync()
	if got := progressing(w); got != `False ProgressDeadlineExceeded ReplicaSet "`+w.named("broken").Name+`" has timed out progressing.` {
		t.Error(got)
	}
	if plan := Compute(w.snapshot(), w.now); plan.RequeueAfter != 0 || plan.Status != nil {
		t.Errorf("plan after the deadline %+v", plan)
	}
	w.setImage("v3")
	w.sync()
	if got := progressing(w); !strings.HasPrefix(got, "True NewReplicaSetCreated") {
		t.Error(got)
	}
}

func TestHistoryLimit(t *testing.T) {
	w := newWorld(deployment(1, one, none))
	limit := int32(2)
	w.d.Spec.RevisionHistoryLimit = &limit
	for i := 1; i <= 6; i++ {
		w.setImage(fmt.Sprintf("v%d", i))
		w.settle(t)
	}
	for i := 1; i <= 6; i++ {
		if got, want := w.named(fmt.Sprintf("v%d", i)) != nil, i >= 4; got != want {
			t.Errorf("revision %d kept: %v, want %v", i, got, want)
		}
	}
}

func TestReplicaFailureIsShown(t *testing.T) {
	w := newWorld(deployment(1, one, none))
	w.sync()
	s := w.snapshot()
	s.ReplicaSets[0].Status.Conditions = []appsv1.ReplicaSetCondition{{
		Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue, Reason: "FailedCreate", Message: "quota",
	}}
	plan := Compute(s, w.now)
	if c := condition(plan.Status.Status.Conditions, appsv1.DeploymentReplicaFailure); c == nil || c.Reason != "FailedCreate" || c.Message != "quota" {
		t.Errorf("%+v", plan.Status.Status.Conditions)
	}
	w.sync()
	if c := condition(w.d.Status.Conditions, appsv1.DeploymentReplicaFailure); c != nil {
		t.Errorf("the failure stays: %+v", c)
	}
}

func TestCollision(t *testing.T) {
	d := deployment(1, one, none)
	first := NewReplicaSet(d)
	if !IsOurs(d, first) {
		t.Error("the deployment's own replica set is not recognised")
	}
	other := first.DeepCopy()
	other.Spec.Template.Spec.Containers[0].Image = "other"
	if IsOurs(d, other) {
		t.Error("another template passes for the deployment's")
	}
	after := AfterCollision(d)
	if *after.Status.CollisionCount != 1 || d.Status.CollisionCount != nil {
		t.Errorf("collision count %v, the input's %v", after.Status.CollisionCount, d.Status.CollisionCount)
	}
	if NewReplicaSet(after).Name == first.Name {
		t.Error("the hash stays the same")
	}
}

func TestFailedCreateIsShownOnce(t *testing.T) {
	d := deployment(1, one, none)
	failed := AfterFailedCreate(d, "no", time.Unix(1, 0))
	if c := condition(failed.Status.Conditions, appsv1.DeploymentProgressing); c == nil || c.Status != corev1.ConditionFalse || c.Reason != "ReplicaSetCreateError" {
		t.Errorf("%+v", failed.Status)
	}
	if AfterFailedCreate(failed, "no", time.Unix(2, 0)) != nil {
		t.Error("the same failure is written again")
	}
}

// Cached objects are shared with the whole process.
func TestComputeChangesNothing(t *testing.T) {
	w := newWorld(deployment(4, one, one))
	w.settle(t)
	w.setImage("v2")
	w.run(2)
	s := w.snapshot()
	before := fmt.Sprintf("%v %v", s.Deployment.DeepCopy(), copies(s.ReplicaSets))
	Compute(s, w.now.Add(time.Hour))
	if after := fmt.Sprintf("%v %v", s.Deployment.DeepCopy(), copies(s.ReplicaSets)); after != before {
		t.Errorf("changed\n%s\nto\n%s", before, after)
	}
}

func copies(sets []*appsv1.ReplicaSet) string {
	var b strings.Builder
	for _, rs := range sets {
		data, err := rs.Marshal()
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(&b, "%x\n", data)
	}
	return b.String()
}
