// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"log/slog"
	"testing"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/component-helpers/storage/volume"
)

func mountsClaim(name string) podOption {
	return func(p *v1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: name, VolumeSource: v1.VolumeSource{
			PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
	}
}

func testClaim(options ...func(*v1.PersistentVolumeClaim)) *v1.PersistentVolumeClaim {
	object := &v1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "data"}}
	for _, option := range options {
		option(object)
	}
	return object
}

func boundTo(name string) func(*v1.PersistentVolumeClaim) {
	return func(c *v1.PersistentVolumeClaim) {
		c.Spec.VolumeName = name
		metav1.SetMetaDataAnnotation(&c.ObjectMeta, volume.AnnBindCompleted, "yes")
	}
}

func ofClass(name string) func(*v1.PersistentVolumeClaim) {
	return func(c *v1.PersistentVolumeClaim) { c.Spec.StorageClassName = &name }
}

// volumeOn can be mounted on one node only.
func volumeOn(node string) *v1.PersistentVolume {
	object := &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}}
	object.Spec.ClaimRef = &v1.ObjectReference{Namespace: "default", Name: "data"}
	object.Spec.NodeAffinity = &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{
		MatchExpressions: []v1.NodeSelectorRequirement{{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpIn, Values: []string{node}}},
	}}}}
	return object
}

func TestVolumes(t *testing.T) {
	alone := func(c *v1.PersistentVolumeClaim) {
		c.Spec.AccessModes = []v1.PersistentVolumeAccessMode{v1.ReadWriteOncePod}
	}
	scratch := func(p *v1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "scratch", VolumeSource: v1.VolumeSource{Ephemeral: &v1.EphemeralVolumeSource{}}})
	}
	for _, c := range []struct {
		name   string
		pod    *v1.Pod
		claim  *v1.PersistentVolumeClaim
		volume *v1.PersistentVolume
		user   string // the node of another pod with the claim
		want   string // the node it goes to, or why it cannot
	}{
		{"no such claim", testPod("p", mountsClaim("data")), nil, nil, "", `0/2 nodes are available: persistentvolumeclaim "data" not found.` + useless2},
		{"going", testPod("p", mountsClaim("data")), testClaim(boundTo("pv"), func(c *v1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{Time: someTime} }),
			volumeOn("b"), "", `0/2 nodes are available: persistentvolumeclaim "data" is being deleted.` + useless2},
		{"lost", testPod("p", mountsClaim("data")), testClaim(boundTo("pv"), func(c *v1.PersistentVolumeClaim) { c.Status.Phase = v1.ClaimLost }), nil, "",
			`0/2 nodes are available: persistentvolumeclaim "data" bound to non-existent persistentvolume "pv".` + useless2},
		{"not bound yet", testPod("p", mountsClaim("data")), testClaim(), nil, "",
			"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims." + useless2},
		{"not bound, by a class that binds at once", testPod("p", mountsClaim("data")), testClaim(ofClass("fast")), nil, "",
			"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims." + useless2},
		{"bound when it has a node", testPod("p", mountsClaim("data"), selects(v1.LabelHostname, "b")), testClaim(ofClass("local")), nil, "", "b"},
		{"its volume is elsewhere", testPod("p", mountsClaim("data"), selects(v1.LabelHostname, "a")), testClaim(boundTo("pv")), volumeOn("b"), "",
			"0/2 nodes are available: 1 node(s) didn't match PersistentVolume's node affinity, 1 node(s) didn't match Pod's node affinity/selector." + useless2},
		{"where its volume is", testPod("p", mountsClaim("data")), testClaim(boundTo("pv")), volumeOn("b"), "", "b"},
		{"its volume is gone", testPod("p", mountsClaim("data")), testClaim(boundTo("pv")), nil, "",
			"0/2 nodes are available: 2 node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)." + useless2},
		{"shared", testPod("p", mountsClaim("data")), testClaim(boundTo("pv")), volumeOn("b"), "b", "b"},
		{"for one pod only", testPod("p", mountsClaim("data")), testClaim(boundTo("pv"), alone), volumeOn("b"), "b",
			"0/2 nodes are available: 2 node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod." +
				" no new claims to deallocate, preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod."},
		{"ephemeral", testPod("p", scratch), nil, nil, "",
			`0/2 nodes are available: waiting for ephemeral volume controller to create the persistentvolumeclaim "p-scratch".` + useless2},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testSnapshot([]*v1.Node{testNode("a"), testNode("b")})
			for class, mode := range map[string]storagev1.VolumeBindingMode{"fast": storagev1.VolumeBindingImmediate, "local": storagev1.VolumeBindingWaitForFirstConsumer} {
				s.storage.classes[class] = &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: class}, Provisioner: "example.com/p", VolumeBindingMode: &mode}
			}
			if c.claim != nil {
				s.storage.claims[keyOf(c.claim)] = c.claim
			}
			if c.volume != nil {
				s.storage.setVolume(c.volume)
			}
			if c.user != "" {
				s.setPod(newPod(testPod("user", mountsClaim("data"))), c.user)
			}
			x := newSearcher(1)
			p := newPendingPod(c.pod)
			got := ""
			if n, d := x.decide(p, s); n != nil {
				got = n.name
			} else {
				x.preempt(p, s, d, nil, nil, someTime)
				got = d.message()
			}
			if got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

// A pod that waits for its volumes wakes for them, step by step, and for no others.
func TestVolumesWake(t *testing.T) {
	client := fake.NewClientset()
	s, err := newScheduler(Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler)},
		noEvents)
	if err != nil {
		t.Fatal(err)
	}
	s.onNode(nil, testNode("a"))
	s.onNode(nil, testNode("b"))
	s.onPod(nil, testPod("p", mountsClaim("data")))
	try := func() string {
		item, _ := s.queue.pop(s.now())
		if item == nil {
			return "asleep"
		}
		n, d := s.search.decide(item.pod, s.snapshot)
		if n != nil {
			return n.name
		}
		s.queue.sleep(item, d.blockers, s.now())
		return "tried"
	}
	other := testClaim()
	other.Name = "other"
	for _, step := range []struct {
		name  string
		event func()
		want  string
	}{
		{"nothing", func() {}, "tried"},
		{"another claim", func() { s.onClaim(nil, other) }, "asleep"},
		{"the claim", func() { s.onClaim(nil, testClaim()) }, "tried"},
		{"bound to what is not known yet", func() { s.onClaim(testClaim(), testClaim(boundTo("pv"))) }, "tried"},
		{"in use", func() {
			s.onPod(nil, testPod("user", onNode("a"), mountsClaim("data")))
			alone := testClaim(boundTo("pv"))
			alone.Spec.AccessModes = []v1.PersistentVolumeAccessMode{v1.ReadWriteOncePod}
			s.onVolume(nil, volumeOn("b"))
			s.onClaim(nil, alone)
		}, "tried"},
		{"another pod goes", func() {
			s.onPod(nil, testPod("q", onNode("a")))
			s.onPodGone(testPod("q"))
		}, "asleep"},
		{"no longer in use", func() { s.onPodGone(testPod("user")) }, "b"},
	} {
		step.event()
		if got := try(); got != step.want {
			t.Fatalf("%s: got %s, want %s", step.name, got, step.want)
		}
	}
}
