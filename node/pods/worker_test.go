// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
)

// host is a node in memory. One call in `faults` fails, if that is not 0.
type host struct {
	mu         sync.Mutex
	faults     int
	containers map[string]*runtime.Container
	boxes      map[types.UID]*sandbox.Sandbox
	mounted    map[types.UID]bool
	exits      chan types.UID
	calls      map[string]int
	targets    map[types.UID][]probes.Target
	grace      map[string]time.Duration
	release    map[string]chan struct{} // containers whose Stop waits
}

func newHost() *host {
	return &host{
		containers: map[string]*runtime.Container{}, boxes: map[types.UID]*sandbox.Sandbox{}, mounted: map[types.UID]bool{},
		exits: make(chan types.UID, 1000), calls: map[string]int{}, targets: map[types.UID][]probes.Target{},
		grace: map[string]time.Duration{}, release: map[string]chan struct{}{},
	}
}

var errInjected = errors.New("injected")

func (h *host) call(name string) error {
	h.calls[name]++
	if h.faults > 0 && rand.IntN(h.faults) == 0 {
		return fmt.Errorf("%s: %w", name, errInjected)
	}
	return nil
}

func (h *host) Create(_ context.Context, spec runtime.ContainerSpec) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("create"); err != nil {
		return "", err
	}
	id := fmt.Sprintf("%s-%s-%d", spec.PodUID, spec.Name, spec.Attempt)
	if h.containers[id] != nil {
		return "", fmt.Errorf("container %s exists", id)
	}
	h.containers[id] = &runtime.Container{ID: id, PodUID: spec.PodUID, Name: spec.Name, Attempt: spec.Attempt, State: runtime.Created, CreatedAt: time.Now(), Annotations: spec.Annotations, Image: spec.Image}
	return id, nil
}

func (h *host) Start(_ context.Context, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("start"); err != nil {
		return err
	}
	c := h.containers[id]
	c.State, c.StartedAt = runtime.Running, time.Now()
	h.exits <- c.PodUID
	return nil
}

func (h *host) Stop(ctx context.Context, id string, grace time.Duration) error {
	h.mu.Lock()
	if err := h.call("stop"); err != nil {
		h.mu.Unlock()
		return err
	}
	h.grace[id] = grace
	wait := h.release[id]
	h.mu.Unlock()
	if wait != nil && grace > 0 {
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	h.end(id, 137)
	return nil
}

func (h *host) end(id string, code int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.containers[id]; c != nil && c.State == runtime.Running {
		c.State, c.ExitCode, c.FinishedAt = runtime.Exited, code, time.Now()
		h.exits <- c.PodUID
	}
}

func (h *host) Remove(_ context.Context, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("remove"); err != nil {
		return err
	}
	delete(h.containers, id)
	return nil
}

func (h *host) List(context.Context) ([]runtime.Container, error) { return h.list(""), nil }

func (h *host) ListPod(_ context.Context, pod types.UID) ([]runtime.Container, error) {
	return h.list(pod), nil
}

func (h *host) list(pod types.UID) []runtime.Container {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []runtime.Container
	for _, c := range h.containers {
		if pod == "" || c.PodUID == pod {
			out = append(out, *c)
		}
	}
	return out
}

func (h *host) Exits() <-chan types.UID { return h.exits }

func (h *host) ExecSync(context.Context, string, []string, time.Duration) ([]byte, []byte, int, error) {
	return nil, nil, 0, nil
}

// imageStore has every image but those named "missing".
type imageStore struct{ pulls chan string }

func (s imageStore) Get(_ context.Context, ref string) (runtime.Image, error) {
	if strings.Contains(ref, "missing") {
		return runtime.Image{}, runtime.ErrImageNotFound
	}
	return runtime.Image{ID: "sha256:1"}, nil
}

func (s imageStore) Pull(_ context.Context, ref string, _ []runtime.Auth) (runtime.Image, error) {
	if s.pulls != nil {
		s.pulls <- ref
	}
	return runtime.Image{}, runtime.ErrPull
}
func (imageStore) List(context.Context) ([]runtime.Image, error) { return nil, nil }
func (imageStore) Remove(context.Context, string) error          { return nil }
func (imageStore) ImportDir(context.Context, string) ([]runtime.Image, error) {
	return nil, nil
}

type boxes struct{ *host }

func (h boxes) Create(_ context.Context, s sandbox.Spec) (*sandbox.Sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("sandbox"); err != nil {
		return nil, err
	}
	h.boxes[s.PodUID] = &sandbox.Sandbox{PodUID: s.PodUID, Addrs: []netip.Addr{netip.MustParseAddr("10.42.0.9")}}
	return h.boxes[s.PodUID], nil
}

func (h boxes) Remove(_ context.Context, uid types.UID) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("remove sandbox"); err != nil {
		return err
	}
	delete(h.boxes, uid)
	return nil
}

func (h boxes) List(context.Context) ([]*sandbox.Sandbox, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []*sandbox.Sandbox
	for _, b := range h.boxes {
		out = append(out, b)
	}
	return out, nil
}

type mounts struct{ *host }

func (h mounts) Track(*corev1.Pod) {}
func (h mounts) Untrack(types.UID) {}
func (h mounts) Mount(_ context.Context, p *corev1.Pod) (time.Time, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("mount"); err != nil {
		return time.Time{}, err
	}
	h.mounted[p.UID] = true
	return time.Time{}, nil
}

func (h mounts) Unmount(_ context.Context, uid types.UID) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("unmount"); err != nil {
		return err
	}
	delete(h.mounted, uid)
	return nil
}

func (h mounts) Present(uid types.UID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mounted[uid]
}

func (h mounts) List() ([]types.UID, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []types.UID
	for u := range h.mounted {
		out = append(out, u)
	}
	return out, nil
}

func (h mounts) ContainerMounts(*corev1.Pod, *corev1.Container, func(string) string) ([]runtime.Mount, error) {
	return nil, nil
}

func (h *host) Set(uid types.UID, list []probes.Target) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.targets[uid] = list
}

type noObjects struct{}

func (noObjects) ConfigMap(_ context.Context, _, name string) (*corev1.ConfigMap, error) {
	return nil, apierrors.NewNotFound(corev1.Resource("configmap"), name)
}

func (noObjects) Secret(_ context.Context, _, name string) (*corev1.Secret, error) {
	return nil, apierrors.NewNotFound(corev1.Resource("secret"), name)
}

// bench is a Set on a host in memory, fed by a fake API server.
type bench struct {
	t      *testing.T
	host   *host
	client *fake.Clientset
	set    *Set
	events *record.FakeRecorder
	stop   func()
}

func newBench(t *testing.T, h *host, client *fake.Clientset) *bench {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b := &bench{t: t, host: h, client: client, events: record.NewFakeRecorder(10000)}
	var err error
	b.set, err = New(ctx, Config{
		NodeName: "n", NodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Client: client, Runtime: h, Images: imageStore{},
		Sandboxes: boxes{h}, Volumes: mounts{h}, Objects: noObjects{}, Prober: h, Recorder: b.events,
		ResolvConf: func(*corev1.Pod) ([]byte, error) { return nil, nil }, Dir: t.TempDir(), LogsDir: t.TempDir(),
		ClusterDomain: "cluster.local", Node: func() *corev1.Node { return nil }, MemoryCapacity: 1 << 30, BootID: "boot", Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	b.set.ImagesImported()
	w, err := client.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	go func() { b.set.Run(); done <- struct{}{} }()
	go func() {
		for e := range w.ResultChan() {
			switch p := e.Object.(*corev1.Pod); e.Type {
			case watch.Added, watch.Modified:
				b.set.Update(p)
			case watch.Deleted:
				b.set.Delete(p)
			}
		}
		done <- struct{}{}
	}()
	b.stop = sync.OnceFunc(func() {
		cancel()
		w.Stop()
		<-done
		<-done
	})
	t.Cleanup(b.stop)
	return b
}

func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	b.t.Fatalf("timed out waiting until %s", what)
}

func (b *bench) get(name string) *corev1.Pod {
	p, err := b.client.CoreV1().Pods("ns").Get(context.Background(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

func (b *bench) create(p *corev1.Pod) {
	b.t.Helper()
	if _, err := b.client.CoreV1().Pods("ns").Create(context.Background(), p, metav1.CreateOptions{}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) mark(name string, change func(*corev1.Pod)) {
	b.t.Helper()
	p := b.get(name)
	change(p)
	if _, err := b.client.CoreV1().Pods("ns").Update(context.Background(), p, metav1.UpdateOptions{}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) empty() bool {
	b.host.mu.Lock()
	defer b.host.mu.Unlock()
	return len(b.host.containers) == 0 && len(b.host.boxes) == 0 && len(b.host.mounted) == 0
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func named(name string) podOpt {
	return func(p *corev1.Pod) { p.Name, p.UID = name, types.UID("uid-"+name) }
}

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
	h.faults = 4
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
