// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skep.io/skep/node/static"
)

func staticNamed(name, uid string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid), Annotations: map[string]string{static.HashAnnotation: uid}},
		Spec:       corev1.PodSpec{NodeName: "n", RestartPolicy: corev1.RestartPolicyAlways, Containers: []corev1.Container{{Name: "c", Image: "img"}}},
	}
}

func TestPlanMirror(t *testing.T) {
	one, two := staticNamed("p", "1"), staticNamed("p", "2")
	mirror := func(of string, change func(*corev1.Pod)) *corev1.Pod {
		m := staticNamed("p", "1")
		m.UID, m.Annotations[corev1.MirrorPodAnnotationKey] = "api", of
		if change != nil {
			change(m)
		}
		return m
	}
	deleted := func(m *corev1.Pod) { m.DeletionTimestamp = &metav1.Time{Time: now} }
	failed := func(m *corev1.Pod) { m.Status.Phase = corev1.PodFailed }
	for _, c := range []struct {
		name          string
		want, running *corev1.Pod
		leaving, over bool
		mirror        *corev1.Pod
		step          mirrorStep
	}{
		{"nothing at all", nil, nil, false, false, nil, leaveMirror},
		{"new", one, one, false, false, nil, createMirror},
		{"shown", one, one, false, false, mirror("1", nil), leaveMirror},
		{"a mirror of nothing", nil, nil, false, false, mirror("1", nil), deleteMirror},
		{"a mirror of another", two, two, false, false, mirror("1", nil), deleteMirror},
		{"deleted by somebody", one, one, false, false, mirror("1", deleted), deleteMirror},
		{"ending: its mirror stays", nil, one, true, false, mirror("1", nil), leaveMirror},
		{"ending: a new mirror would be for nothing", nil, one, true, false, nil, leaveMirror},
		{"ending, with a successor", two, one, true, false, mirror("1", nil), leaveMirror},
		{"ending, and its mirror is deleted", two, one, true, false, mirror("1", deleted), deleteMirror},
		{"the successor's turn", two, two, false, false, mirror("1", nil), deleteMirror},
		{"has failed", one, one, false, true, mirror("1", failed), leaveMirror},
		{"failed before the machine was restarted", one, one, false, false, mirror("1", failed), deleteMirror},
	} {
		if got := planMirror(c.want, c.running, c.leaving, c.over, c.mirror); got != c.step {
			t.Errorf("%s: %d, want %d", c.name, got, c.step)
		}
	}
}

// mirrors runs the Set's mirrors until the test ends. API objects get uids, and the Node exists.
func (b *bench) mirrors() {
	ctx, cancel := context.WithCancel(context.Background())
	b.set.cfg.Node = func() *corev1.Node { return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "node"}} }
	done := make(chan struct{})
	go func() { defer close(done); b.set.RunMirrors(ctx) }()
	b.t.Cleanup(func() { cancel(); <-done })
}

func numbered(c *fake.Clientset) *fake.Clientset {
	n := 0
	c.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		n++
		a.(clienttesting.CreateAction).GetObject().(*corev1.Pod).UID = types.UID("api-" + strings.Repeat("i", n))
		return false, nil, nil
	})
	return c
}

func TestStaticPodLife(t *testing.T) {
	h := newHost()
	b := newBench(t, h, numbered(fake.NewClientset()))
	// It runs before anything is known of the API.
	b.set.SetStatic([]*corev1.Pod{staticNamed("p", "one")})
	b.until("it runs", func() bool { return len(h.list("one")) == 1 && h.list("one")[0].State == "running" })
	b.mirrors()
	shown := func(hash string) func() bool {
		return func() bool {
			p, err := b.client.CoreV1().Pods("ns").Get(context.Background(), "p", metav1.GetOptions{})
			return err == nil && p.Annotations[corev1.MirrorPodAnnotationKey] == hash && p.Status.Phase == corev1.PodRunning
		}
	}
	b.until("the API shows it", shown("one"))
	m := b.get("p")
	if len(m.OwnerReferences) != 1 || m.OwnerReferences[0].UID != "node" || m.OwnerReferences[0].Controller == nil || m.UID == "one" {
		t.Errorf("mirror: %+v", m.ObjectMeta)
	}
	id := h.list("one")[0].ID

	// Deleting the mirror is no deletion: another shows the same containers.
	if err := b.client.CoreV1().Pods("ns").Delete(context.Background(), "p", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("the API shows it again", func() bool { return shown("one")() && b.get("p").UID != m.UID })
	if l := h.list("one"); len(l) != 1 || l[0].ID != id || h.calls["stop"] > 0 {
		t.Errorf("containers %+v, stops %d", l, h.calls["stop"])
	}

	// A change of the file: the old one goes whole before the new one comes, as they have one name.
	b.set.SetStatic([]*corev1.Pod{staticNamed("p", "two")})
	b.until("the API shows the new one", shown("two"))
	if len(h.list("one")) > 0 {
		t.Error("the old one is still there")
	}
	// Back and forth faster than it can end: the last word counts.
	b.set.SetStatic(nil)
	b.set.SetStatic([]*corev1.Pod{staticNamed("p", "two")})
	b.set.SetStatic(nil)
	b.set.SetStatic([]*corev1.Pod{staticNamed("p", "three")})
	b.until("the API shows the last one", shown("three"))

	b.set.SetStatic(nil)
	b.until("all is gone", func() bool {
		_, err := b.client.CoreV1().Pods("ns").Get(context.Background(), "p", metav1.GetOptions{})
		return apierrors.IsNotFound(err) && len(h.list("")) == 0 && !boxes{h}.has("three")
	})
	b.until("it is forgotten", func() bool {
		b.set.mu.Lock()
		defer b.set.mu.Unlock()
		return len(b.set.statics) == 0
	})
}

func (h boxes) has(uid types.UID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.boxes[uid] != nil
}

// What comes of writing status into a mirror that is gone, and comes late, changes nothing for the one in its place.
func TestLateWordOfMirror(t *testing.T) {
	before, after := staticNamed("p", "one"), staticNamed("p", "one")
	before.UID, after.UID = "api-1", "api-2"
	before.ResourceVersion, after.ResourceVersion = "1", "2"
	for _, c := range []struct {
		name    string
		written *corev1.Pod
		err     error
	}{
		{"it was written in time", before, nil},
		{"the mirror was gone", nil, apierrors.NewNotFound(corev1.Resource("pods"), "p")},
		{"another had its name", nil, apierrors.NewConflict(corev1.Resource("pods"), "p", errors.New("uid"))},
	} {
		w := &worker{set: &Set{ctx: t.Context()}, static: "one", pod: staticNamed("p", "one"), mirror: after, retries: retries{}}
		w.wrote(before, c.written, corev1.PodStatus{Phase: corev1.PodRunning}, c.err)
		if w.mirror != after || w.reported != nil || !w.retries.due(statusKey, time.Now()) {
			t.Errorf("%s: mirror %s, reported %v, retries %v", c.name, w.mirror.UID, w.reported, w.retries)
		}
	}
}

// A mirror without a static pod is from an agent that had one, or somebody's invention.
func TestMirrorOfNothing(t *testing.T) {
	m := staticNamed("p", "1")
	m.UID, m.Annotations[corev1.MirrorPodAnnotationKey] = "api", "1"
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	b.mirrors()
	if _, err := b.client.CoreV1().Pods("ns").Create(context.Background(), m, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("it is gone", func() bool {
		_, err := b.client.CoreV1().Pods("ns").Get(context.Background(), "p", metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	if len(h.list("")) > 0 {
		t.Error("something of it ran")
	}
}

// An API server that refuses, and an agent that is replaced, end nothing.
func TestStaticPodOutlivesFailures(t *testing.T) {
	h := newHost()
	client := numbered(fake.NewClientset())
	refused := 0
	client.PrependReactor("create", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		if refused++; refused <= 2 {
			return true, nil, errors.New("not now")
		}
		return false, nil, nil
	})
	b := newBench(t, h, client)
	b.mirrors()
	b.set.SetStatic([]*corev1.Pod{staticNamed("p", "one")})
	b.until("the API shows it", func() bool {
		p, err := client.CoreV1().Pods("ns").Get(context.Background(), "p", metav1.GetOptions{})
		return err == nil && p.Status.Phase == corev1.PodRunning
	})
	id, m := h.list("one")[0].ID, b.get("p")
	b.stop()

	next := newBench(t, h, client)
	next.mirrors()
	next.set.SetStatic([]*corev1.Pod{staticNamed("p", "one")})
	next.set.Update(m)
	if err := next.set.Prune(context.Background()); err != nil {
		t.Fatal(err)
	}
	h.end(id, 1)
	next.until("the next agent restarts its container", func() bool {
		p := next.get("p")
		return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].RestartCount == 1 && p.Status.Phase == corev1.PodRunning
	})
	if p := next.get("p"); p.UID != m.UID {
		t.Error("the mirror was made anew")
	}
}
