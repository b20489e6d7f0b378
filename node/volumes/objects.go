// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// Objects are the ConfigMaps and Secrets that pods of this node refer to. Each has one watch of its own for as long as a
// pod refers to it: a node may read no others (NodeRestriction), and nothing polls.
type Objects struct {
	client  kubernetes.Interface
	changed func(pod types.UID)
	log     *slog.Logger
	ctx     context.Context

	mu      sync.Mutex
	objects map[objectKey]*object
	pods    map[types.UID]map[objectKey]bool
	wg      sync.WaitGroup
}

type objectKey struct{ kind, namespace, name string }

func (k objectKey) String() string { return k.kind + " " + k.namespace + "/" + k.name }

const (
	configMaps = "configmap"
	secrets    = "secret"
)

// object is one watched object.
type object struct {
	pods   map[types.UID]bool
	cancel context.CancelFunc
	known  chan struct{} // closed once the first answer is here

	value runtime.Object // nil: not found
	err   error          // why there is no value
}

// NewObjects watches nothing yet; changed is told of each pod that refers to something that changed, and must not block.
func NewObjects(ctx context.Context, client kubernetes.Interface, log *slog.Logger, changed func(pod types.UID)) *Objects {
	return &Objects{client: client, changed: changed, log: log, ctx: ctx, objects: map[objectKey]*object{}, pods: map[types.UID]map[objectKey]bool{}}
}

// Wait returns once the context that the Objects were made with has ended and every watch with it.
func (o *Objects) Wait() { o.wg.Wait() }

// Track begins to watch what the pod refers to.
func (o *Objects) Track(pod *corev1.Pod) {
	want := map[objectKey]bool{}
	podutil.VisitPodConfigmapNames(pod, func(name string) bool {
		want[objectKey{configMaps, pod.Namespace, name}] = true
		return true
	})
	podutil.VisitPodSecretNames(pod, func(name string) bool {
		want[objectKey{secrets, pod.Namespace, name}] = true
		return true
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ctx.Err() != nil {
		return
	}
	had := o.pods[pod.UID]
	for k := range want {
		if !had[k] {
			o.add(k, pod.UID)
		}
	}
	for k := range had {
		if !want[k] {
			o.drop(k, pod.UID)
		}
	}
	o.pods[pod.UID] = want
}

// Untrack ends the watches that only this pod needed.
func (o *Objects) Untrack(pod types.UID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k := range o.pods[pod] {
		o.drop(k, pod)
	}
	delete(o.pods, pod)
}

func (o *Objects) add(k objectKey, pod types.UID) {
	obj := o.objects[k]
	if obj == nil {
		ctx, cancel := context.WithCancel(o.ctx)
		obj = &object{pods: map[types.UID]bool{}, cancel: cancel, known: make(chan struct{})}
		o.objects[k] = obj
		o.wg.Add(1)
		go func() {
			defer o.wg.Done()
			o.follow(ctx, k, obj)
		}()
	}
	obj.pods[pod] = true
}

func (o *Objects) drop(k objectKey, pod types.UID) {
	obj := o.objects[k]
	if obj == nil {
		return
	}
	delete(obj.pods, pod)
	if len(obj.pods) == 0 {
		obj.cancel()
		delete(o.objects, k)
	}
}

// ConfigMap returns a ConfigMap that a tracked pod refers to, waiting for the first answer about it.
func (o *Objects) ConfigMap(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error) {
	v, err := o.get(ctx, objectKey{configMaps, namespace, name})
	if err != nil {
		return nil, err
	}
	return v.(*corev1.ConfigMap), nil
}

// Secret is ConfigMap for Secrets.
func (o *Objects) Secret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	v, err := o.get(ctx, objectKey{secrets, namespace, name})
	if err != nil {
		return nil, err
	}
	return v.(*corev1.Secret), nil
}

func (o *Objects) get(ctx context.Context, k objectKey) (runtime.Object, error) {
	o.mu.Lock()
	obj := o.objects[k]
	o.mu.Unlock()
	if obj == nil {
		return nil, fmt.Errorf("%s is not referred to by any pod of this node", k)
	}
	select {
	case <-obj.known:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", k, context.Cause(ctx))
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if obj.value == nil {
		return nil, obj.err
	}
	return obj.value, nil
}

// follow keeps one object up to date: a get for the first answer, which is as quick as can be, and a watch for the rest.
func (o *Objects) follow(ctx context.Context, k objectKey, obj *object) {
	const first, limit = 100 * time.Millisecond, 30 * time.Second
	delay := first
	for ctx.Err() == nil {
		o.take(obj, func() (runtime.Object, error) { return o.read(ctx, k) })
		w, err := o.watch(ctx, k)
		if err == nil {
			if o.drain(ctx, k, obj, w) {
				delay = first
			}
			w.Stop()
		} else if ctx.Err() == nil {
			o.log.Debug("watch", "object", k.String(), "error", err)
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		delay = min(2*delay, limit)
	}
}

func (o *Objects) read(ctx context.Context, k objectKey) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var value runtime.Object
	err := soon(ctx, func() (err error) {
		if k.kind == secrets {
			value, err = o.client.CoreV1().Secrets(k.namespace).Get(ctx, k.name, metav1.GetOptions{})
		} else {
			value, err = o.client.CoreV1().ConfigMaps(k.namespace).Get(ctx, k.name, metav1.GetOptions{})
		}
		return err
	})
	if apierrors.IsNotFound(err) {
		err = k.notFound() // in the words of kubelet's events
	}
	return value, err
}

func (k objectKey) notFound() error { return apierrors.NewNotFound(corev1.Resource(k.kind), k.name) }

// soon tries again, for a moment, what the API server forbids: it may learn a few milliseconds after the node does that
// a pod which refers to the object has been bound here.
func soon(ctx context.Context, call func() error) error {
	const first, limit = 5 * time.Millisecond, time.Second
	for delay := first; ; delay *= 2 {
		err := call()
		if !apierrors.IsForbidden(err) || delay > limit {
			return err
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

func (o *Objects) watch(ctx context.Context, k objectKey) (watch.Interface, error) {
	opts := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", k.name).String(), ResourceVersion: "0"}
	if k.kind == secrets {
		return o.client.CoreV1().Secrets(k.namespace).Watch(ctx, opts)
	}
	return o.client.CoreV1().ConfigMaps(k.namespace).Watch(ctx, opts)
}

// drain takes in a watch's events until it ends; true if there was any.
func (o *Objects) drain(ctx context.Context, k objectKey, obj *object, w watch.Interface) (any bool) {
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok || e.Type == watch.Error {
				return any
			}
			any = true
			m, isMeta := e.Object.(metav1.Object)
			if !isMeta || m.GetName() != k.name {
				continue
			}
			switch e.Type {
			case watch.Added, watch.Modified:
				o.take(obj, func() (runtime.Object, error) { return e.Object, nil })
			case watch.Deleted:
				o.take(obj, func() (runtime.Object, error) { return nil, k.notFound() })
			}
		case <-ctx.Done():
			return any
		}
	}
}

// take stores an answer unless what is known is newer, and tells the pods when it changes something.
func (o *Objects) take(obj *object, answer func() (runtime.Object, error)) {
	value, err := answer()
	o.mu.Lock()
	first := false
	select {
	case <-obj.known:
	default:
		first = true
	}
	if err != nil {
		value = nil
		if !apierrors.IsNotFound(err) && obj.value != nil {
			o.mu.Unlock()
			return // cannot tell: what is known stands
		}
	}
	same := !first && (value == nil && obj.value == nil || value != nil && obj.value != nil && version(value) <= version(obj.value) && version(value) != 0)
	var pods []types.UID
	if !same {
		obj.value = value
		if !first {
			for p := range obj.pods {
				pods = append(pods, p)
			}
		}
	}
	obj.err = err
	if first {
		close(obj.known)
	}
	o.mu.Unlock()
	for _, p := range pods {
		o.changed(p)
	}
}

func version(v runtime.Object) uint64 {
	m, ok := v.(metav1.Object)
	if !ok {
		return 0
	}
	n, err := strconv.ParseUint(m.GetResourceVersion(), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
