// SPDX-License-Identifier: Apache-2.0

package podgc

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func pod(phase corev1.PodPhase, node string, deleting bool) *corev1.Pod {
	p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
	if deleting {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	return p
}

func node(ready corev1.ConditionStatus, outOfService bool) *corev1.Node {
	n := &corev1.Node{Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
	if outOfService {
		n.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeOutOfService, Effect: corev1.TaintEffectNoExecute}}
	}
	return n
}

func TestJudge(t *testing.T) {
	well, dead := node(corev1.ConditionTrue, false), node(corev1.ConditionUnknown, true)
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		node *corev1.Node
		gone bool
		want Reason
	}{
		{"runs", pod(corev1.PodRunning, "n", false), well, false, None},
		{"waits for a node", pod(corev1.PodPending, "", false), nil, false, None},
		{"deleted before it had a node", pod(corev1.PodPending, "", true), nil, false, Unscheduled},
		{"node not yet known", pod(corev1.PodRunning, "n", false), nil, false, None},
		{"node gone", pod(corev1.PodRunning, "n", false), nil, true, Orphaned},
		{"deleted, the node will end it", pod(corev1.PodRunning, "n", true), well, false, None},
		{"deleted on a node out of service", pod(corev1.PodRunning, "n", true), dead, false, OutOfService},
		{"not deleted on a node out of service", pod(corev1.PodRunning, "n", false), dead, false, None},
		{"deleted on a node marked by mistake", pod(corev1.PodRunning, "n", true), node(corev1.ConditionTrue, true), false, None},
		{"deleted on a silent node", pod(corev1.PodRunning, "n", true), node(corev1.ConditionUnknown, false), false, None},
	} {
		if got := Judge(tt.pod, tt.node, tt.gone); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestSurplus(t *testing.T) {
	var ended []*corev1.Pod
	for i, name := range []string{"new", "old", "evicted", "same-b", "same-a"} {
		p := pod(corev1.PodFailed, "n", false)
		p.Name = name
		p.CreationTimestamp = metav1.Unix([]int64{500, 100, 400, 200, 200}[i], 0)
		if name == "evicted" {
			p.Status.Reason = "Evicted"
		}
		ended = append(ended, p)
	}
	names := func(pods []*corev1.Pod) string {
		var s []string
		for _, p := range pods {
			s = append(s, p.Name)
		}
		return strings.Join(s, " ")
	}
	for threshold, want := range map[int]string{0: "", 5: "", 9: "", 4: "evicted", 2: "evicted old same-a", 1: "evicted old same-a same-b"} {
		if got := names(Surplus(ended, threshold)); got != want {
			t.Errorf("threshold %d: %q, want %q", threshold, got, want)
		}
	}
	if got := names(ended); got != "new old evicted same-b same-a" {
		t.Errorf("the input was sorted: %s", got)
	}
}

func TestFailed(t *testing.T) {
	p := pod(corev1.PodRunning, "n", false)
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	s := Failed(p, Orphaned)
	if s.Phase != corev1.PodFailed || p.Status.Phase != corev1.PodRunning {
		t.Errorf("phase %s, the input's %s", s.Phase, p.Status.Phase)
	}
	if got := fmt.Sprint(s.Conditions[1].Type, s.Conditions[1].Reason, s.Conditions[1].Message); got != "DisruptionTargetDeletionByPodGCPodGC: node no longer exists" {
		t.Error(got)
	}
	if s := Failed(p, Unscheduled); len(s.Conditions) != 1 {
		t.Errorf("%+v", s.Conditions)
	}
	if Failed(pod(corev1.PodSucceeded, "n", false), Orphaned) != nil {
		t.Error("a pod that succeeded becomes failed")
	}
}
