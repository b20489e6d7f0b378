// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"errors"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/kubernetes/pkg/controller"
)

// An owner is settled once exactly what succeeded was seen; what failed is not waited for, and does not keep the
// rest from being tried.
func TestActIsSettledWhenSeen(t *testing.T) {
	owner := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u"}}
	kind := appsv1.SchemeGroupVersion.WithKind("ReplicaSet")
	pod := func(name string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(owner, kind)},
		}}
	}
	gone := apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "gone")
	for _, tt := range []struct {
		name             string
		create           int
		createErr        error
		remove           []string
		seenNew, seenOld int // events that must come before it is settled
		fails            bool
	}{
		{"nothing", 0, nil, nil, 0, 0, false},
		{"creates", 3, nil, nil, 3, 0, false},
		{"deletes", 0, nil, []string{"a", "b"}, 0, 2, false},
		{"both", 2, nil, []string{"a"}, 2, 1, false},
		{"cannot create, still deletes", 2, errors.New("exceeded quota"), []string{"a"}, 0, 1, true},
		{"already gone", 0, nil, []string{"gone", "a"}, 0, 1, false},
		{"cannot delete, still creates", 1, nil, []string{"stuck"}, 1, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			queue := &Queue{queue: workqueue.NewTypedDelayingQueue[string]()}
			defer queue.queue.ShutDown()
			p := Pods[*appsv1.ReplicaSet]{
				Kind: kind, Queue: queue,
				Expectations: controller.NewUIDTrackingControllerExpectations(controller.NewControllerExpectations()),
				Cached:       func(string, string) (*appsv1.ReplicaSet, error) { return owner, nil },
				Indexer:      cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil),
			}
			var others, removed []*corev1.Pod
			for _, name := range tt.remove {
				others = append(others, pod(name))
			}
			err := p.Act(t.Context(), owner, tt.create, func(int) error { return tt.createErr }, others, func(pod *corev1.Pod) error {
				switch pod.Name {
				case "gone":
					return gone
				case "stuck":
					return errors.New("no")
				}
				return nil
			})
			if (err != nil) != tt.fails {
				t.Fatalf("error %v", err)
			}
			for _, other := range others {
				if other.Name != "gone" && other.Name != "stuck" {
					removed = append(removed, other)
				}
			}
			if len(removed) != tt.seenOld {
				t.Fatalf("%d deletions to see, want %d", len(removed), tt.seenOld)
			}
			handlers := p.Handlers()
			for i := range tt.seenNew {
				if p.Settled(Key(owner)) {
					t.Fatalf("settled before creation %d was seen", i)
				}
				handlers.Add(pod(fmt.Sprint("new-", i)))
			}
			for i, pod := range removed {
				if p.Settled(Key(owner)) {
					t.Fatalf("settled before deletion %d was seen", i)
				}
				handlers.Delete(pod)
				handlers.Delete(pod) // seen twice counts once
			}
			if !p.Settled(Key(owner)) {
				t.Error("not settled although everything was seen")
			}
		})
	}
}
