// SPDX-License-Identifier: Apache-2.0

package deployment

import (
	"fmt"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
	"pgregory.net/rapid"
)

// world is an API server, a ReplicaSet controller that may lag, and pods, in a few lines.
type world struct {
	d    *appsv1.Deployment
	sets map[types.UID]*appsv1.ReplicaSet
	pods map[types.UID][]bool // readiness of each pod of a ReplicaSet
	now  time.Time
	next int
}

func newWorld(d *appsv1.Deployment) *world {
	return &world{d: d, sets: map[types.UID]*appsv1.ReplicaSet{}, pods: map[types.UID][]bool{}, now: time.Unix(1700000000, 0)}
}

// snapshot shows pods as they are, whatever sizes were asked for since.
func (w *world) snapshot() Snapshot {
	s := Snapshot{Deployment: w.d, Pods: map[types.UID][]*corev1.Pod{}, TerminatingReplicas: true}
	for uid, rs := range w.sets {
		rs.Status = appsv1.ReplicaSetStatus{ObservedGeneration: rs.Generation, Replicas: int32(len(w.pods[uid])), TerminatingReplicas: new(int32)}
		for _, ready := range w.pods[uid] {
			s.Pods[uid] = append(s.Pods[uid], &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning}})
			if ready {
				rs.Status.ReadyReplicas++
				rs.Status.AvailableReplicas++
			}
		}
		s.ReplicaSets = append(s.ReplicaSets, rs)
	}
	return s
}

// sync does what the controller does with a plan. It reports whether anything was written.
func (w *world) sync() bool {
	plan := Compute(w.snapshot(), w.now)
	if plan.Create != nil {
		w.next++
		rs := plan.Create.DeepCopy()
		rs.UID, rs.Generation = types.UID(fmt.Sprint(w.next)), 1
		rs.CreationTimestamp = metav1.NewTime(w.now.Add(time.Duration(w.next) * time.Second))
		w.sets[rs.UID] = rs
	}
	for _, u := range plan.Update {
		w.sets[u.ReplicaSet.UID] = u.ReplicaSet.DeepCopy()
	}
	for _, rs := range plan.Delete {
		delete(w.sets, rs.UID)
	}
	if plan.Status != nil {
		w.d = plan.Status.DeepCopy()
	}
	return plan.Create != nil || len(plan.Update)+len(plan.Delete) > 0 || plan.Status != nil
}

// resize is the ReplicaSet controller: unready pods go first.
func (w *world) resize(uid types.UID) {
	want, pods := int(*w.sets[uid].Spec.Replicas), w.pods[uid]
	for len(pods) < want {
		pods = append(pods, false)
	}
	slices.SortFunc(pods, func(a, b bool) int {
		switch {
		case a == b:
			return 0
		case a:
			return -1
		}
		return 1
	})
	w.pods[uid] = pods[:want]
}

func (w *world) available() (n int32) {
	for _, pods := range w.pods {
		for _, ready := range pods {
			if ready {
				n++
			}
		}
	}
	return n
}

func (w *world) sizes() (n int32) {
	for _, rs := range w.sets {
		n += *rs.Spec.Replicas
	}
	return n
}

func (w *world) uids() []types.UID {
	var uids []types.UID
	for uid := range w.sets {
		uids = append(uids, uid)
	}
	slices.Sort(uids)
	return uids
}

// settle lets everybody finish: every pod becomes ready.
func (w *world) settle(t interface {
	Helper()
	Fatalf(string, ...any)
}) {
	t.Helper()
	for range 500 {
		changed := w.sync()
		for _, uid := range w.uids() {
			before := slices.Clone(w.pods[uid])
			w.resize(uid)
			for i := range w.pods[uid] {
				w.pods[uid][i] = true
			}
			changed = changed || !slices.Equal(before, w.pods[uid])
		}
		if !changed {
			return
		}
	}
	t.Fatalf("the rollout does not settle: %+v", w.d.Status)
}

func deployment(replicas int32, surge, unavailable intstr.IntOrString) *appsv1.Deployment {
	deadline, history := int32(600), int32(10)
	labels := map[string]string{"app": "web"}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "d", Generation: 1},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, ProgressDeadlineSeconds: &deadline, RevisionHistoryLimit: &history,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Strategy: appsv1.DeploymentStrategy{
				Type:          appsv1.RollingUpdateDeploymentStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &surge, MaxUnavailable: &unavailable},
			},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "v1"}}},
			},
		},
	}
}

func (w *world) setImage(image string) {
	w.d = w.d.DeepCopy()
	w.d.Generation++
	w.d.Spec.Template.Spec.Containers[0].Image = image
}

func (w *world) setReplicas(n int32) {
	w.d = w.d.DeepCopy()
	w.d.Generation++
	w.d.Spec.Replicas = &n
}

func drawBound(t *rapid.T, name string) intstr.IntOrString {
	if rapid.Bool().Draw(t, name+" in percent") {
		return intstr.FromString(fmt.Sprintf("%d%%", rapid.IntRange(0, 100).Draw(t, name)))
	}
	return intstr.FromInt32(int32(rapid.IntRange(0, 4).Draw(t, name)))
}

// A rolling update keeps its two promises at every moment, whatever the order of events and however often the
// template changes on the way; and it ends.
func TestRollingUpdateKeepsItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		replicas := int32(rapid.IntRange(1, 12).Draw(t, "replicas"))
		w := newWorld(deployment(replicas, drawBound(t, "surge"), drawBound(t, "unavailable")))
		w.settle(t)
		most := replicas + util.MaxSurge(*w.d)
		least := replicas - util.MaxUnavailable(*w.d)
		w.setImage("v2")

		for i := range rapid.IntRange(0, 80).Draw(t, "steps") {
			before := w.available()
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0, 1, 2:
				w.sync()
			case 3, 4, 5:
				w.resize(rapid.SampledFrom(w.uids()).Draw(t, "replica set"))
			case 6, 7, 8:
				if pods := w.pods[rapid.SampledFrom(w.uids()).Draw(t, "replica set")]; len(pods) > 0 {
					pods[rapid.IntRange(0, len(pods)-1).Draw(t, "pod")] = true
				}
			case 9:
				w.setImage(fmt.Sprintf("v%d", rapid.IntRange(1, 4).Draw(t, "image")))
			}
			if got := w.sizes(); got > most {
				t.Fatalf("step %d: %d pods asked for, at most %d allowed", i, got, most)
			}
			if got := w.available(); got < min(least, before) {
				t.Fatalf("step %d: %d pods available after %d, at least %d wanted", i, got, before, least)
			}
		}
		w.settle(t)
		if !util.DeploymentComplete(w.d, &w.d.Status) {
			t.Fatalf("not complete: %+v", w.d.Status)
		}
		if c := condition(w.d.Status.Conditions, appsv1.DeploymentProgressing); c == nil || c.Reason != util.NewRSAvailableReason {
			t.Fatalf("conditions %+v", w.d.Status.Conditions)
		}
	})
}

// However a Deployment is scaled while it rolls out, sizes add up, none is negative, and it ends complete.
func TestScalingDuringRolloutAddsUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(deployment(int32(rapid.IntRange(0, 20).Draw(t, "replicas")), drawBound(t, "surge"), drawBound(t, "unavailable")))
		w.settle(t)
		for i := range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0:
				w.setReplicas(int32(rapid.IntRange(0, 20).Draw(t, "replicas")))
				// One sync brings the sum under the new bound, whatever it was.
				w.sync()
				if got, most := w.sizes(), *w.d.Spec.Replicas+util.MaxSurge(*w.d); got > most {
					t.Fatalf("step %d: sizes add up to %d, at most %d allowed", i, got, most)
				}
			case 1:
				w.setImage(fmt.Sprintf("v%d", rapid.IntRange(1, 4).Draw(t, "image")))
			case 2, 3:
				w.sync()
			default:
				uid := rapid.SampledFrom(w.uids()).Draw(t, "replica set")
				w.resize(uid)
				for i := range w.pods[uid] {
					w.pods[uid][i] = rapid.Bool().Draw(t, "ready")
				}
			}
			for _, rs := range w.sets {
				if *rs.Spec.Replicas < 0 {
					t.Fatalf("negative size of %s", rs.Name)
				}
			}
		}
		w.settle(t)
		if got := w.sizes(); got != *w.d.Spec.Replicas || !util.DeploymentComplete(w.d, &w.d.Status) {
			t.Fatalf("sizes add up to %d of %d: %+v", got, *w.d.Spec.Replicas, w.d.Status)
		}
	})
}

// Recreate never runs two templates at once.
func TestRecreateNeverMixes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := deployment(int32(rapid.IntRange(0, 5).Draw(t, "replicas")), intstr.FromInt32(1), intstr.FromInt32(1))
		d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
		w := newWorld(d)
		w.settle(t)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				w.setImage(fmt.Sprintf("v%d", rapid.IntRange(1, 3).Draw(t, "image")))
			case 1, 2:
				w.sync()
			default:
				w.resize(rapid.SampledFrom(w.uids()).Draw(t, "replica set"))
			}
			running := 0
			for _, pods := range w.pods {
				if len(pods) > 0 {
					running++
				}
			}
			if running > 1 {
				t.Fatalf("%d templates run at once", running)
			}
		}
		w.settle(t)
		if !util.DeploymentComplete(w.d, &w.d.Status) {
			t.Fatalf("not complete: %+v", w.d.Status)
		}
	})
}
