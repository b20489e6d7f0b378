// SPDX-License-Identifier: Apache-2.0

package localpath

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/volume"

	"skep.io/skep/api"
)

func testClaim(changes ...func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	class := api.LocalPathClassName
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data", UID: "1-2", Annotations: map[string]string{
			volume.AnnStorageProvisioner: api.LocalPathProvisioner, volume.AnnSelectedNode: "n1",
		}},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}
	for _, change := range changes {
		change(claim)
	}
	return claim
}

func protected(c *corev1.PersistentVolumeClaim) { c.Finalizers = []string{"other", Finalizer} }
func going(c *corev1.PersistentVolumeClaim)     { c.DeletionTimestamp = &metav1.Time{} }
func nowhere(c *corev1.PersistentVolumeClaim)   { delete(c.Annotations, volume.AnnSelectedNode) }
func bound(c *corev1.PersistentVolumeClaim) {
	c.Spec.VolumeName, c.Status.Phase = VolumeName(c), corev1.ClaimBound
	c.Status.Capacity = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
}
func asks(size string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse(size)
	}
}
func mode(m corev1.PersistentVolumeAccessMode) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{m}
	}
}

var (
	testClass = &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: api.LocalPathClassName}, Provisioner: api.LocalPathProvisioner}
	testNode  = &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: "n1", Labels: map[string]string{corev1.LabelHostname: "host1"}, Annotations: map[string]string{api.LocalPathAnnotation: "/data/storage"},
	}}
)

func TestPlanClaim(t *testing.T) {
	block := corev1.PersistentVolumeBlock
	made := newVolume(testClaim(), testClass, testNode, "/data/storage/x")
	bare := testNode.DeepCopy()
	bare.Annotations = nil
	for _, tt := range []struct {
		name    string
		claim   *corev1.PersistentVolumeClaim
		made    *corev1.PersistentVolume
		class   *storagev1.StorageClass
		node    *corev1.Node
		want    Step
		message string
	}{
		{"new", testClaim(), nil, testClass, testNode, Protect, ""},
		{"protected", testClaim(protected), nil, testClass, testNode, Provision, ""},
		{"for one pod", testClaim(protected, mode(corev1.ReadWriteOncePod)), nil, testClass, testNode, Provision, ""},
		{"made", testClaim(protected), made, testClass, testNode, Release, ""},
		{"made, then deleted", testClaim(protected, going), made, testClass, testNode, Release, ""},
		{"made and released", testClaim(), made, testClass, testNode, Nothing, ""},
		{"bound to another volume after all", testClaim(protected, bound), nil, testClass, testNode, Release, ""},
		{"deleted half way", testClaim(protected, going), nil, testClass, testNode, Abandon, ""},
		{"deleted half way, its class, too", testClaim(protected, going), nil, nil, nil, Abandon, ""},
		{"deleted before", testClaim(going), nil, testClass, testNode, Nothing, ""},
		{"of another provisioner", testClaim(func(c *corev1.PersistentVolumeClaim) {
			c.Annotations[volume.AnnStorageProvisioner] = "example.com/p"
		}), nil, testClass, testNode, Nothing, ""},
		{"not asked yet", testClaim(func(c *corev1.PersistentVolumeClaim) { c.Annotations = nil }), nil, testClass, testNode, Nothing, ""},
		{"class gone", testClaim(), nil, nil, testNode, Nothing, ""},
		{"node gone", testClaim(), nil, testClass, nil, Reschedule, "does not exist"},
		{"a node without directory", testClaim(), nil, testClass, bare, Reschedule, "says no directory"},
		{"shared", testClaim(mode(corev1.ReadWriteMany)), nil, testClass, testNode, Refuse, "ReadWriteMany is not supported"},
		{"a device", testClaim(func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeMode = &block }), nil, testClass, testNode, Refuse, "Block"},
		{"with a selector", testClaim(func(c *corev1.PersistentVolumeClaim) { c.Spec.Selector = &metav1.LabelSelector{} }), nil, testClass, testNode, Refuse, "selector"},
		{"a copy", testClaim(func(c *corev1.PersistentVolumeClaim) { c.Spec.DataSource = &corev1.TypedLocalObjectReference{} }), nil, testClass, testNode, Refuse, "data source"},
		{"of a class that binds at once", testClaim(nowhere), nil, testClass, nil, Refuse, "WaitForFirstConsumer"},
		{"bound", testClaim(bound), made, testClass, testNode, Nothing, ""},
		{"grows", testClaim(bound, asks("2Gi")), made, testClass, testNode, Grow, ""},
		{"has grown", testClaim(bound, asks("2Gi")), newVolume(testClaim(asks("2Gi")), testClass, testNode, "/x"), testClass, testNode, Grown, ""},
	} {
		a := PlanClaim(tt.claim, tt.made, tt.class, tt.node)
		if a.Step != tt.want || !strings.Contains(a.Message, tt.message) || tt.message == "" && a.Message != "" {
			t.Errorf("%s: step %d %q, want %d", tt.name, a.Step, a.Message, tt.want)
		}
	}
	v := PlanClaim(testClaim(protected), nil, testClass, testNode).Volume
	if v.Name != "pvc-1-2" || v.Spec.Local.Path != "/data/storage/pvc-1-2_shop_data" || v.Spec.ClaimRef.UID != "1-2" ||
		v.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete || volume.CheckNodeAffinity(v, testNode.Labels) != nil ||
		volume.CheckNodeAffinity(v, map[string]string{corev1.LabelHostname: "host2"}) == nil {
		t.Errorf("volume %+v", v)
	}
	long := testClaim(func(c *corev1.PersistentVolumeClaim) {
		c.Name, c.Namespace = strings.Repeat("n", 253), strings.Repeat("s", 63)
	})
	if name := DirName(long); len(name) > 255 || !strings.HasPrefix(name, "pvc-1-2_sss") {
		t.Errorf("directory %q", name)
	}
}

func TestPlanVolume(t *testing.T) {
	const retain, drop = corev1.PersistentVolumeReclaimRetain, corev1.PersistentVolumeReclaimDelete
	for _, tt := range []struct {
		name    string
		policy  corev1.PersistentVolumeReclaimPolicy
		phase   corev1.PersistentVolumePhase
		deleted bool
		node    bool
		want    Step
	}{
		{"in use", drop, corev1.VolumeBound, false, true, Nothing},
		{"in use, deleted by somebody", drop, corev1.VolumeBound, true, true, Nothing},
		{"not bound yet", drop, corev1.VolumePending, false, true, Nothing},
		{"released", drop, corev1.VolumeReleased, false, true, Delete},
		{"released, to be kept", retain, corev1.VolumeReleased, false, true, Nothing},
		{"deleted", drop, corev1.VolumeReleased, true, true, Remove},
		{"deleted before it was bound", drop, corev1.VolumeAvailable, true, true, Remove},
		{"deleted, files to be kept", retain, corev1.VolumeReleased, true, true, Keep},
		{"deleted, node gone", drop, corev1.VolumeReleased, true, false, Unknown},
		{"deleted, files to be kept, node gone", retain, corev1.VolumeReleased, true, false, Keep},
	} {
		v := newVolume(testClaim(), testClass, testNode, "/data/storage/pvc-1-2_shop_data")
		v.Spec.PersistentVolumeReclaimPolicy, v.Status.Phase = tt.policy, tt.phase
		if tt.deleted {
			v.DeletionTimestamp = &metav1.Time{}
		}
		if a := PlanVolume(v, tt.node); a.Step != tt.want || a.Dir != "pvc-1-2_shop_data" || a.Node != "n1" {
			t.Errorf("%s: %+v, want %d", tt.name, a, tt.want)
		}
		v.Annotations[volume.AnnDynamicallyProvisioned] = "example.com/p"
		if a := PlanVolume(v, tt.node); a.Step != Nothing {
			t.Errorf("%s, of another provisioner: %+v", tt.name, a)
		}
		v.Annotations[volume.AnnDynamicallyProvisioned], v.Finalizers = api.LocalPathProvisioner, nil
		if a := PlanVolume(v, tt.node); a.Step != Nothing {
			t.Errorf("%s, released: %+v", tt.name, a)
		}
	}
}
