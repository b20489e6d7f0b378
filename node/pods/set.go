// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/steps"
)

// Sandboxes makes what the containers of a pod share. *sandbox.Sandboxes implements it.
type Sandboxes interface {
	// Create returns the pod's sandbox, making it if it is not there.
	Create(ctx context.Context, spec sandbox.Spec) (*sandbox.Sandbox, error)
	// Attached waits until nothing is missing for the pod's containers to run.
	Attached(ctx context.Context, pod types.UID) error
	Remove(ctx context.Context, pod types.UID) error
	List(ctx context.Context) ([]*sandbox.Sandbox, error)
	// Limit bounds what all containers of the pod have together, from now on.
	Limit(ctx context.Context, pod types.UID, limits cgroup.Limits) error
}

// Volumes mounts what containers see of the world. *volumes.Volumes implements it, behind a small adapter.
type Volumes interface {
	// Track and Untrack bracket the life of a pod: what it refers to is watched in between.
	Track(pod *corev1.Pod)
	Untrack(pod types.UID)
	// Mount makes all volumes of the pod, or brings them up to date; refresh is when a token needs renewing.
	Mount(ctx context.Context, pod *corev1.Pod) (refresh time.Time, err error)
	Unmount(ctx context.Context, pod types.UID) error
	// Present reports whether something is left to unmount.
	Present(pod types.UID) bool
	// List names the pods that have something on disk.
	List() ([]types.UID, error)
	// MountImage makes a volume of an image that is here. Errors: runtime.ErrImageNotFound.
	MountImage(ctx context.Context, pod *corev1.Pod, volume, imageID string) error
	// ContainerDevices are the block devices for the container's volumeDevices.
	ContainerDevices(pod *corev1.Pod, c *corev1.Container) ([]runtime.Device, error)
	// EnvFile reads a variable of a file in a volume; empty if the file does not have it. Errors: fs.ErrNotExist.
	EnvFile(pod *corev1.Pod, volume, path, key string) (string, error)
	ContainerMounts(pod *corev1.Pod, c *corev1.Container, expand func(string) string) ([]runtime.Mount, error)
}

// Objects are the ConfigMaps and Secrets that pods of this node refer to.
type Objects interface {
	ConfigMap(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error)
	Secret(ctx context.Context, namespace, name string) (*corev1.Secret, error)
}

// Prober runs the probes of containers. *probes.Probes implements it.
type Prober interface {
	// Set has exactly these containers of the pod probed.
	Set(pod types.UID, targets []probes.Target)
}

// Config of a Set. All fields are needed unless they say otherwise.
type Config struct {
	NodeName  string
	NodeIPs   []netip.Addr
	Client    kubernetes.Interface
	Runtime   runtime.Containers
	Images    runtime.Images
	Sandboxes Sandboxes
	Volumes   Volumes
	Objects   Objects
	Prober    Prober
	// Services lists those of a namespace. With wait it waits until they are known; without it gives what is known now.
	Services       func(namespace string, wait bool) ([]*corev1.Service, error)
	ResolvConf     func(pod *corev1.Pod) ([]byte, error)
	Recorder       record.EventRecorder
	Dir            string // pods' directories: DATA/pods
	LogsDir        string // pods' logs: /var/log/pods
	ClusterDomain  string
	Allocatable    corev1.ResourceList
	Terms          Terms
	Node           func() *corev1.Node // as the API has it; may give nil while that is not known
	MemoryCapacity int64               // bytes
	BootID         string
	// Weigh gives all burstable pods together a weight, in cgroup version 1's units; nil: nobody does.
	Weigh   func(shares uint64) error
	Log     *slog.Logger
	Metrics prometheus.Registerer // may be nil
}

// Set is the pods of this node.
type Set struct {
	cfg   Config
	files hostFiles
	hooks *hooks
	pulls *pulls
	stats *metrics
	ctx   context.Context

	mirrorsDue, weighDue chan struct{}

	mu      sync.Mutex
	workers map[types.UID]*worker
	found   map[types.UID]*remains // what an earlier agent left and no worker has taken over
	statics map[types.NamespacedName]*staticPod
	wg      sync.WaitGroup
	// complete says that all pods of the node are known: until then nobody gets more than it has.
	complete bool
	closed   *refusal              // why no pod is taken any more; nil if they are
	deferred map[types.UID]*worker // whose pods want other resources than they were given
}

// remains is what is left of one pod on this host.
type remains struct {
	containers []runtime.Container
	sandbox    *sandbox.Sandbox
	files      bool
}

// New reads what an earlier agent left, so that pods which come later find their own. ctx ends all workers.
func New(ctx context.Context, cfg Config) (*Set, error) {
	if cfg.Log.Enabled(ctx, slog.LevelDebug) {
		ctx = steps.With(ctx, func(pod, step string) { cfg.Log.Debug("pod step", "pod", pod, "step", step) })
	}
	s := &Set{
		cfg: cfg, files: hostFiles{dir: cfg.Dir, logs: cfg.LogsDir}, ctx: ctx,
		hooks: newHooks(cfg.Runtime), pulls: newPulls(ctx, cfg.Images),
		workers: map[types.UID]*worker{}, found: map[types.UID]*remains{}, statics: map[types.NamespacedName]*staticPod{}, deferred: map[types.UID]*worker{}, mirrorsDue: make(chan struct{}, 1), weighDue: make(chan struct{}, 1),
	}
	var err error
	if s.stats, err = newMetrics(cfg.Metrics, s.count); err != nil {
		return nil, err
	}
	of := func(uid types.UID) *remains {
		if s.found[uid] == nil {
			s.found[uid] = &remains{}
		}
		return s.found[uid]
	}
	containers, err := cfg.Runtime.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers to adopt: %w", err)
	}
	for _, c := range containers {
		r := of(c.PodUID)
		r.containers = append(r.containers, c)
	}
	boxes, err := cfg.Sandboxes.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes to adopt: %w", err)
	}
	for _, b := range boxes {
		of(b.PodUID).sandbox = b
	}
	dirs, err := cfg.Volumes.List()
	if err != nil {
		return nil, fmt.Errorf("list volumes to adopt: %w", err)
	}
	for _, uid := range dirs {
		of(uid).files = true
	}
	return s, nil
}

func (s *Set) count() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return float64(len(s.workers))
}

// Run hands the runtime's news to the workers until the Set's context ends, and then waits for them.
func (s *Set) Run() {
	if s.cfg.Weigh != nil {
		s.wg.Go(s.runWeights)
	}
	for {
		select {
		case uid := <-s.cfg.Runtime.Exits():
			s.withWorker(uid, func(w *worker) { w.listed = false })
		case <-s.ctx.Done():
			s.wg.Wait()
			return
		}
	}
}

// Update tells of a pod that the API has for this node.
func (s *Set) Update(pod *corev1.Pod) {
	if isMirror(pod) {
		s.mirrored(pod, false)
		return
	}
	s.mu.Lock()
	w := s.workers[pod.UID]
	if w != nil {
		s.mu.Unlock()
		w.post(func() { w.seen(pod) })
		return
	}
	s.mu.Unlock()
	node := s.nodeFor(pod)
	s.mu.Lock()
	if s.ctx.Err() == nil {
		s.begin(pod, node, nil)
	}
	s.mu.Unlock()
}

// begin starts the worker of a pod, which takes over what is left of it on this host. s.mu is held.
func (s *Set) begin(pod *corev1.Pod, node *corev1.Node, st *staticPod) *worker {
	w := newWorker(s, pod, s.found[pod.UID])
	if st != nil {
		w.static = pod.UID
	}
	if s.found[pod.UID] == nil && pod.Status.StartTime == nil && pod.DeletionTimestamp == nil {
		s.admit(w, node)
	}
	delete(s.found, pod.UID)
	s.workers[pod.UID] = w
	s.allotMade(w)
	s.reweigh()
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		w.loop(s.ctx)
		w.finish()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.workers, pod.UID)
		delete(s.deferred, pod.UID)
		s.reweigh()
		if s.complete {
			s.allotDeferred()
		}
		if st != nil {
			s.staticEnded(st)
		}
	}()
	return w
}

// nodeFor is the Node to judge a new pod by. Its labels may have changed a moment ago, and the pod been bound for that:
// before they are held against a pod they are read again.
func (s *Set) nodeFor(pod *corev1.Pod) *corev1.Node {
	node := s.cfg.Node()
	if node == nil || matches(pod, node) {
		return node
	}
	fresh, err := s.cfg.Client.CoreV1().Nodes().Get(s.ctx, node.Name, metav1.GetOptions{})
	if err != nil {
		return node
	}
	return fresh
}

// admit has a new pod refused that this node cannot take. s.mu is held: of two pods one comes first.
func (s *Set) admit(w *worker, node *corev1.Node) {
	if w.refused = admit(w.pod, node, s.taken(), s.cfg.Allocatable, s.cfg.Terms); s.closed != nil {
		w.refused = s.closed
	}
	if w.refused == nil {
		return
	}
	w.out.Store(true)
	s.event(w.pod, "", corev1.EventTypeWarning, w.refused.Reason, "%s", w.refused.Message)
	s.cfg.Log.Warn("pod is refused", "pod", w.pod.Namespace+"/"+w.pod.Name, "reason", w.refused.Reason, "message", w.refused.Message)
}

// Delete tells that the API no longer has the pod.
func (s *Set) Delete(pod *corev1.Pod) {
	if isMirror(pod) {
		s.mirrored(pod, true)
		return
	}
	s.mu.Lock()
	w := s.workers[pod.UID]
	s.mu.Unlock()
	if w == nil {
		return
	}
	// Deleted without grace its containers may live on for a moment. Whoever binds another pod counts on its room all
	// the same, as the scheduler does that has just had it make way.
	w.leave(pod.UID)
	w.post(func() {
		w.seen(pod)
		w.gone = true
	})
}

// withWorker runs f in the goroutine that owns the pod, if there is one.
func (s *Set) withWorker(uid types.UID, f func(w *worker)) {
	s.mu.Lock()
	w := s.workers[uid]
	s.mu.Unlock()
	if w != nil {
		w.post(func() { f(w) })
	}
}

// VolumesChanged tells that something which the pod's volumes or variables come from has changed.
func (s *Set) VolumesChanged(uid types.UID) {
	s.withWorker(uid, func(w *worker) {
		w.volumes.Stale, w.volumes.Failure = true, nil
		w.retries.forget(string(MountVolumes))
		for name, f := range w.starts {
			if f.Reason == errConfig.Error() {
				delete(w.starts, name)
			}
		}
	})
}

// NetworkReady tells that sandboxes that could not be made are worth another try.
func (s *Set) NetworkReady() {
	s.mu.Lock()
	list := make([]*worker, 0, len(s.workers))
	for _, w := range s.workers {
		list = append(list, w)
	}
	s.mu.Unlock()
	for _, w := range list {
		w.post(func() {
			w.boxFailure = nil
			w.retries.forget(string(CreateSandbox))
		})
	}
}

// ImagesImported tells that the archives on this host, if any, have been imported. Until it is called images that are
// missing are waited for; pods that have failed for want of one look again.
func (s *Set) ImagesImported() {
	s.pulls.importOnce.Do(func() { close(s.pulls.imported) })
	s.mu.Lock()
	list := make([]*worker, 0, len(s.workers))
	for _, w := range s.workers {
		list = append(list, w)
	}
	s.mu.Unlock()
	for _, w := range list {
		w.post(func() {
			for name, i := range w.images {
				if i.Failure != nil && !i.Pulling {
					delete(w.images, name)
					w.retries.forget(Action{Kind: EnsureImage, Container: name}.key())
				}
			}
		})
	}
}

// ProbeResult tells what a probe said.
func (s *Set) ProbeResult(r probes.Result) {
	s.withWorker(r.PodUID, func(w *worker) { w.probed(r) })
}

// Prune removes what an earlier agent left of pods that no longer exist, and has pods get what they wait for. Call it once, after Update for every pod that does.
func (s *Set) Prune(ctx context.Context) error {
	s.mu.Lock()
	left := s.found
	s.found = map[types.UID]*remains{}
	s.complete = true
	s.allotDeferred()
	s.reweigh()
	s.mu.Unlock()
	var errs []error
	for uid, r := range left {
		if err := s.clear(ctx, uid, r); err != nil {
			errs = append(errs, fmt.Errorf("what is left of pod %s: %w", uid, err))
			continue
		}
		s.cfg.Log.Info("removed what was left of a pod that is gone", "uid", uid, "containers", len(r.containers))
	}
	return errors.Join(errs...)
}

// orphanGrace is what the containers of a pod that nobody knows get to end.
const orphanGrace = 2 * time.Second

func (s *Set) clear(ctx context.Context, uid types.UID, r *remains) error {
	var errs []error
	for _, c := range r.containers {
		if c.State == runtime.Running {
			if err := s.cfg.Runtime.Stop(ctx, c.ID, orphanGrace); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, s.cfg.Runtime.Remove(ctx, c.ID))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if r.sandbox != nil {
		errs = append(errs, s.cfg.Sandboxes.Remove(ctx, uid))
	}
	if err := s.cfg.Volumes.Unmount(ctx, uid); err != nil {
		return errors.Join(append(errs, err)...)
	}
	logs, err := filepath.Glob(filepath.Join(s.files.logs, "*_"+string(uid)))
	errs = append(errs, err)
	for _, dir := range logs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(append(errs, os.RemoveAll(s.files.pod(uid)))...)
}

// Pods lists the pods of this node, as their workers last saw them.
func (s *Set) Pods() []*corev1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*corev1.Pod, 0, len(s.workers))
	for _, w := range s.workers {
		out = append(out, w.shown.Load())
	}
	slices.SortFunc(out, func(a, b *corev1.Pod) int { return strings.Compare(string(a.UID), string(b.UID)) })
	return out
}

// Pod finds a pod by name; uid may be empty.
func (s *Set) Pod(namespace, name string, uid types.UID) (*corev1.Pod, bool) {
	for _, p := range s.Pods() {
		if p.Namespace == namespace && p.Name == name && (uid == "" || p.UID == uid) {
			return p, true
		}
	}
	return nil, false
}

// LogPath is where the log of one attempt of a container is.
func (s *Set) LogPath(pod *corev1.Pod, container string, attempt int) string {
	return s.files.log(pod, container, attempt)
}

// Cleanup removes the logs of the pods that have a directory in podsDir. Call it before that directory is removed.
func Cleanup(_ context.Context, podsDir, logsDir string) error {
	pods, err := os.ReadDir(podsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("directory of pods: %w", err)
	}
	var errs []error
	for _, p := range pods {
		logs, err := filepath.Glob(filepath.Join(logsDir, "*_"+p.Name()))
		errs = append(errs, err)
		for _, dir := range logs {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	if len(pods) > 0 {
		// The directory is shared with other runtimes: it goes only when it is empty.
		if err := os.Remove(logsDir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
