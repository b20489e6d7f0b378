// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
)

func TestWorkerFromCreationToTheEnd(t *testing.T) {
	defer goleak.VerifyNone(t)
	b := newBench(t, newHost(), fake.NewClientset())
	defer b.stop()
	b.create(pod(named("p"), initC("i"), main("c")))
	b.until("the init container runs", func() bool { return b.host.list("uid-p") != nil })
	b.until("it is started", func() bool { c := b.host.list("uid-p"); return c[0].State == runtime.Running })
	b.host.end("uid-p-i-0", 0)
	b.until("the pod is ready", func() bool { return ready(b.get("p")) })
	if p := b.get("p"); p.Status.PodIP != "10.42.0.9" || p.Status.HostIP != "192.0.2.1" || p.Status.Phase != corev1.PodRunning {
		t.Errorf("status %+v", p.Status)
	}
	b.mark("p", deleting(30))
	b.until("the pod is gone", func() bool { return b.get("p") == nil })
	b.until("nothing is left", b.empty)
	b.until("its worker has ended", func() bool { return len(b.set.Pods()) == 0 })
}

// A sandbox that the data plane refuses is made anew, and what was to run in it has not failed.
func TestWorkerSandboxIsNotAttached(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	h.unplugged = 2
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	b.create(pod(named("p"), main("c"), policy(corev1.RestartPolicyNever)))
	b.until("the pod is ready", func() bool { return ready(b.get("p")) })
	if c := b.get("p").Status.ContainerStatuses[0]; c.RestartCount != 0 || c.LastTerminationState.Terminated != nil {
		t.Errorf("container %+v", c)
	}
	h.mu.Lock()
	if h.calls["sandbox"] != 3 || h.calls["attach"] != 3 {
		t.Errorf("%d sandboxes, %d attachments, want 3", h.calls["sandbox"], h.calls["attach"])
	}
	h.mu.Unlock()
	told := 0
	for len(b.events.Events) > 0 {
		if strings.Contains(<-b.events.Events, "FailedCreatePodSandBox") {
			told++
		}
	}
	if told != 2 {
		t.Errorf("%d events FailedCreatePodSandBox, want 2", told)
	}
	b.mark("p", deleting(0))
	b.until("nothing is left", b.empty)
	b.until("its worker has ended", func() bool { return len(b.set.Pods()) == 0 })
}

// A container whose liveness probe has failed starts again although it ended with 0 when it was told to.
func TestWorkerUnhealthyIsNotOver(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	h.obedient = true
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	b.create(pod(named("p"), main("c", liveness), policy(corev1.RestartPolicyOnFailure)))
	b.until("the pod is ready", func() bool { return ready(b.get("p")) })
	b.set.ProbeResult(probes.Result{PodUID: "uid-p", ContainerID: "uid-p-c-0", Kind: probes.Liveness})
	b.until("the container runs again", func() bool {
		p := b.get("p")
		return ready(p) && p.Status.ContainerStatuses[0].RestartCount == 1
	})
	if end := b.get("p").Status.ContainerStatuses[0].LastTerminationState.Terminated; end == nil || end.ExitCode != 0 {
		t.Errorf("it ended with %+v", end)
	}
	b.host.end("uid-p-c-1", 0)
	b.until("an end of its own is the end", func() bool { return b.get("p").Status.Phase == corev1.PodSucceeded })
}

// An image that is removed between its pull and the container's creation is fetched anew, and nothing has failed.
func TestWorkerImageIsRemoved(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	h.imageless = 2
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	b.create(pod(named("p"), main("c"), policy(corev1.RestartPolicyNever)))
	b.until("the pod is ready", func() bool { return ready(b.get("p")) })
	if n := b.get("p").Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("%d restarts", n)
	}
	told := map[string]int{}
	for len(b.events.Events) > 0 {
		told[strings.Fields(<-b.events.Events)[1]]++
	}
	if told["Pulled"] != 3 || told["Failed"] != 0 {
		t.Errorf("events %v", told)
	}
}

// What a pod had is free for another as soon as the API no longer counts it: when it is gone, or over.
func TestWorkerPlaceIsFreeAtOnce(t *testing.T) {
	defer goleak.VerifyNone(t)
	b := newBench(t, newHost(), fake.NewClientset())
	defer b.stop()
	b.set.cfg.Allocatable = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("1")}
	for i := range 20 {
		name, deleted := fmt.Sprintf("p%d", i), i%2 == 0
		b.create(pod(named(name), main("c"), policy(corev1.RestartPolicyNever)))
		if deleted {
			b.until("it is ready", func() bool { return ready(b.get(name)) })
			b.mark(name, deleting(0))
			b.until("it is gone", func() bool { return b.get(name) == nil })
			continue
		}
		b.until("it runs", func() bool {
			c := b.host.list(types.UID("uid-" + name))
			return len(c) == 1 && c[0].State == runtime.Running
		})
		b.host.end("uid-"+name+"-c-0", 0)
		b.until("it is over", func() bool { return b.get(name).Status.Phase == corev1.PodSucceeded })
	}
	for i := range 20 {
		name := fmt.Sprintf("forced-%d", i)
		b.create(pod(named(name), main("c")))
		b.until("it is ready", func() bool { return ready(b.get(name)) })
		if err := b.client.CoreV1().Pods("ns").Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	b.create(pod(named("first"), main("c")))
	b.until("it is ready", func() bool { return ready(b.get("first")) })
	b.create(pod(named("second"), main("c")))
	b.until("a pod too many is refused", func() bool {
		p := b.get("second")
		return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "OutOfpods"
	})
}

// Whatever fails now and then, pods come up in the end, and go.
func TestWorkerFaults(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	h.faults = 8
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	const n = 10
	for i := range n {
		b.create(pod(named(fmt.Sprintf("p%d", i)), main("a"), main("b")))
	}
	for i := range n {
		// A start that failed counts as a crash, so some wait in back-off: their time is made to pass.
		name := fmt.Sprintf("p%d", i)
		b.until(name+" runs or is backed off", func() bool {
			p := b.get(name)
			if ready(p) {
				return true
			}
			for _, s := range p.Status.ContainerStatuses {
				if s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff" {
					return true
				}
			}
			return false
		})
		b.mark(name, deleting(0))
	}
	for i := range n {
		b.until("the pods are gone", func() bool { return b.get(fmt.Sprintf("p%d", i)) == nil })
	}
	b.until("nothing is left", b.empty)
}

// A second delete with less grace ends a stop that is still waiting.
func TestWorkerLessGrace(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	h.release["uid-p-c-0"] = make(chan struct{})
	b.create(pod(named("p")))
	b.until("the pod is ready", func() bool { return ready(b.get("p")) })
	b.mark("p", deleting(600))
	b.until("the container is told to stop", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.grace["uid-p-c-0"] > 0 })
	b.mark("p", deleting(0))
	b.until("the pod is gone", func() bool { return b.get("p") == nil })
	killed := 0
	for len(b.events.Events) > 0 {
		if strings.Contains(<-b.events.Events, "Killing") {
			killed++
		}
	}
	if killed != 1 {
		t.Errorf("%d Killing events, want one", killed)
	}
}

// A second agent takes over what runs, and clears what belongs to nobody.
func TestWorkerAdoption(t *testing.T) {
	defer goleak.VerifyNone(t)
	h, client := newHost(), fake.NewClientset()
	b := newBench(t, h, client)
	b.create(pod(named("kept"), main("c", readiness)))
	b.create(pod(named("lost")))
	b.until("both run", func() bool {
		return b.get("kept").Status.Phase == corev1.PodRunning && ready(b.get("lost"))
	})
	b.set.ProbeResult(probes.Result{PodUID: "uid-kept", ContainerID: "uid-kept-c-0", Kind: probes.Readiness, OK: true})
	b.until("kept is ready", func() bool { return ready(b.get("kept")) })
	b.stop()
	if err := client.CoreV1().Pods("ns").Delete(context.Background(), "lost", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	b2 := newBench(t, h, client)
	defer b2.stop()
	h.mu.Lock()
	clear(h.calls)
	h.mu.Unlock()
	b2.set.Update(b2.get("kept"))
	if err := b2.set.Prune(context.Background()); err != nil {
		t.Fatal(err)
	}
	b2.until("its volumes are refreshed", func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.calls["mount"] == 1 })
	b2.until("it is probed", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.targets["uid-kept"]) == 1 && h.targets["uid-kept"][0].Ready
	})
	if !ready(b2.get("kept")) {
		t.Error("the adopted pod lost its readiness")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.containers) != 1 || len(h.boxes) != 1 || h.calls["create"] != 0 || h.calls["sandbox"] != 0 {
		t.Errorf("containers %v sandboxes %v calls %v", h.containers, h.boxes, h.calls)
	}
}

func TestPullOncePerImage(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	store := imageStore{pulls: make(chan string)}
	p := newPulls(ctx, store)
	close(p.imported)
	anonymous := func() ([]runtime.Auth, error) { return nil, nil }
	errs := make(chan error, 5)
	var began sync.WaitGroup
	for range 5 {
		began.Add(1)
		go func() {
			_, _, err := p.ensure(ctx, "missing", corev1.PullIfNotPresent, anonymous, began.Done)
			errs <- err
		}()
	}
	began.Wait()
	// All five have asked; they join one pull, or at most start another after it ended.
	if ref := <-store.pulls; ref != "docker.io/library/missing:latest" {
		t.Errorf("pulled %s", ref)
	}
	for n := 0; n < 5; {
		select {
		case <-store.pulls:
		case err := <-errs:
			n++
			if f := imageFailure(err, time.Time{}); f.Reason != "ErrImagePull" {
				t.Errorf("failure %+v of %v", f, err)
			}
		}
	}
	if _, _, err := p.ensure(ctx, "missing", corev1.PullNever, anonymous, nil); imageFailure(err, time.Time{}).Reason != "ErrImageNeverPull" {
		t.Errorf("never: %v", err)
	}
	if _, _, err := p.ensure(ctx, "UPPER CASE", corev1.PullAlways, anonymous, nil); imageFailure(err, time.Time{}).Reason != "InvalidImageName" {
		t.Errorf("invalid: %v", err)
	}
}
