// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	storageutil "k8s.io/kubernetes/pkg/apis/storage/util"
)

func claimOf(ns, name string, class *string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: class,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")}},
		},
	}
}

func volumeFor(name, class string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: class,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/srv/" + name}},
		},
	}
}

func (c *cluster) create(objects ...metav1.Object) {
	c.Helper()
	for _, object := range objects {
		var err error
		switch o := object.(type) {
		case *corev1.PersistentVolumeClaim:
			_, err = c.client.CoreV1().PersistentVolumeClaims(o.Namespace).Create(c.Context(), o, metav1.CreateOptions{})
		case *corev1.PersistentVolume:
			_, err = c.client.CoreV1().PersistentVolumes().Create(c.Context(), o, metav1.CreateOptions{})
		case *storagev1.StorageClass:
			_, err = c.client.StorageV1().StorageClasses().Create(c.Context(), o, metav1.CreateOptions{})
		case *corev1.Pod:
			_, err = c.client.CoreV1().Pods(o.Namespace).Create(c.Context(), o, metav1.CreateOptions{})
		default:
			err = fmt.Errorf("cannot create %T", o)
		}
		if err != nil {
			c.Fatal(err)
		}
	}
}

func (c *cluster) waitClaim(ns, name string, phase corev1.PersistentVolumeClaimPhase, volume string) {
	c.Helper()
	c.eventually(fmt.Sprintf("claim %s to be %s", name, phase), func(ctx context.Context) error {
		claim, err := c.client.CoreV1().PersistentVolumeClaims(ns).Get(ctx, name, metav1.GetOptions{})
		if err == nil && (claim.Status.Phase != phase || claim.Spec.VolumeName != volume) {
			return fmt.Errorf("%s to %q", claim.Status.Phase, claim.Spec.VolumeName)
		}
		return err
	})
}

func (c *cluster) waitVolume(name string, phase corev1.PersistentVolumePhase) {
	c.Helper()
	c.eventually(fmt.Sprintf("volume %s to be %s", name, phase), func(ctx context.Context) error {
		volume, err := c.client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
		if err == nil && volume.Status.Phase != phase {
			return fmt.Errorf("%s", volume.Status.Phase)
		}
		return err
	})
}

// TestVolumes binds claims that were there before what they need, and protects what is in use.
func TestVolumes(t *testing.T) {
	const ns = metav1.NamespaceDefault
	c := newCluster(t)
	ctx := t.Context()
	c.addNodes("n1")
	none, fast, missing, apart := "", "fast", "missing", "apart"
	claims, volumes := c.client.CoreV1().PersistentVolumeClaims(ns), c.client.CoreV1().PersistentVolumes()

	// Whoever deletes the class that a new cluster has means it.
	c.eventually("the default class", func(ctx context.Context) error {
		if _, err := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, "skep-bootstrap", metav1.GetOptions{}); err != nil {
			return err
		}
		return c.client.StorageV1().StorageClasses().Delete(ctx, "local-path", metav1.DeleteOptions{})
	})

	// Each waits; what comes later finds it, by class, by name, and by being the default.
	named := claimOf(ns, "named", &missing)
	named.Spec.VolumeName = "v-named"
	c.create(claimOf(ns, "any", &none), named)
	c.waitClaim(ns, "any", corev1.ClaimPending, "")
	c.waitClaim(ns, "named", corev1.ClaimPending, "v-named")
	c.create(volumeFor("v-other", "fast"), volumeFor("v-named", missing))
	c.waitClaim(ns, "named", corev1.ClaimBound, "v-named")
	c.waitVolume("v-other", corev1.VolumeAvailable)
	c.create(volumeFor("v-any", ""))
	c.waitClaim(ns, "any", corev1.ClaimBound, "v-any")
	c.create(claimOf(ns, "late", nil))
	c.waitClaim(ns, "late", corev1.ClaimPending, "")
	mode := storagev1.VolumeBindingImmediate
	c.create(&storagev1.StorageClass{
		ObjectMeta:  metav1.ObjectMeta{Name: fast, Annotations: map[string]string{storageutil.IsDefaultStorageClassAnnotation: "true"}},
		Provisioner: "kubernetes.io/no-provisioner", VolumeBindingMode: &mode,
	})
	c.waitClaim(ns, "late", corev1.ClaimBound, "v-other")

	// A claim in use stays until its pod is gone, and only then its volume is released and can go.
	c.create(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "user"},
		Spec: corev1.PodSpec{
			NodeName:   "n1",
			Containers: []corev1.Container{{Name: "c", Image: "app:1"}},
			Volumes: []corev1.Volume{
				{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "any"}}},
				{Name: "scratch", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{
					VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{Spec: claimOf(ns, "", &apart).Spec},
				}}},
			},
		},
	})
	c.waitClaim(ns, "user-scratch", corev1.ClaimPending, "")
	for _, err := range []error{claims.Delete(ctx, "any", metav1.DeleteOptions{}), volumes.Delete(ctx, "v-any", metav1.DeleteOptions{})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// What came later has gone through the same queues.
	c.create(claimOf(ns, "another", &none), volumeFor("v-another", ""))
	c.waitClaim(ns, "another", corev1.ClaimBound, "v-another")
	c.waitClaim(ns, "any", corev1.ClaimBound, "v-any")
	c.waitVolume("v-any", corev1.VolumeBound)
	if err := c.client.CoreV1().Pods(ns).Delete(ctx, "user", *metav1.NewDeleteOptions(0)); err != nil {
		t.Fatal(err)
	}
	c.eventually("the claim and its volume to go", func(ctx context.Context) error {
		if _, err := claims.Get(ctx, "any", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("claim: %w", err)
		}
		if _, err := volumes.Get(ctx, "v-any", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("volume: %w", err)
		}
		return nil
	})
	if err := claims.Delete(ctx, "named", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.waitVolume("v-named", corev1.VolumeReleased)

	// A class of attributes, of which nothing is, goes at once.
	classes, gold := c.client.StorageV1().VolumeAttributesClasses(), "gold"
	attributes := &storagev1.VolumeAttributesClass{ObjectMeta: metav1.ObjectMeta{Name: gold}, DriverName: "driver.test", Parameters: map[string]string{"a": "b"}}
	if _, err := classes.Create(ctx, attributes, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := classes.Delete(ctx, gold, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the class of attributes to go", func(ctx context.Context) error {
		if _, err := classes.Get(ctx, gold, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("class: %w", err)
		}
		return nil
	})
}

func TestAwaits(t *testing.T) {
	none, fast := "", "fast"
	named := claimOf("ns", "c", &none)
	named.Spec.VolumeName = "v"
	beta := claimOf("ns", "c", nil)
	beta.Annotations = map[string]string{corev1.BetaStorageClassAnnotation: fast}
	free := func(class string) *corev1.PersistentVolume {
		v := volumeFor("v", class)
		v.Status.Phase = corev1.VolumeAvailable
		return v
	}
	taken := free("")
	taken.Spec.ClaimRef = &corev1.ObjectReference{}
	for _, tt := range []struct {
		name   string
		claim  *corev1.PersistentVolumeClaim
		volume *corev1.PersistentVolume
		want   bool
	}{
		{"free, of its class", claimOf("ns", "c", &fast), free("fast"), true},
		{"of another class", claimOf("ns", "c", &fast), free(""), false},
		{"of the class in its annotation", beta, free("fast"), true},
		{"not yet called free", claimOf("ns", "c", &none), volumeFor("v", ""), false},
		{"taken", claimOf("ns", "c", &none), taken, false},
		{"named", named, taken, true},
		{"another is named", named, volumeFor("w", ""), false},
	} {
		if got := awaitsVolume(tt.claim, tt.volume); got != tt.want {
			t.Errorf("volume %s: %v", tt.name, got)
		}
	}
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: fast}}
	standard := class.DeepCopy()
	standard.Annotations = map[string]string{storageutil.IsDefaultStorageClassAnnotation: "true"}
	for _, tt := range []struct {
		name  string
		claim *corev1.PersistentVolumeClaim
		class *storagev1.StorageClass
		want  bool
	}{
		{"its own", claimOf("ns", "c", &fast), class, true},
		{"its own, by annotation", beta, class, true},
		{"another", claimOf("ns", "c", &none), standard, false},
		{"the default", claimOf("ns", "c", nil), standard, true},
		{"not the default", claimOf("ns", "c", nil), class, false},
	} {
		if got := awaitsClass(tt.claim, tt.class); got != tt.want {
			t.Errorf("class %s: %v", tt.name, got)
		}
	}
}
