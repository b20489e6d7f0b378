// SPDX-License-Identifier: Apache-2.0

package node

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/apis/scheduling"

	"skep.io/skep/node/static"
)

func TestShutdownGroups(t *testing.T) {
	pod := func(uid types.UID, priority int32, phase corev1.PodPhase) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}, Spec: corev1.PodSpec{Priority: &priority}, Status: corev1.PodStatus{Phase: phase}}
	}
	fromFile := pod("static", 0, corev1.PodRunning)
	fromFile.Annotations = map[string]string{static.HashAnnotation: "static"}
	none := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "none"}}
	got := Shutdown{Grace: 30 * time.Second, Critical: 10 * time.Second}.groups([]*corev1.Pod{
		pod("node-critical", scheduling.SystemCriticalPriority+1000, corev1.PodRunning), pod("high", scheduling.HighestUserDefinablePriority, corev1.PodPending),
		none, fromFile, pod("done", 0, corev1.PodSucceeded), pod("critical", scheduling.SystemCriticalPriority, corev1.PodRunning),
	})
	want := []shutdownGroup{
		{"regular", []types.UID{"high", "none"}, 20 * time.Second},
		{"critical", []types.UID{"node-critical", "static", "critical"}, 10 * time.Second},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(shutdownGroup{})); diff != "" {
		t.Error(diff)
	}
}
