// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"pgregory.net/rapid"
)

// world is an API server, a garbage collector and some kubelets, in a few lines.
type world struct {
	set     *appsv1.StatefulSet
	pods    map[string]*corev1.Pod
	claims  map[string]*corev1.PersistentVolumeClaim
	current string
	update  string
	next    int
	clock   time.Time
}

func newWorld(set *appsv1.StatefulSet) *world {
	return &world{set: set, pods: map[string]*corev1.Pod{}, claims: map[string]*corev1.PersistentVolumeClaim{}, current: "r1", update: "r1", clock: now}
}

func (w *world) snapshot() Snapshot {
	s := Snapshot{
		Set: w.set, Current: Revision{w.current, &w.set.Spec.Template}, Update: Revision{w.update, &w.set.Spec.Template},
		Claim: func(name string) *corev1.PersistentVolumeClaim { return w.claims[name] },
	}
	for _, name := range slices.Sorted(maps.Keys(w.pods)) {
		s.Pods = append(s.Pods, w.pods[name])
	}
	return s
}

type failer interface {
	Helper()
	Fatalf(string, ...any)
}

// sync does what the controller does with a plan. It reports whether anything was written.
func (w *world) sync(t failer) bool {
	t.Helper()
	plan := Compute(w.snapshot(), w.clock)
	for _, c := range plan.UpdateClaims {
		w.claims[c.Name] = c
	}
	create := func(missing []NewClaim) {
		for _, c := range missing {
			if w.claims[c.Claim.Name] != nil {
				t.Fatalf("claim %s is created twice", c.Claim.Name)
			}
			w.claims[c.Claim.Name] = c.Claim
		}
	}
	create(plan.CreateClaims)
	for _, missing := range plan.Create {
		if w.pods[missing.Pod.Name] != nil {
			t.Fatalf("pod %s is created twice", missing.Pod.Name)
		}
		create(missing.Claims)
		w.next++
		p := missing.Pod.DeepCopy()
		p.UID = types.UID(fmt.Sprint(w.next))
		p.Status.Phase = corev1.PodPending
		w.pods[p.Name] = p
	}
	for _, p := range plan.UpdatePods {
		w.pods[p.Name] = p
	}
	for _, p := range plan.Delete {
		w.change(p.Name, terminating)
	}
	status := Status(w.snapshot(), nil, w.clock)
	changed := fmt.Sprint(status) != fmt.Sprint(w.set.Status)
	w.set = w.set.DeepCopy()
	w.set.Status = status
	w.current = status.CurrentRevision
	return changed || len(plan.UpdateClaims)+len(plan.CreateClaims)+len(plan.Create)+len(plan.UpdatePods)+len(plan.Delete) > 0
}

// change replaces a pod by a changed one: those in the cache are never changed.
func (w *world) change(name string, change podOption) {
	p := w.pods[name].DeepCopy()
	change(p)
	w.pods[name] = p
}

// vanish is the end of a pod, which takes along the claims that it owns.
func (w *world) vanish(name string) {
	uid := w.pods[name].UID
	delete(w.pods, name)
	for name, c := range w.claims {
		for _, ref := range c.OwnerReferences {
			if ref.UID == uid {
				delete(w.claims, name)
			}
		}
	}
}

func (w *world) edit(change setOption) {
	w.set = w.set.DeepCopy()
	w.set.Generation++
	change(w.set)
}

// available are the pods that the set wants and that serve.
func (w *world) available() (n int) {
	for _, p := range w.pods {
		if ordinal, ok := Ordinal(w.set, p); ok && inRange(w.set, ordinal) && p.DeletionTimestamp == nil && podutil.IsPodReady(p) {
			n++
		}
	}
	return n
}

func (w *world) happen(t *rapid.T) {
	var name string
	if len(w.pods) > 0 {
		name = rapid.SampledFrom(slices.Sorted(maps.Keys(w.pods))).Draw(t, "pod")
	}
	switch rapid.IntRange(0, 9).Draw(t, "event") {
	case 0, 1, 2, 3:
		if name != "" && !podutil.IsPodTerminal(w.pods[name]) {
			w.change(name, ready)
		}
	case 4, 5:
		if name != "" && w.pods[name].DeletionTimestamp != nil {
			w.vanish(name)
		}
	case 6:
		if name != "" {
			w.change(name, rapid.SampledFrom([]podOption{unready, failed, succeeded, terminating, nameless}).Draw(t, "fate"))
		}
	case 7:
		w.edit(func(*appsv1.StatefulSet) { w.update = fmt.Sprintf("r%d", rapid.IntRange(1, 4).Draw(t, "template")) })
	case 8:
		n := int32(rapid.IntRange(0, 6).Draw(t, "replicas"))
		w.edit(func(set *appsv1.StatefulSet) { set.Spec.Replicas = &n })
	case 9:
		w.edit(from(int32(rapid.IntRange(0, 3).Draw(t, "start"))))
	}
}

// settle lets everybody finish.
func (w *world) settle(t failer) {
	t.Helper()
	for range 500 {
		changed := w.sync(t)
		for _, name := range slices.Sorted(maps.Keys(w.pods)) {
			switch p := w.pods[name]; {
			case p.DeletionTimestamp != nil:
				w.vanish(name)
				changed = true
			case !podutil.IsPodReady(p) && !podutil.IsPodTerminal(p):
				w.change(name, ready)
				changed = true
			}
		}
		if !changed {
			return
		}
	}
	t.Fatalf("the stateful set does not settle: %+v", w.set.Status)
}

// Whatever happens: in order, a pod begins only when all before it serve, and no two leave at once; a rollout takes no
// more pods away than it may, and none below the partition; in the end there are the right pods with the right claims.
func TestKeepsItsOrderAndConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		whenDeleted, whenScaled := keep, keep
		if rapid.Bool().Draw(t, "goes with the set") {
			whenDeleted = drop
		}
		if rapid.Bool().Draw(t, "goes when scaled") {
			whenScaled = drop
		}
		options := []setOption{claims, policy(whenDeleted, whenScaled), partition(int32(rapid.IntRange(0, 3).Draw(t, "partition")))}
		ordered := rapid.Bool().Draw(t, "ordered")
		if !ordered {
			options = append(options, parallel)
		}
		most := 1
		if rapid.Bool().Draw(t, "several at once") {
			most = rapid.IntRange(1, 3).Draw(t, "at once")
			options = append(options, atOnce(intstr.FromInt32(int32(most))))
		}
		w := newWorld(statefulSet(int32(rapid.IntRange(0, 5).Draw(t, "replicas")), options...))
		w.settle(t)
		for i := range rapid.IntRange(0, 80).Draw(t, "steps") {
			if rapid.IntRange(0, 1).Draw(t, "syncs") > 0 {
				w.happen(t)
				continue
			}
			before, available := maps.Clone(w.pods), w.available()
			w.sync(t)
			w.checkStep(t, i, ordered, most, before, available)
		}
		w.settle(t)
		w.checkEnd(t, whenDeleted)
	})
}

func (w *world) checkStep(t *rapid.T, step int, ordered bool, most int, before map[string]*corev1.Pod, available int) {
	start := startOrdinal(w.set)
	partition := start + int(*w.set.Spec.UpdateStrategy.RollingUpdate.Partition)
	size := int(*w.set.Spec.Replicas)
	// Without maxUnavailable and order, as in Kubernetes, only the pods above the next one are looked at.
	bounded := ordered || w.set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable != nil
	if after := w.available(); bounded && after < min(available, size-most) {
		t.Fatalf("step %d: %d of %d pods serve after %d", step, after, size, available)
	}
	acted := 0
	for name, p := range w.pods {
		ordinal, _ := Ordinal(w.set, p)
		was := before[name]
		if was == nil {
			acted++
			for n := start; ordered && n < ordinal; n++ {
				if one := w.pods[podName(w.set, n)]; one == nil || one.DeletionTimestamp != nil || !podutil.IsPodReady(one) {
					t.Fatalf("step %d: %s begins although %d does not serve", step, name, n)
				}
			}
			continue
		}
		if was.DeletionTimestamp == nil && p.DeletionTimestamp != nil {
			acted++
			if inRange(w.set, ordinal) && ordinal < partition && !podutil.IsPodTerminal(was) {
				t.Fatalf("step %d: %s is below the partition %d and was deleted", step, name, partition)
			}
		}
	}
	if ordered && acted > most {
		t.Fatalf("step %d: %d pods were created or deleted at once", step, acted)
	}
}

func (w *world) checkEnd(t *rapid.T, whenDeleted appsv1.PersistentVolumeClaimRetentionPolicyType) {
	start, size := startOrdinal(w.set), int(*w.set.Spec.Replicas)
	if len(w.pods) != size || w.available() != size {
		t.Fatalf("%d pods, %d serve, want %d", len(w.pods), w.available(), size)
	}
	partition := int(*w.set.Spec.UpdateStrategy.RollingUpdate.Partition)
	for n := start; n < start+size; n++ {
		p := w.pods[podName(w.set, n)]
		if n >= start+partition && revisionOf(p) != w.update {
			t.Fatalf("pod %s is of %s, not %s", p.Name, revisionOf(p), w.update)
		}
		if p.Labels[appsv1.StatefulSetPodNameLabel] != p.Name {
			t.Fatalf("pod %s has labels %v", p.Name, p.Labels)
		}
		c := w.claims[claimName(w.set, 0, n)]
		if c == nil {
			t.Fatalf("pod %s has no claim", p.Name)
		}
		if owned := len(c.OwnerReferences) == 1 && c.OwnerReferences[0].UID == w.set.UID; owned != (whenDeleted == drop) || !owned && len(c.OwnerReferences) > 0 {
			t.Fatalf("claim %s has owners %v", c.Name, c.OwnerReferences)
		}
	}
	if s := w.set.Status; int(s.Replicas) != size || int(s.AvailableReplicas) != size || partition == 0 && s.CurrentRevision != w.update {
		t.Fatalf("status %+v", s)
	}
}
