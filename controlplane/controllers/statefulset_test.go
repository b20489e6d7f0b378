// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// database is a StatefulSet as people write them; its claims go when their pods or the set go.
func database(ns string, replicas int32) *appsv1.StatefulSet {
	labels := map[string]string{"app": "db"}
	const drop = appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	return &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "db"},
		Spec: appsv1.StatefulSetSpec{
			Replicas: &replicas, ServiceName: "dbs", Selector: &metav1.LabelSelector{MatchLabels: labels},
			PersistentVolumeClaimRetentionPolicy: &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenDeleted: drop, WhenScaled: drop},
			VolumeClaimTemplates: []corev1.PersistentVolumeClaim{{
				ObjectMeta: metav1.ObjectMeta{Name: "data"},
				Spec: corev1.PersistentVolumeClaimSpec{
					AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
					Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")}},
				},
			}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: "db", Image: "db:1", VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}},
				}}},
			},
		},
	}
}

// waitSet waits until the set's pods are exactly these, each written NAME=IMAGE, all available.
func (c *cluster) waitSet(ns string, want ...string) *appsv1.StatefulSet {
	c.Helper()
	var set *appsv1.StatefulSet
	c.eventually(fmt.Sprint("pods ", want), func(ctx context.Context) (err error) {
		if set, err = c.client.AppsV1().StatefulSets(ns).Get(ctx, "db", metav1.GetOptions{}); err != nil {
			return err
		}
		if err := isRolledOut("StatefulSet", set); err != nil {
			return err
		}
		if n := int32(len(want)); set.Status.Replicas != n || set.Status.AvailableReplicas != n {
			return fmt.Errorf("status %+v", set.Status)
		}
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=db"})
		if err != nil {
			return err
		}
		var got []string
		for _, pod := range pods.Items {
			if !metav1.IsControlledBy(&pod, set) || pod.Spec.Hostname != pod.Name || pod.Spec.Subdomain != "dbs" || pod.Labels[appsv1.StatefulSetPodNameLabel] != pod.Name {
				return fmt.Errorf("pod %s: owners %v, labels %v", pod.Name, pod.OwnerReferences, pod.Labels)
			}
			got = append(got, pod.Name+"="+pod.Spec.Containers[0].Image)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("pods %v", got)
		}
		return nil
	})
	return set
}

// waitClaims waits until the claims are exactly these.
func (c *cluster) waitClaims(ns string, want ...string) {
	c.Helper()
	c.eventually(fmt.Sprint("claims ", want), func(ctx context.Context) error {
		claims, err := c.client.CoreV1().PersistentVolumeClaims(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var got []string
		for _, claim := range claims.Items {
			if claim.DeletionTimestamp != nil {
				continue // who protects claims in use lets go of it
			}
			got = append(got, claim.Name)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("claims %v", got)
		}
		return nil
	})
}

func (c *cluster) scaleSet(ns string, replicas int32) {
	c.Helper()
	c.eventually("scale", func(ctx context.Context) error {
		_, err := c.client.AppsV1().StatefulSets(ns).UpdateScale(ctx, "db",
			&autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "db"}, Spec: autoscalingv1.ScaleSpec{Replicas: replicas}}, metav1.UpdateOptions{})
		return err
	})
}

func (c *cluster) updateSet(ns string, change func(*appsv1.StatefulSet)) {
	c.Helper()
	c.eventually("update of the stateful set", func(ctx context.Context) error {
		set, err := c.client.AppsV1().StatefulSets(ns).Get(ctx, "db", metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(set)
		_, err = c.client.AppsV1().StatefulSets(ns).Update(ctx, set, metav1.UpdateOptions{})
		return err
	})
}

// TestStatefulSet follows one against a real API server: it grows and shrinks with its claims, its template rolls out
// in part, in full and back, a pod that fails comes back under its name, and who comes after it adopts its pods.
func TestStatefulSet(t *testing.T) {
	const ns = metav1.NamespaceDefault
	c := newCluster(t)
	c.addNodes("n1")
	c.kubelet("n1")
	ctx := t.Context()
	sets := c.client.AppsV1().StatefulSets(ns)
	if _, err := sets.Create(ctx, database(ns, 2), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.waitSet(ns, "db-0=db:1", "db-1=db:1")
	c.waitClaims(ns, "data-db-0", "data-db-1")
	c.scaleSet(ns, 3)
	c.waitSet(ns, "db-0=db:1", "db-1=db:1", "db-2=db:1")
	c.waitClaims(ns, "data-db-0", "data-db-1", "data-db-2")
	c.scaleSet(ns, 2)
	c.waitSet(ns, "db-0=db:1", "db-1=db:1")
	c.waitClaims(ns, "data-db-0", "data-db-1")

	// A pod that failed comes back with its name and its claim.
	failed, err := c.client.CoreV1().Pods(ns).Get(ctx, "db-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	failed.Status.Phase = corev1.PodFailed
	if _, err := c.client.CoreV1().Pods(ns).UpdateStatus(ctx, failed, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("another db-1", func(ctx context.Context) error {
		again, err := c.client.CoreV1().Pods(ns).Get(ctx, "db-1", metav1.GetOptions{})
		if err == nil && again.UID == failed.UID {
			return fmt.Errorf("it is still there")
		}
		return err
	})
	c.waitSet(ns, "db-0=db:1", "db-1=db:1")

	// In part, in full, and back.
	c.updateSet(ns, func(set *appsv1.StatefulSet) {
		*set.Spec.UpdateStrategy.RollingUpdate.Partition = 1
		set.Spec.Template.Spec.Containers[0].Image = "db:2"
	})
	if s := c.waitSet(ns, "db-0=db:1", "db-1=db:2").Status; s.CurrentRevision == s.UpdateRevision || s.CurrentReplicas != 1 || s.UpdatedReplicas != 1 {
		t.Errorf("in part the status is %+v", s)
	}
	c.updateSet(ns, func(set *appsv1.StatefulSet) { *set.Spec.UpdateStrategy.RollingUpdate.Partition = 0 })
	c.rollBack("StatefulSet", c.waitSet(ns, "db-0=db:2", "db-1=db:2"))
	set := c.waitSet(ns, "db-0=db:1", "db-1=db:1")
	c.checkRevisions(ns, "db:2=2", "db:1=3")
	if !strings.HasPrefix(set.Status.UpdateRevision, "db-") {
		t.Errorf("status %+v", set.Status)
	}

	// Orphaned, its pods go on, and who comes after it adopts them without a restart.
	before, err := c.client.CoreV1().Pods(ns).Get(ctx, "db-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	orphan := metav1.DeletePropagationOrphan
	if err := sets.Delete(ctx, "db", metav1.DeleteOptions{PropagationPolicy: &orphan}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the successor", func(ctx context.Context) error {
		_, err := sets.Create(ctx, database(ns, 2), metav1.CreateOptions{})
		return err
	})
	c.waitSet(ns, "db-0=db:1", "db-1=db:1")
	after, err := c.client.CoreV1().Pods(ns).Get(ctx, "db-0", metav1.GetOptions{})
	if err != nil || after.UID != before.UID {
		t.Errorf("the adopted pod was replaced: %v", err)
	}
	c.checkEvents(ns,
		"statefulset-controller SuccessfulCreate Create Claim data-db-0 Pod db-0 in StatefulSet db success",
		"statefulset-controller SuccessfulCreate Create Pod db-0 in StatefulSet db successful",
		"statefulset-controller SuccessfulDelete Delete Pod db-2 in StatefulSet db successful")
}
