// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// Handlers are a controller's reactions to the events of one kind of object. Fields may be nil.
// Objects come from a shared cache: they are read, never changed.
type Handlers[T metav1.Object] struct {
	Add    func(obj T)
	Update func(old, cur T)
	// Delete also gets objects whose deletion the watch missed, in their last known state.
	Delete func(obj T)
}

// Watch registers h with an informer. It returns a function that tells when h has seen everything that
// existed at the start.
func Watch[T metav1.Object](informer cache.SharedIndexInformer, h Handlers[T]) (cache.InformerSynced, error) {
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) {
			if o, ok := obj.(T); ok && h.Add != nil {
				h.Add(o)
			}
		},
		UpdateFunc: func(old, cur any) {
			o, ok := old.(T)
			if !ok || h.Update == nil {
				return
			}
			if c, ok := cur.(T); ok {
				h.Update(o, c)
			}
		},
		DeleteFunc: func(obj any) {
			if tombstone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = tombstone.Obj
			}
			if o, ok := obj.(T); ok && h.Delete != nil {
				h.Delete(o)
			}
		},
	})
	if err != nil {
		var zero T
		return nil, fmt.Errorf("watch %T: %w", zero, err)
	}
	return registration.HasSynced, nil
}

// Find is the cached object of a queue key; there may be none any more.
func Find[T metav1.Object](key string, get func(namespace, name string) (T, error)) (obj T, found bool, err error) {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return obj, false, fmt.Errorf("queue key %q: %w", key, err)
	}
	switch obj, err = get(namespace, name); {
	case apierrors.IsNotFound(err):
		return obj, false, nil
	case err != nil:
		return obj, false, fmt.Errorf("read %T %s: %w", obj, key, err)
	}
	return obj, true, nil
}

// Key is the queue key of an object: namespace/name, or name for cluster-scoped ones.
func Key(obj metav1.Object) string {
	if obj.GetNamespace() == "" {
		return obj.GetName()
	}
	return obj.GetNamespace() + "/" + obj.GetName()
}
