// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestHostileObjects gives one cluster what means harm; after each of them it does what it always does.
func TestHostileObjects(t *testing.T) {
	c := newCluster(t)
	c.addNode("n1")
	c.kubelet("n1")
	t.Run("a million replicas", func(*testing.T) { c.millionReplicas() })
	t.Run("a million replicas without a quota", func(*testing.T) { c.unlimitedReplicas() })
	t.Run("a schema that refers to itself", func(*testing.T) { c.recursiveSchemas() })
	t.Run("owners in a circle", func(*testing.T) { c.ownersInCircle() })
	t.Run("two for the same pods", func(*testing.T) { c.twoForTheSamePods() })
	t.Run("names at their limit", func(*testing.T) { c.longNames() })
	t.Run("a webhook that hangs", func(*testing.T) { c.hangingWebhook() })
}

// deployment makes a Deployment, whose pods nobody else selects.
func (c *cluster) deployment(ns, name string, replicas int32, changes ...func(*corev1.PodSpec)) {
	c.Helper()
	spec := corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "app:1"}}}
	for _, change := range changes {
		change(&spec)
	}
	labels := map[string]string{"app": "of-" + ns}
	_, err := c.client.AppsV1().Deployments(ns).Create(c.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       spec,
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
}

// works shows that the cluster still does what people want: a Deployment becomes available and goes.
func (c *cluster) works(ns string) {
	c.Helper()
	c.namespace(ns)
	c.deployment(ns, "ordinary", 2)
	c.eventually("an ordinary Deployment in "+ns, func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "ordinary", metav1.GetOptions{})
		if err == nil && d.Status.AvailableReplicas != 2 {
			return fmt.Errorf("%+v", d.Status)
		}
		return err
	})
}

// A Deployment of a million pods gets what the quota lets it have, says why there are no more, and keeps nobody
// from their work; made small again it is small.
func (c *cluster) millionReplicas() {
	const ns, limit = "million", 15
	c.namespace(ns)
	_, err := c.client.CoreV1().ResourceQuotas(ns).Create(c.Context(), &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "pods"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: *resource.NewQuantity(limit, resource.DecimalSI)}},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.deployment(ns, "huge", 1_000_000)
	c.eventually("as many pods as the quota has, and a condition", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "huge", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range d.Status.Conditions {
			if condition.Type == appsv1.DeploymentReplicaFailure && strings.Contains(condition.Message, "exceeded quota") && len(pods.Items) == limit {
				return nil
			}
		}
		return fmt.Errorf("%d pods, %+v", len(pods.Items), d.Status.Conditions)
	})
	c.works("beside-million")
	if _, err := c.client.AppsV1().Deployments(ns).Patch(c.Context(), "huge", "application/merge-patch+json", []byte(`{"spec":{"replicas":1}}`), metav1.PatchOptions{}); err != nil {
		c.Fatal(err)
	}
	c.eventually("one pod", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) != 1 {
			return fmt.Errorf("%d pods", len(pods.Items))
		}
		return err
	})
}

// Without a quota pods come as fast as they can be made, and yet others get theirs, then as while
// those that are too many go.
func (c *cluster) unlimitedReplicas() {
	const ns = "unlimited"
	c.namespace(ns)
	c.deployment(ns, "huge", 1_000_000, func(spec *corev1.PodSpec) {
		spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.org/never"}} // no node has so much to do
	})
	pods := func(ctx context.Context) (int, error) {
		list, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		if err != nil {
			return 0, err
		}
		return len(list.Items), nil
	}
	c.eventually("pods without end", func(ctx context.Context) error {
		if n, err := pods(ctx); err != nil || n < 200 {
			return fmt.Errorf("%d pods: %w", n, err)
		}
		return nil
	})
	c.works("beside-unlimited")
	if _, err := c.client.AppsV1().Deployments(ns).Patch(c.Context(), "huge", "application/merge-patch+json", []byte(`{"spec":{"replicas":1}}`), metav1.PatchOptions{}); err != nil {
		c.Fatal(err)
	}
	most, err := pods(c.Context())
	if err != nil {
		c.Fatal(err)
	}
	c.eventually("fewer pods", func(ctx context.Context) error {
		if n, err := pods(ctx); err != nil || n >= most {
			return fmt.Errorf("%d pods: %w", n, err)
		}
		return nil
	})
	c.works("beside-many-that-go")
}

// Definitions whose schema refers to itself, or is deeper than anybody can read, are refused, and the server goes on.
func (c *cluster) recursiveSchemas() {
	define := func(name, schema string) error {
		body := fmt.Sprintf(`{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"%ss.example.org"},"spec":{
			"group":"example.org","scope":"Namespaced","names":{"plural":"%[1]ss","singular":"%[1]s","kind":"%[1]s","listKind":"%[1]sList"},
			"versions":[{"name":"v1","served":true,"storage":true,"schema":{"openAPIV3Schema":%s}}]}}`, name, schema)
		return c.client.CoreV1().RESTClient().Post().AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions").
			SetHeader("Content-Type", "application/json").Body([]byte(body)).Do(c.Context()).Error()
	}
	err := define("circle", `{"type":"object","properties":{"spec":{"$ref":"#/properties/spec"}}}`)
	if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "$ref") {
		c.Errorf("a schema that refers to itself: %v", err)
	}
	const deep = 12_000
	err = define("abyss", strings.Repeat(`{"type":"object","properties":{"a":`, deep)+`{"type":"string"}`+strings.Repeat("}}", deep))
	if err == nil || apierrors.IsInternalError(err) {
		c.Errorf("a schema of %d levels: %v", deep, err)
	}
	c.works("beside-schemas")
}

// Two objects that own each other stay while nobody deletes one; if somebody does, both go, even if the deletion
// waits for what is owned.
func (c *cluster) ownersInCircle() {
	const ns = "circle"
	c.namespace(ns)
	ctx, maps := c.Context(), c.client.CoreV1().ConfigMaps(ns)
	block := true
	own := func(of *corev1.ConfigMap) []metav1.OwnerReference {
		return []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: of.Name, UID: of.UID, BlockOwnerDeletion: &block}}
	}
	a, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a"}}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	b, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "b", OwnerReferences: own(a)}}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	a.OwnerReferences = own(b)
	if _, err := maps.Update(ctx, a, metav1.UpdateOptions{}); err != nil {
		c.Fatal(err)
	}
	foreground := metav1.DeletePropagationForeground
	if err := maps.Delete(ctx, "a", metav1.DeleteOptions{PropagationPolicy: &foreground}); err != nil {
		c.Fatal(err)
	}
	c.eventually("both to go", func(ctx context.Context) error {
		for _, name := range []string{"a", "b"} {
			if _, err := maps.Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
}

// Two Deployments with one selector: each keeps its own pods, and neither takes the other's. A selector of nothing
// is no selector.
func (c *cluster) twoForTheSamePods() {
	const ns = "rivals"
	c.namespace(ns)
	c.deployment(ns, "one", 3)
	c.deployment(ns, "two", 2)
	c.eventually("five pods", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		n := map[string]int{}
		for _, p := range pods.Items {
			n[p.Name[:len("one-")]]++
		}
		if len(pods.Items) != 5 || n["one-"] != 3 || n["two-"] != 2 {
			return fmt.Errorf("%v", n)
		}
		return nil
	})
	one := int32(1)
	_, err := c.client.AppsV1().ReplicaSets(ns).Create(c.Context(), &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Name: "everything"},
		Spec: appsv1.ReplicaSetSpec{Replicas: &one, Selector: &metav1.LabelSelector{}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "app:1"}}},
		}},
	}, metav1.CreateOptions{})
	if !apierrors.IsInvalid(err) {
		c.Errorf("a ReplicaSet that selects everything: %v", err)
	}
}

// The longest name that a Deployment may have leaves room for its pods' names.
func (c *cluster) longNames() {
	const ns = "names"
	c.namespace(ns)
	name := strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + "." + strings.Repeat("c", 63) + "." + strings.Repeat("d", 61)
	if len(name) != 253 {
		c.Fatal(len(name))
	}
	c.deployment(ns, name, 2)
	c.eventually("pods of a Deployment with a name of 253 characters, or a reason", func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil || d.Status.AvailableReplicas == 2 {
			return err
		}
		for _, condition := range d.Status.Conditions {
			if condition.Status == corev1.ConditionFalse && condition.Reason == "ReplicaSetCreateError" && condition.Message != "" {
				return nil
			}
		}
		return fmt.Errorf("%+v", d.Status)
	})
	c.works("beside-names")
}

// A webhook that accepts connections and says nothing delays what it is about by its time-out, and nothing else.
func (c *cluster) hangingWebhook() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.Fatal(err)
	}
	defer l.Close() // connections wait in its queue, unanswered
	const ns = "hanging"
	c.namespace(ns)
	url, second, none, fail := "https://"+l.Addr().String(), int32(1), admissionv1.SideEffectClassNone, admissionv1.Fail
	hooks := c.client.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	_, err = hooks.Create(c.Context(), &admissionv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "hangs"},
		Webhooks: []admissionv1.ValidatingWebhook{{
			Name: "hangs.example.org", ClientConfig: admissionv1.WebhookClientConfig{URL: &url}, TimeoutSeconds: &second, SideEffects: &none,
			FailurePolicy: &fail, AdmissionReviewVersions: []string{"v1"},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns}},
			Rules: []admissionv1.RuleWithOperations{{
				Operations: []admissionv1.OperationType{admissionv1.Create},
				Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.deployment(ns, "stuck", 5)
	c.eventually("a condition that names the webhook", func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "stuck", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range d.Status.Conditions {
			if condition.Type == appsv1.DeploymentReplicaFailure && strings.Contains(condition.Message, "hangs.example.org") {
				return nil
			}
		}
		return fmt.Errorf("%+v", d.Status.Conditions)
	})
	c.works("beside-hanging")
	if err := hooks.Delete(c.Context(), "hangs", metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.eventually("the pods, once it is gone", func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "stuck", metav1.GetOptions{})
		if err == nil && d.Status.AvailableReplicas != 5 {
			return fmt.Errorf("%+v", d.Status)
		}
		return err
	})
}
