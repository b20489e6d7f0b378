// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kuberuntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
)

// host is a node in memory. One call in `faults` fails, if that is not 0.
type host struct {
	mu         sync.Mutex
	faults     int
	unplugged  int  // times that a sandbox is not attached
	imageless  int  // times that a container's image is gone when it is to be made
	obedient   bool // containers end with 0 when they are stopped
	containers map[string]*runtime.Container
	boxes      map[types.UID]*sandbox.Sandbox
	mounted    map[types.UID]bool
	exits      chan types.UID
	ready      map[string]func(context.Context) error
	calls      map[string]int
	targets    map[types.UID][]probes.Target
	grace      map[string]time.Duration
	release    map[string]chan struct{} // containers whose Stop waits
	limits     map[types.UID]cgroup.Limits
	version    atomic.Int64 // of the newest pod in the API
	inUse      int64        // bytes of memory that each container uses
	steps      []string     // of resizes
	burstable  uint64       // weight of burstable pods
}

func newHost() *host {
	return &host{
		containers: map[string]*runtime.Container{}, boxes: map[types.UID]*sandbox.Sandbox{}, mounted: map[types.UID]bool{},
		exits: make(chan types.UID, 1000), ready: map[string]func(context.Context) error{}, calls: map[string]int{}, targets: map[types.UID][]probes.Target{},
		grace: map[string]time.Duration{}, release: map[string]chan struct{}{}, limits: map[types.UID]cgroup.Limits{},
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
	if h.imageless > 0 {
		h.imageless--
		return "", runtime.ErrImageNotFound
	}
	id := fmt.Sprintf("%s-%s-%d", spec.PodUID, spec.Name, spec.Attempt)
	if h.containers[id] != nil {
		return "", fmt.Errorf("container %s exists", id)
	}
	h.ready[id] = spec.Ready
	h.containers[id] = &runtime.Container{ID: id, PodUID: spec.PodUID, Name: spec.Name, Attempt: spec.Attempt, State: runtime.Created, CreatedAt: time.Now(), Annotations: spec.Annotations, Image: spec.Image, Resources: spec.Resources.DeepCopy()}
	return id, nil
}

func (h *host) Start(ctx context.Context, id string) error {
	h.mu.Lock()
	ready := h.ready[id]
	h.mu.Unlock()
	if ready != nil {
		if err := ready(ctx); err != nil {
			return fmt.Errorf("%w: %w", runtime.ErrNotReady, err)
		}
	}
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
	wait, code := h.release[id], int32(137)
	if h.obedient {
		code = 0
	}
	h.mu.Unlock()
	if wait != nil && grace > 0 {
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	h.end(id, code)
	return nil
}

func (h *host) weigh(shares uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.burstable = shares
	return h.call("weigh")
}

func (h *host) end(id string, code int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.containers[id]; c != nil && c.State == runtime.Running {
		c.State, c.ExitCode, c.FinishedAt = runtime.Exited, code, time.Now()
		h.exits <- c.PodUID
	}
}

func (h *host) Update(_ context.Context, id string, r corev1.ResourceRequirements) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("update"); err != nil {
		return err
	}
	c := h.containers[id]
	if c == nil || c.State != runtime.Running {
		return runtime.ErrNotRunning
	}
	if h.inUse > 0 && r.Limits.Memory().Value() > 0 && r.Limits.Memory().Value() < h.inUse {
		return cgroup.ErrInUse
	}
	h.steps = append(h.steps, "update "+id)
	c.Resources = r.DeepCopy()
	return nil
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
func (imageStore) List(context.Context) ([]runtime.Image, error)                  { return nil, nil }
func (imageStore) Remove(context.Context, string) error                           { return nil }
func (imageStore) Mount(context.Context, string, types.UID, string, string) error { return nil }
func (imageStore) Release(context.Context, types.UID) error                       { return nil }
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
	h.limits[s.PodUID] = s.CgroupLimits
	h.boxes[s.PodUID] = &sandbox.Sandbox{PodUID: s.PodUID, Addrs: []netip.Addr{netip.MustParseAddr("10.42.0.9")}}
	return h.boxes[s.PodUID], nil
}

func (h boxes) Attached(_ context.Context, uid types.UID) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.call("attach")
	if h.unplugged > 0 {
		h.unplugged--
		err = errInjected
	}
	if err != nil {
		delete(h.boxes, uid)
	}
	return err
}

func (h boxes) Limit(_ context.Context, uid types.UID, l cgroup.Limits) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.call("limit"); err != nil {
		return err
	}
	if h.limits[uid] != l {
		h.steps = append(h.steps, fmt.Sprintf("limit cpu %d memory %d", l.CPUQuota, l.MemoryBytes))
	}
	h.limits[uid] = l
	return nil
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

func (h mounts) MountImage(_ context.Context, pod *corev1.Pod, volume, imageID string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.steps = append(h.steps, "image "+imageID+" at "+volume)
	return h.call("mount image")
}

func (h mounts) ContainerDevices(*corev1.Pod, *corev1.Container) ([]runtime.Device, error) {
	return nil, nil
}

func (h mounts) EnvFile(*corev1.Pod, string, string, string) (string, error) { return "", nil }

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
		Services:   func(string, bool) ([]*corev1.Service, error) { return nil, nil },
		ResolvConf: func(*corev1.Pod) ([]byte, error) { return nil, nil }, Dir: t.TempDir(), LogsDir: t.TempDir(),
		ClusterDomain: "cluster.local", Node: func() *corev1.Node { return nil }, MemoryCapacity: 1 << 30, BootID: "boot", Weigh: h.weigh, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	b.set.ImagesImported()
	// The tracker orders no versions: what a write of status returns could pass for newer than a later change of the spec.
	for _, verb := range []string{"create", "update"} {
		client.PrependReactor(verb, "pods", func(a clienttesting.Action) (bool, kuberuntime.Object, error) {
			if p, ok := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod); ok {
				p.ResourceVersion = strconv.FormatInt(h.version.Add(1), 10)
			}
			return false, nil, nil
		})
	}
	// Nor does it know preconditions: a late patch would turn a pod into the one that had its name before.
	client.PrependReactor("patch", "pods", func(a clienttesting.Action) (bool, kuberuntime.Object, error) {
		var said corev1.Pod
		patch := a.(clienttesting.PatchAction)
		if err := json.Unmarshal(patch.GetPatch(), &said); err != nil {
			return true, nil, err
		}
		o, err := client.Tracker().Get(a.GetResource(), a.GetNamespace(), patch.GetName())
		if err != nil {
			return true, nil, err
		}
		if have := o.(*corev1.Pod); said.UID != "" && said.UID != have.UID {
			return true, nil, apierrors.NewConflict(corev1.Resource("pods"), have.Name, fmt.Errorf("uid %s, not %s", have.UID, said.UID))
		}
		return false, nil, nil
	})
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
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
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
