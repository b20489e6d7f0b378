// SPDX-License-Identifier: Apache-2.0

package replicaset

import (
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A ReplicationController that was seen as a ReplicaSet is what it was: a status can be written without a change of
// anything else.
func TestControllerThereAndBack(t *testing.T) {
	n := int32(3)
	rc := &corev1.ReplicationController{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: "web", UID: types.UID("u"), ResourceVersion: "7", Generation: 4,
			Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"}, Finalizers: []string{"e"},
		},
		Spec: corev1.ReplicationControllerSpec{
			Replicas: &n, MinReadySeconds: 5, Selector: map[string]string{"app": "web"},
			Template: &corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}}},
		},
		Status: corev1.ReplicationControllerStatus{
			Replicas: 1, FullyLabeledReplicas: 2, ReadyReplicas: 3, AvailableReplicas: 4, ObservedGeneration: 5,
			Conditions: []corev1.ReplicationControllerCondition{{
				Type: corev1.ReplicationControllerReplicaFailure, Status: corev1.ConditionTrue,
				LastTransitionTime: metav1.NewTime(now), Reason: "FailedCreate", Message: "quota",
			}},
		},
	}
	// Fields that a later version of the API adds are to be seen here.
	for _, part := range []any{rc.Spec, rc.Status} {
		v := reflect.ValueOf(part)
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%s.%s is not in this test", v.Type(), v.Type().Field(i).Name)
			}
		}
	}
	if back := toController(fromController(rc)); !reflect.DeepEqual(back, rc) {
		t.Errorf("got %+v\nwant %+v", back, rc)
	}
}
