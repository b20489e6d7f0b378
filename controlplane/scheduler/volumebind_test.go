// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/component-helpers/storage/volume"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/backend/cache"
	"k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/feature"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/volumebinding"
	frameworkruntime "k8s.io/kubernetes/pkg/scheduler/framework/runtime"
	schedulermetrics "k8s.io/kubernetes/pkg/scheduler/metrics"
	"pgregory.net/rapid"
)

func testClass(name, provisioner string, mode storagev1.VolumeBindingMode) *storagev1.StorageClass {
	return &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner, VolumeBindingMode: &mode}
}

func named(name string) func(*v1.PersistentVolumeClaim) {
	return func(c *v1.PersistentVolumeClaim) {
		c.Name, c.UID, c.ResourceVersion = name, types.UID("uid-"+name), "1"
	}
}

// freeVolume is a volume of class "local" that nobody has claimed, for one node, or for all if node is empty.
func freeVolume(name, node string) *v1.PersistentVolume {
	object := volumeOn(node)
	object.Name, object.ResourceVersion, object.Spec.ClaimRef, object.Spec.StorageClassName, object.Status.Phase = name, "1", nil, "local", v1.VolumeAvailable
	if node == "" {
		object.Spec.NodeAffinity = nil
	}
	return object
}

// drawStorage fills a storage at random; it returns the same objects for upstream.
func drawStorage(t *rapid.T, s *storage) (objects []runtime.Object) {
	for _, class := range []*storagev1.StorageClass{
		testClass("made", "example.com/p", storagev1.VolumeBindingWaitForFirstConsumer),
		testClass("local", volume.NotSupportedProvisioner, storagev1.VolumeBindingWaitForFirstConsumer),
		testClass("zonal", "example.com/p", storagev1.VolumeBindingWaitForFirstConsumer),
		testClass("fast", "example.com/p", storagev1.VolumeBindingImmediate),
	} {
		if class.Name == "zonal" {
			class.AllowedTopologies = []v1.TopologySelectorTerm{{MatchLabelExpressions: []v1.TopologySelectorLabelRequirement{{Key: v1.LabelHostname, Values: []string{"a"}}}}}
		}
		s.classes[class.Name] = class
		objects = append(objects, class)
	}
	nodes, sizes := []string{"", "a", "b", "c"}, []string{"1Gi", "2Gi", "3Gi"}
	classes := []string{"", "made", "local", "zonal", "fast", "none"}
	claims := []string{"c0", "c1", "c2"}
	for i := range rapid.IntRange(0, 5).Draw(t, "volumes") {
		object := freeVolume(fmt.Sprint("v", i), rapid.SampledFrom(nodes).Draw(t, "node"))
		object.Spec.StorageClassName = rapid.SampledFrom(classes[:4]).Draw(t, "class")
		object.Spec.AccessModes = []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce}
		object.Spec.Capacity = v1.ResourceList{v1.ResourceStorage: resource.MustParse(rapid.SampledFrom(sizes).Draw(t, "size"))}
		object.Labels = map[string]string{"disk": rapid.SampledFrom([]string{"x", "y"}).Draw(t, "disk")}
		object.Status.Phase = rapid.SampledFrom([]v1.PersistentVolumePhase{v1.VolumeAvailable, v1.VolumeAvailable, v1.VolumePending, v1.VolumeBound, v1.VolumeReleased}).Draw(t, "phase")
		object.Spec.VolumeMode = drawVolumeMode(t)
		if rapid.IntRange(0, 2).Draw(t, "claimed") == 0 {
			object.Spec.ClaimRef = &v1.ObjectReference{Namespace: "default", Name: fmt.Sprint("c", i)} // one volume a claim
		}
		s.setVolume(object)
		objects = append(objects, object)
	}
	for _, name := range claims {
		if rapid.IntRange(0, 9).Draw(t, "missing") == 0 {
			continue
		}
		object := testClaim(named(name), ofClass(rapid.SampledFrom(classes).Draw(t, "class")))
		object.Spec.AccessModes = []v1.PersistentVolumeAccessMode{rapid.SampledFrom([]v1.PersistentVolumeAccessMode{v1.ReadWriteOnce, v1.ReadWriteOnce, v1.ReadWriteMany}).Draw(t, "mode")}
		object.Spec.Resources.Requests = v1.ResourceList{v1.ResourceStorage: resource.MustParse(rapid.SampledFrom(sizes).Draw(t, "size"))}
		object.Spec.VolumeMode = drawVolumeMode(t)
		switch rapid.IntRange(0, 9).Draw(t, "state") {
		case 0, 1, 2:
			boundTo(rapid.SampledFrom([]string{"v0", "v1", "v2", "gone"}).Draw(t, "volume"))(object)
		case 3:
			object.Spec.VolumeName = "v0"
		case 4:
			metav1.SetMetaDataAnnotation(&object.ObjectMeta, volume.AnnSelectedNode, rapid.SampledFrom(nodes[1:]).Draw(t, "node"))
		case 5:
			object.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"disk": "x"}}
		case 6:
			object.Status.Phase = v1.ClaimLost
		case 7:
			object.DeletionTimestamp, object.Finalizers = &metav1.Time{Time: someTime}, []string{"x"}
		}
		s.setClaim(object)
		objects = append(objects, object)
	}
	return objects
}

// drawVolumeMode is nil, which means a file system, more often than a block device.
func drawVolumeMode(t *rapid.T) *v1.PersistentVolumeMode {
	return rapid.SampledFrom([]*v1.PersistentVolumeMode{nil, nil, pointer(v1.PersistentVolumeFilesystem), pointer(v1.PersistentVolumeBlock)}).Draw(t, "volume mode")
}

// TestVolumesLikeUpstream asks kube-scheduler's own VolumeBinding about random claims, volumes and nodes.
func TestVolumesLikeUpstream(t *testing.T) {
	schedulermetrics.InitMetrics()
	gates := feature.NewSchedulerFeaturesFromGates(utilfeature.DefaultFeatureGate)
	rapid.Check(t, func(t *rapid.T) {
		nodes := []*v1.Node{testNode("a"), testNode("b"), testNode("c")}
		s := testSnapshot(nodes)
		objects := drawStorage(t, s.storage)
		object := testPod("p")
		for i := range rapid.IntRange(1, 3).Draw(t, "claims") {
			mountsClaim(fmt.Sprint("c", i))(object)
		}

		factory := informers.NewSharedInformerFactory(fake.NewClientset(objects...), 0)
		lister := cache.NewSnapshot(nil, nodes)
		handle, err := frameworkruntime.NewFramework(t.Context(), nil, nil, frameworkruntime.WithSnapshotSharedLister(lister), frameworkruntime.WithInformerFactory(factory))
		must(t, err)
		plugin, err := frameworkruntime.FactoryAdapter(gates, volumebinding.New)(t.Context(), &config.VolumeBindingArgs{BindTimeoutSeconds: 1}, handle)
		must(t, err)
		stop := make(chan struct{})
		factory.Start(stop)
		defer factory.Shutdown()
		defer close(stop)
		factory.WaitForCacheSync(stop)
		infos, err := lister.NodeInfos().List()
		must(t, err)
		state := framework.NewCycleState()
		_, status := plugin.(fwk.PreFilterPlugin).PreFilter(t.Context(), state, object, infos)

		q := newSearcher(1).ask(newPendingPod(object), s)
		if fault := q.podVolumes().fault; fault != "" || !status.IsSuccess() {
			if want := strings.Join(status.Reasons(), ""); fault != want {
				t.Fatalf("got %q, upstream says %q", fault, want)
			}
			return
		}
		for _, info := range infos {
			u := upstream{filter: plugin.(fwk.FilterPlugin), state: state}
			wantVerdict, want := u.check(t.Context(), object, info)
			verdict, why := volumeBinding(q, s.byName[info.Node().Name], nil)
			if verdict != wantVerdict || !slices.Equal(why, want) {
				t.Fatalf("node %s: got %v %q, upstream says %v %q", info.Node().Name, verdict, why, wantVerdict, want)
			}
		}
	})
}

// TestNoVolumeTwice: whatever is decided before anything is written, no two pods get one volume, pods that share a
// claim meet, and what is taken back is free again.
func TestNoVolumeTwice(t *testing.T) {
	s := testSnapshot([]*v1.Node{testNode("a"), testNode("b")})
	s.storage.classes["local"] = testClass("local", volume.NotSupportedProvisioner, storagev1.VolumeBindingWaitForFirstConsumer)
	s.storage.classes["made"] = testClass("made", "example.com/p", storagev1.VolumeBindingWaitForFirstConsumer)
	s.storage.setVolume(freeVolume("v1", "a"))
	s.storage.setVolume(freeVolume("v2", "b"))
	for _, name := range []string{"c1", "c2", "c3"} {
		s.storage.setClaim(testClaim(named(name), ofClass("local")))
	}
	s.storage.setClaim(testClaim(named("shared"), ofClass("made")))
	x := newSearcher(1)
	decide := func(pod, claim string) (string, volumePlan) {
		t.Helper()
		p := newPendingPod(testPod(pod, mountsClaim(claim)))
		n, d := x.decide(p, s)
		if n == nil {
			return d.message(), volumePlan{}
		}
		plan, err := s.storage.assumeVolumes(p, n.object)
		if err != nil {
			t.Fatal(err)
		}
		return n.name, plan
	}
	first, plan := decide("p1", "c1")
	second, _ := decide("p2", "c2")
	if first == second || len(plan.bind) != 1 || plan.bind[0].volume.Spec.ClaimRef.Name != "c1" {
		t.Fatalf("on %s and %s, plan %+v", first, second, plan)
	}
	if got, _ := decide("p3", "c3"); !strings.Contains(got, "2 "+reasonVolumeNone) {
		t.Errorf("a third volume was found: %s", got)
	}
	s.storage.abandon(&plan)
	if got, _ := decide("p3", "c3"); got != first {
		t.Errorf("what was taken back is not free: %s, want %s", got, first)
	}
	home, mine := decide("s1", "shared")
	for i := range 8 {
		if got, plan := decide(fmt.Sprint("s", i+2), "shared"); got != home || plan.provision[0].write {
			t.Fatalf("a pod that shares the claim is on %s, its volume is made on %s (%+v)", got, home, plan)
		}
	}
	if !mine.provision[0].write || mine.provision[0].claim.Annotations[volume.AnnSelectedNode] != home {
		t.Errorf("plan %+v", mine)
	}
}

// provisions plays the provisioner and the binder: a claim that has a node gets a volume there, or loses the node.
// Unlike the plain fake, it gives versions to what is written.
func (c *cluster) provisions(refusals int32) {
	var left, version atomic.Int32
	left.Store(refusals)
	version.Store(1)
	tracker := c.client.Tracker()
	write := func(resource string, object metav1.Object) error {
		object.SetResourceVersion(fmt.Sprint(version.Add(1)))
		return tracker.Update(v1.SchemeGroupVersion.WithResource(resource), object.(runtime.Object), object.GetNamespace())
	}
	c.client.PrependReactor("update", "persistentvolumes", func(action clienttesting.Action) (bool, runtime.Object, error) {
		object := action.(clienttesting.UpdateAction).GetObject().(*v1.PersistentVolume).DeepCopy()
		return true, object, write("persistentvolumes", object)
	})
	c.client.PrependReactor("update", "persistentvolumeclaims", func(action clienttesting.Action) (bool, runtime.Object, error) {
		claim := action.(clienttesting.UpdateAction).GetObject().(*v1.PersistentVolumeClaim).DeepCopy()
		if err := write("persistentvolumeclaims", claim); err != nil {
			return true, nil, err
		}
		node := claim.Annotations[volume.AnnSelectedNode]
		if node == "" || claim.Spec.VolumeName != "" {
			return true, claim, nil
		}
		after := claim.DeepCopy()
		if left.Add(-1) >= 0 {
			delete(after.Annotations, volume.AnnSelectedNode)
		} else {
			object := freeVolume("made-"+claim.Name, node)
			object.Spec.ClaimRef = &v1.ObjectReference{Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}
			if err := tracker.Add(object); err != nil {
				return true, nil, err
			}
			boundTo(object.Name)(after)
		}
		return true, claim, write("persistentvolumeclaims", after)
	})
}

// A pod is bound once its volumes are; a provisioner that refuses sends it back.
func TestBindsVolumesFirst(t *testing.T) {
	c := startCluster(t, testNode("a"),
		testClass("made", "example.com/p", storagev1.VolumeBindingWaitForFirstConsumer),
		testClass("local", volume.NotSupportedProvisioner, storagev1.VolumeBindingWaitForFirstConsumer),
		testClaim(named("made"), ofClass("made")), testClaim(named("taken"), ofClass("local")), testClaim(named("later"), ofClass("local")))
	c.provisions(1)
	c.create(testPod("p", mountsClaim("made")))
	c.eventually("the refusal is told", func() bool {
		for _, condition := range c.pod("p").Status.Conditions {
			if condition.Reason == v1.PodReasonSchedulerError {
				return condition.Message == `running PreBind plugin "VolumeBinding": binding volumes: provisioning failed for PVC "made"`
			}
		}
		return false
	})
	c.isOn("p", "a")

	// A volume that comes later wakes who waits for it. The binder is not there, so the pod waits for that.
	c.create(testPod("q", mountsClaim("later")))
	c.waits("q", "0/1 nodes are available: 1 "+reasonVolumeNone)
	if _, err := c.client.CoreV1().PersistentVolumes().Create(c.ctx, freeVolume("v", "a"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the volume is given to the claim", func() bool {
		object, err := c.client.CoreV1().PersistentVolumes().Get(c.ctx, "v", metav1.GetOptions{})
		return err == nil && object.Spec.ClaimRef != nil && object.Spec.ClaimRef.Name == "later" && object.Annotations[volume.AnnBoundByController] == "yes"
	})
	if node := c.pod("q").Spec.NodeName; node != "" {
		t.Errorf("bound to %s before its volume", node)
	}
	// Meanwhile others are bound, and one whose pod goes leaves nothing behind.
	c.create(testPod("r"))
	c.isOn("r", "a")
	claim := testClaim(named("later"), ofClass("local"), boundTo("v"))
	if _, err := c.client.CoreV1().PersistentVolumeClaims("default").Update(c.ctx, claim, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("q", "a")
}

// TestVolumeWriteFails: what was kept for a pod is free when it cannot be written, and its pod tries again.
func TestVolumeWriteFails(t *testing.T) {
	c := startCluster(t)
	var failures atomic.Int32
	failures.Store(1)
	c.client.PrependReactor("update", "persistentvolumes", func(clienttesting.Action) (bool, runtime.Object, error) {
		if failures.Add(-1) >= 0 {
			return true, nil, errors.New("injected: refused")
		}
		return false, nil, nil
	})
	for _, object := range []runtime.Object{testNode("a"), testClass("local", volume.NotSupportedProvisioner, storagev1.VolumeBindingWaitForFirstConsumer),
		testClaim(named("data"), ofClass("local")), freeVolume("v", "a")} {
		if err := c.client.Tracker().Add(object); err != nil {
			t.Fatal(err)
		}
	}
	c.create(testPod("p", mountsClaim("data")))
	c.eventually("the volume is given to the claim at the second try", func() bool {
		object, err := c.client.CoreV1().PersistentVolumes().Get(c.ctx, "v", metav1.GetOptions{})
		return err == nil && object.Spec.ClaimRef != nil
	})
	// Its pod goes while it waits for the binder: the scheduler must not wait for it any more, or it would not end.
	if err := c.client.CoreV1().Pods("default").Delete(c.ctx, "p", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}
