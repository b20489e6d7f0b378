// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A ReplicationController keeps its number of pods, adopts and releases by labels, says in its status what there is, and
// takes its pods along; a ReplicaSet of the same name and labels does not touch them.
func TestReplicationController(t *testing.T) {
	c := newCluster(t)
	c.addNode("n1")
	c.kubelet("n1")
	c.namespace("old")
	ctx := t.Context()
	controllers, pods := c.client.CoreV1().ReplicationControllers("old"), c.client.CoreV1().Pods("old")
	labels := map[string]string{"app": "web"}
	orphan := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "orphan", Labels: labels},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "web:1"}}},
	}
	if _, err := pods.Create(ctx, orphan, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	three := int32(3)
	rc, err := controllers.Create(ctx, &corev1.ReplicationController{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ReplicationControllerSpec{
			Replicas: &three, Template: &corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: orphan.Spec},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	settled := func(n int32) {
		t.Helper()
		c.eventually(fmt.Sprintf("%d pods", n), func(ctx context.Context) error {
			rc, err := controllers.Get(ctx, "web", metav1.GetOptions{})
			if err != nil {
				return err
			}
			all, err := pods.List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
			if err != nil {
				return err
			}
			s := rc.Status
			if s.Replicas != n || s.ReadyReplicas != n || s.AvailableReplicas != n || s.FullyLabeledReplicas != n || s.ObservedGeneration != rc.Generation {
				var are []string
				for _, p := range all.Items {
					are = append(are, fmt.Sprintf("%s on %q: %+v", p.Name, p.Spec.NodeName, p.Status))
				}
				return fmt.Errorf("status %+v of pods %q", s, are)
			}
			if len(all.Items) != int(n) {
				return fmt.Errorf("%d pods", len(all.Items))
			}
			for _, p := range all.Items {
				if ref := metav1.GetControllerOf(&p); ref == nil || ref.Kind != "ReplicationController" || ref.APIVersion != "v1" || ref.UID != rc.UID {
					return fmt.Errorf("pod %s is owned by %v", p.Name, ref)
				}
			}
			return nil
		})
	}
	settled(3)
	if p, err := pods.Get(ctx, "orphan", metav1.GetOptions{}); err != nil || !metav1.IsControlledBy(p, rc) {
		t.Errorf("the pod that was there was not adopted: %v", err)
	}

	if _, err := controllers.Patch(ctx, "web", "application/merge-patch+json", []byte(`{"spec":{"replicas":5}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	settled(5)
	// Released by its labels, the pod lives on and another takes its place.
	if _, err := pods.Patch(ctx, "orphan", "application/merge-patch+json", []byte(`{"metadata":{"labels":{"app":"debug"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("release", func(ctx context.Context) error {
		p, err := pods.Get(ctx, "orphan", metav1.GetOptions{})
		if err == nil && len(p.OwnerReferences) > 0 {
			return fmt.Errorf("owned by %v", p.OwnerReferences)
		}
		return err
	})
	settled(5)
	c.eventually("events about the ReplicationController", func(ctx context.Context) error {
		events, err := c.client.CoreV1().Events("old").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.kind=ReplicationController,reason=SuccessfulCreate"})
		if err == nil && len(events.Items) == 0 {
			return fmt.Errorf("none")
		}
		return err
	})
	background := metav1.DeletePropagationBackground // the default of this kind is to leave them
	if err := controllers.Delete(ctx, "web", metav1.DeleteOptions{PropagationPolicy: &background}); err != nil {
		t.Fatal(err)
	}
	c.eventually("its pods to go", func(ctx context.Context) error {
		all, err := pods.List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err == nil && len(all.Items) > 0 {
			return fmt.Errorf("%d pods", len(all.Items))
		}
		return err
	})

	// On the same cluster: a policy whose expression does not fit its type is told so.
	fail := admissionv1.Fail
	policy := &admissionv1.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "mistaken"},
		Spec: admissionv1.ValidatingAdmissionPolicySpec{
			FailurePolicy: &fail,
			MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
				Operations: []admissionv1.OperationType{admissionv1.Create},
				Rule:       admissionv1.Rule{APIGroups: []string{"apps"}, APIVersions: []string{"v1"}, Resources: []string{"deployments"}},
			}}}},
			Validations: []admissionv1.Validation{{Expression: "object.spec.replicas < 5"}, {Expression: "object.spec.replica < 5"}},
		},
	}
	policies := c.client.AdmissionregistrationV1().ValidatingAdmissionPolicies()
	if _, err := policies.Create(ctx, policy, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("a warning about the second expression", func(ctx context.Context) error {
		p, err := policies.Get(ctx, "mistaken", metav1.GetOptions{})
		switch {
		case err != nil:
			return err
		case p.Status.ObservedGeneration != p.Generation || p.Status.TypeChecking == nil:
			return fmt.Errorf("status %+v", p.Status)
		}
		w := p.Status.TypeChecking.ExpressionWarnings
		if len(w) != 1 || w[0].FieldRef != "spec.validations[1].expression" || !strings.Contains(w[0].Warning, "undefined field 'replica'") {
			return fmt.Errorf("warnings %+v", w)
		}
		return nil
	})
}
