// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

var now = time.Unix(1700000000, 0)

type setOption func(*appsv1.StatefulSet)

func statefulSet(replicas int32, options ...setOption) *appsv1.StatefulSet {
	labels := map[string]string{"app": "db"}
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "db", UID: "set", Generation: 3},
		Spec: appsv1.StatefulSetSpec{
			Replicas: &replicas, ServiceName: "dbs", Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template:            corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}},
			PodManagementPolicy: appsv1.OrderedReadyPodManagement,
			UpdateStrategy: appsv1.StatefulSetUpdateStrategy{
				Type: appsv1.RollingUpdateStatefulSetStrategyType, RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: new(int32)},
			},
		},
	}
	for _, option := range options {
		option(set)
	}
	return set
}

func parallel(set *appsv1.StatefulSet) { set.Spec.PodManagementPolicy = appsv1.ParallelPodManagement }
func onDelete(set *appsv1.StatefulSet) {
	set.Spec.UpdateStrategy = appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType}
}
func partition(n int32) setOption {
	return func(set *appsv1.StatefulSet) { set.Spec.UpdateStrategy.RollingUpdate.Partition = &n }
}
func atOnce(n intstr.IntOrString) setOption {
	return func(set *appsv1.StatefulSet) { set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable = &n }
}
func from(n int32) setOption {
	return func(set *appsv1.StatefulSet) { set.Spec.Ordinals = &appsv1.StatefulSetOrdinals{Start: n} }
}
func claims(set *appsv1.StatefulSet) {
	set.Spec.VolumeClaimTemplates = []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}}}
}
func policy(whenDeleted, whenScaled appsv1.PersistentVolumeClaimRetentionPolicyType) setOption {
	return func(set *appsv1.StatefulSet) {
		set.Spec.PersistentVolumeClaimRetentionPolicy = &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenDeleted: whenDeleted, WhenScaled: whenScaled}
	}
}
func all(options ...setOption) setOption {
	return func(set *appsv1.StatefulSet) {
		for _, option := range options {
			option(set)
		}
	}
}

type podOption func(*corev1.Pod)

// pod is the set's available pod of a number, made from today's template.
func pod(n int, options ...podOption) *corev1.Pod {
	name := fmt.Sprint("db-", n)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, UID: types.UID("uid-" + name),
			Labels: map[string]string{
				"app": "db", appsv1.StatefulSetRevisionLabel: "r2", appsv1.StatefulSetPodNameLabel: name, appsv1.PodIndexLabel: strconv.Itoa(n),
			},
		},
		Spec: corev1.PodSpec{Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: fmt.Sprint("data-db-", n)},
		}}}},
	}
	ready(p)
	p.Status.Conditions[0].LastTransitionTime = metav1.NewTime(now.Add(-time.Hour))
	for _, option := range options {
		option(p)
	}
	return p
}

func ready(p *corev1.Pod) {
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{
		{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now.Add(-time.Second))},
	}}
}
func old(p *corev1.Pod)         { p.Labels[appsv1.StatefulSetRevisionLabel] = "r1" }
func unready(p *corev1.Pod)     { p.Status.Conditions = nil }
func pending(p *corev1.Pod)     { p.Status.Phase = corev1.PodPending; unready(p) }
func failed(p *corev1.Pod)      { p.Status.Phase = corev1.PodFailed; unready(p) }
func succeeded(p *corev1.Pod)   { p.Status.Phase = corev1.PodSucceeded; unready(p) }
func terminating(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: now} }
func nameless(p *corev1.Pod)    { delete(p.Labels, appsv1.StatefulSetPodNameLabel) }

func claim(n int, owners ...metav1.OwnerReference) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint("data-db-", n), OwnerReferences: owners}}
}

func snapshot(set *appsv1.StatefulSet, pods []*corev1.Pod, claims ...*corev1.PersistentVolumeClaim) Snapshot {
	before := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "db", "was": "before"}}}
	return Snapshot{
		Set: set, Pods: pods, Current: Revision{"r1", &before}, Update: Revision{"r2", &set.Spec.Template},
		Claim: func(name string) *corev1.PersistentVolumeClaim {
			for _, c := range claims {
				if c.Name == name {
					return c
				}
			}
			return nil
		},
	}
}

// say puts a plan into words: +NUMBER@REVISION for a pod that is created, -NUMBER for one that is deleted.
func say(plan Plan) string {
	var words []string
	for _, created := range plan.Create {
		words = append(words, "+"+strings.TrimPrefix(created.Pod.Name, "db-")+"@"+revisionOf(created.Pod))
	}
	for _, pod := range plan.Delete {
		words = append(words, "-"+strings.TrimPrefix(pod.Name, "db-"))
	}
	return strings.Join(words, " ")
}

func pods(p ...*corev1.Pod) []*corev1.Pod { return p }

func TestCompute(t *testing.T) {
	minReady := func(set *appsv1.StatefulSet) { set.Spec.MinReadySeconds = 10 }
	justReady := podOption(ready)
	for _, tt := range []struct {
		name     string
		replicas int32
		set      setOption
		pods     []*corev1.Pod
		want     string
	}{
		{"the first", 3, nil, nil, "+0@r2"},
		{"the next", 3, nil, pods(pod(0)), "+1@r2"},
		{"waits for the one before", 3, nil, pods(pod(0, unready)), ""},
		{"waits until it is available", 3, minReady, pods(pod(0, justReady)), ""},
		{"waits while it leaves", 3, nil, pods(pod(0, terminating)), ""},
		{"a gap first", 3, nil, pods(pod(0), pod(2)), "+1@r2"},
		{"all at once", 3, parallel, nil, "+0@r2 +1@r2 +2@r2"},
		{"waits for nobody", 3, parallel, pods(pod(0, unready), pod(1, terminating)), "+2@r2"},
		{"starts elsewhere", 2, all(parallel, from(5)), pods(pod(5)), "+6@r2"},
		{"moves", 2, from(1), pods(pod(0), pod(1)), "+2@r2"},
		{"has moved", 2, from(1), pods(pod(0), pod(1), pod(2)), "-0"},
		{"failed", 2, nil, pods(pod(0), pod(1, failed)), "-1"},
		{"ended well", 2, nil, pods(pod(0, succeeded), pod(1)), "-0"},
		{"ended, and leaves", 2, nil, pods(pod(0, failed, terminating), pod(1)), ""},
		{"some failed, some are missing", 3, parallel, pods(pod(0, failed)), "+1@r2 +2@r2 -0"},

		{"scales down from the end", 1, nil, pods(pod(0), pod(1), pod(2)), "-2"},
		{"one after the other", 1, nil, pods(pod(0), pod(1), pod(2, terminating)), ""},
		{"not while a replica is unwell", 1, nil, pods(pod(0, unready), pod(1)), ""},
		{"not while a lower one is unwell", 0, nil, pods(pod(0, unready), pod(1)), "-1"},
		{"nor over an unwell one", 0, nil, pods(pod(0, unready), pod(1, unready)), ""},
		{"an unwell one may go first", 1, nil, pods(pod(0), pod(1, unready)), "-1"},
		{"unless it has ended", 0, nil, pods(pod(0, failed), pod(1, failed)), "-1"},
		{"scales down at once", 1, parallel, pods(pod(0), pod(1, unready), pod(2)), "-2 -1"},
		{"deleted", 3, func(set *appsv1.StatefulSet) { set.DeletionTimestamp = &metav1.Time{Time: now} }, pods(pod(5)), ""},

		{"rolls from the end", 2, nil, pods(pod(0, old), pod(1, old)), "-1"},
		{"and waits", 2, nil, pods(pod(0, old), pod(1, terminating, old)), ""},
		{"creates with the new template", 2, nil, pods(pod(0, old)), "+1@r2"},
		{"and goes on", 2, nil, pods(pod(0, old), pod(1)), "-0"},
		{"unwell and old: what is broken goes first", 2, parallel, pods(pod(0, old), pod(1, old, unready)), "-1"},
		{"the new one is waited for", 2, parallel, pods(pod(0, old), pod(1, unready)), ""},
		{"keeps what is below the partition", 3, partition(2), pods(pod(0, old), pod(1, old), pod(2)), ""},
		{"rolls what is above", 3, partition(2), pods(pod(0, old), pod(1, old), pod(2, old)), "-2"},
		{"gives what is below the former template", 3, partition(2), pods(pod(0, old)), "+1@r1"},
		{"by number from the start", 3, all(partition(1), from(10), parallel), nil, "+10@r1 +11@r2 +12@r2"},
		{"on delete nothing rolls", 2, onDelete, pods(pod(0, old), pod(1, old)), ""},
		{"but what is new is new", 2, all(onDelete, parallel), pods(pod(0, old)), "+1@r2"},
		{"two at once", 3, atOnce(intstr.FromInt32(2)), pods(pod(0, old), pod(1, old), pod(2, old)), "-2 -1"},
		{"one of them is away", 3, all(parallel, atOnce(intstr.FromInt32(2))), pods(pod(0, old), pod(1, old), pod(2, unready)), "-1"},
		{"both are away", 3, all(parallel, atOnce(intstr.FromInt32(2))), pods(pod(0, old), pod(1, unready), pod(2, unready)), ""},
		{"a share, rounded down", 4, atOnce(intstr.FromString("60%")), pods(pod(0, old), pod(1, old), pod(2, old), pod(3, old)), "-3 -2"},
		{"but at least one", 3, atOnce(intstr.FromString("10%")), pods(pod(0, old), pod(1, old), pod(2, old)), "-2"},
		{"above the partition only", 3, all(partition(2), atOnce(intstr.FromInt32(3))), pods(pod(0, old), pod(1, old), pod(2, old)), "-2"},
		{"failed and old is deleted once", 2, parallel, pods(pod(0), pod(1, old, failed)), "-1"},
		{"scaling comes before updating", 1, nil, pods(pod(0, old), pod(1, old)), "-1"},
		{"two billion are not thought of", math.MaxInt32, nil, pods(pod(0)), "+1@r2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.set == nil {
				tt.set = all()
			}
			if got := say(Compute(snapshot(statefulSet(tt.replicas, tt.set), tt.pods), now)); got != tt.want {
				t.Errorf("plan %q, want %q", got, tt.want)
			}
		})
	}
}

func TestComputeInBursts(t *testing.T) {
	if plan := Compute(snapshot(statefulSet(math.MaxInt32, parallel), nil), now); len(plan.Create) != burst {
		t.Errorf("creates %d at once", len(plan.Create))
	}
}

func TestOrdinal(t *testing.T) {
	set := statefulSet(1)
	for name, want := range map[string]int{
		"db-0": 0, "db-17": 17, "db": -1, "db-": -1, "db-x": -1, "db--1": -1, "db-01": -1, "db-+1": -1, "other-1": -1, "db-a-1": -1,
	} {
		n, ok := Ordinal(set, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}})
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%s: %d %v, want %d", name, n, ok, want)
		}
	}
}

// A pod's identity and volumes.
func TestNewPod(t *testing.T) {
	set := statefulSet(1, claims)
	set.Spec.Template.Spec.Volumes = []corev1.Volume{
		{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	}
	plan := Compute(snapshot(set, nil), now)
	p := plan.Create[0].Pod
	if p.Name != "db-0" || p.Namespace != "ns" || p.Spec.Hostname != "db-0" || p.Spec.Subdomain != "dbs" || !metav1.IsControlledBy(p, set) {
		t.Errorf("pod %+v", p)
	}
	want := map[string]string{"app": "db", "statefulset.kubernetes.io/pod-name": "db-0", "apps.kubernetes.io/pod-index": "0", "controller-revision-hash": "r2"}
	if fmt.Sprint(p.Labels) != fmt.Sprint(want) {
		t.Errorf("labels %v", p.Labels)
	}
	if v := p.Spec.Volumes; len(v) != 2 || v[0].PersistentVolumeClaim == nil || v[0].PersistentVolumeClaim.ClaimName != "data-db-0" || v[1].Name != "tmp" {
		t.Errorf("volumes %+v", v)
	}
	if c := plan.Create[0].Claims; len(c) != 1 || c[0].Claim.Name != "data-db-0" || c[0].Claim.Labels["app"] != "db" {
		t.Errorf("claims %+v", c)
	}
	if len(set.Spec.Template.Labels) != 1 || set.Spec.Template.Spec.Volumes[0].EmptyDir == nil {
		t.Errorf("the cached set has become %+v", set.Spec.Template)
	}
}

func TestMending(t *testing.T) {
	healthy, broken := pod(0), pod(1, nameless)
	plan := Compute(snapshot(statefulSet(2, claims), pods(healthy, broken), claim(0), claim(1)), now)
	if len(plan.UpdatePods) != 1 || plan.UpdatePods[0].Name != "db-1" || plan.UpdatePods[0].Labels[appsv1.StatefulSetPodNameLabel] != "db-1" {
		t.Errorf("updates %v", plan.UpdatePods)
	}
	if _, changed := broken.Labels[appsv1.StatefulSetPodNameLabel]; changed {
		t.Error("the cached pod was changed")
	}
	// A pod that waits for a claim that somebody deleted gets a new one.
	plan = Compute(snapshot(statefulSet(1, claims), pods(pod(0, pending))), now)
	if len(plan.CreateClaims) != 1 || plan.CreateClaims[0].Claim.Name != "data-db-0" {
		t.Errorf("claims %+v", plan.CreateClaims)
	}
}

const (
	keep = appsv1.RetainPersistentVolumeClaimRetentionPolicyType
	drop = appsv1.DeletePersistentVolumeClaimRetentionPolicyType
)

func words(refs []metav1.OwnerReference) string {
	var words []string
	for _, ref := range refs {
		words = append(words, fmt.Sprintf("%s/%s/%s controls:%v", ref.Kind, ref.Name, ref.UID, ref.Controller != nil && *ref.Controller))
	}
	return strings.Join(words, ", ")
}

// Who owns the claims of a pod that stays, and of one that is scaled away.
func TestRetention(t *testing.T) {
	bySet := *metav1.NewControllerRef(statefulSet(1), Kind)
	byPod := func(n int) metav1.OwnerReference { return *metav1.NewControllerRef(pod(n), podKind) }
	uncontrolled := bySet
	uncontrolled.Controller = nil
	foreign := metav1.OwnerReference{APIVersion: "v1", Kind: "ConfigMap", Name: "x", UID: "x"}
	yes := true
	rival := metav1.OwnerReference{APIVersion: "example.com/v1", Kind: "Boss", Name: "x", UID: "y", Controller: &yes}
	other := func(ref metav1.OwnerReference) metav1.OwnerReference { ref.UID = "earlier"; return ref }
	refs := func(refs ...metav1.OwnerReference) []metav1.OwnerReference { return refs }
	for _, tt := range []struct {
		name                    string
		whenDeleted, whenScaled appsv1.PersistentVolumeClaimRetentionPolicyType
		number                  int // 1 is scaled away
		have, want              []metav1.OwnerReference
		conflict                bool
	}{
		{"keep, keep", keep, keep, 0, nil, nil, false},
		{"keep, keep: no longer dropped", keep, keep, 0, refs(bySet, foreign), refs(foreign), false},
		{"drop, keep", drop, keep, 0, nil, refs(bySet), false},
		{"drop, keep: scaled away", drop, keep, 1, nil, refs(bySet), false},
		{"drop, keep: is so", drop, keep, 0, refs(foreign, bySet), refs(foreign, bySet), false},
		{"drop, keep: not as controller", drop, keep, 0, refs(uncontrolled), refs(bySet), false},
		{"keep, drop", keep, drop, 0, nil, nil, false},
		{"keep, drop: scaled away", keep, drop, 1, nil, refs(byPod(1)), false},
		{"keep, drop: scaled up again", keep, drop, 0, refs(byPod(0)), nil, false},
		{"drop, drop", drop, drop, 0, nil, refs(bySet), false},
		{"drop, drop: scaled away", drop, drop, 1, refs(bySet), refs(byPod(1)), false},
		{"an earlier set's", drop, drop, 0, refs(other(bySet)), refs(other(bySet)), false},
		{"an earlier pod's", drop, keep, 0, refs(other(byPod(0))), refs(other(byPod(0))), false},
		{"another controller's", drop, drop, 0, refs(rival), refs(rival), false},
		{"another controller's as well", drop, drop, 0, refs(rival, uncontrolled), refs(rival), true},
		{"another controller's, kept", keep, keep, 0, refs(rival), refs(rival), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set := statefulSet(1, claims, policy(tt.whenDeleted, tt.whenScaled))
			have := claim(tt.number, slices.Clone(tt.have)...)
			plan := Compute(snapshot(set, pods(pod(0), pod(1)), have, claim(1-tt.number, rival)), now)
			got := tt.have
			for _, c := range plan.UpdateClaims {
				if c.Name == have.Name {
					got = c.OwnerReferences
				}
			}
			if words(got) != words(tt.want) || len(plan.UpdateClaims) > 1 {
				t.Errorf("owners %s, want %s", words(got), words(tt.want))
			}
			if words(have.OwnerReferences) != words(tt.have) {
				t.Error("the cached claim was changed")
			}
			if (len(plan.Conflicts) > 0) != tt.conflict {
				t.Errorf("conflicts %v", plan.Conflicts)
			}
			if !strings.Contains(say(plan), "-1") {
				t.Errorf("plan %s does not scale down", say(plan))
			}
		})
	}
	// Claims that are made for a pod belong to the set from the start.
	plan := Compute(snapshot(statefulSet(1, claims, policy(drop, drop)), nil), now)
	if c := plan.Create[0].Claims[0].Claim; len(c.OwnerReferences) != 1 || c.OwnerReferences[0].UID != "set" {
		t.Errorf("owners %v", c.OwnerReferences)
	}
}

// A pod does not begin with a claim that is about to go.
func TestBlocked(t *testing.T) {
	leaving := claim(0)
	leaving.DeletionTimestamp = &metav1.Time{Time: now}
	plan := Compute(snapshot(statefulSet(2, claims, parallel), nil, leaving), now)
	if say(plan) != "+1@r2" || len(plan.Blocked) != 1 || plan.Blocked[0].Reason != "pvc data-db-0 is being deleted" {
		t.Errorf("plan %s, blocked %+v", say(plan), plan.Blocked)
	}
	ofEarlier := *metav1.NewControllerRef(pod(0), podKind)
	plan = Compute(snapshot(statefulSet(2, claims, policy(keep, drop)), nil, claim(0, ofEarlier)), now)
	if say(plan) != "" || len(plan.Blocked) != 1 || len(plan.UpdateClaims) != 0 {
		t.Errorf("plan %s, %+v", say(plan), plan)
	}
	// Under another policy nobody is about to delete it.
	plan = Compute(snapshot(statefulSet(1, claims), nil, claim(0, ofEarlier)), now)
	if say(plan) != "+0@r2" {
		t.Errorf("plan %s", say(plan))
	}
}

func TestStatus(t *testing.T) {
	set := statefulSet(4)
	set.Spec.MinReadySeconds = 10
	set.Status.Conditions = []appsv1.StatefulSetCondition{{Type: "Kept"}}
	s := snapshot(set, pods(pod(0), pod(1, ready), pod(2, unready, old), pod(3, terminating), pod(7, old)))
	got := Status(s, new(int32), now)
	want := [...]int32{5, 4, 3, 2, 2}
	if have := [...]int32{got.Replicas, got.ReadyReplicas, got.AvailableReplicas, got.CurrentReplicas, got.UpdatedReplicas}; have != want {
		t.Errorf("replicas, ready, available, current, updated = %v, want %v", have, want)
	}
	if got.ObservedGeneration != 3 || got.CurrentRevision != "r1" || got.UpdateRevision != "r2" || len(got.Conditions) != 1 || got.CollisionCount == nil {
		t.Errorf("status %+v", got)
	}
	done := Status(snapshot(statefulSet(2), pods(pod(0), pod(1))), nil, now)
	if done.CurrentRevision != "r2" || done.CurrentReplicas != 2 {
		t.Errorf("a rollout that is over has status %+v", done)
	}
	if half := Status(snapshot(statefulSet(2), pods(pod(0), pod(1, unready))), nil, now); half.CurrentRevision != "r1" {
		t.Errorf("a rollout that is not over has status %+v", half)
	}
	if byHand := Status(snapshot(statefulSet(1, onDelete), pods(pod(0))), nil, now); byHand.CurrentRevision != "r1" {
		t.Errorf("without rolling the status is %+v", byHand)
	}
}
