// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// watcher is the table's one writer.
type watcher struct {
	table      *table
	services   corelisters.ServiceLister
	namespaces corelisters.NamespaceLister
	events     workqueue.TypedInterface[event]
	ready      *atomic.Bool
	synced     []cache.InformerSynced
	stops      []func() error

	mu     sync.Mutex
	slices map[types.NamespacedName]map[string]*discoveryv1.EndpointSlice // by service, by name
}

// event names what may have changed: a service if both parts are set, a namespace if one is. The
// empty event stands after every object of the informers' first lists.
type event types.NamespacedName

func newWatcher(t *table, factory informers.SharedInformerFactory, ready *atomic.Bool) (*watcher, error) {
	w := &watcher{
		table:      t,
		services:   factory.Core().V1().Services().Lister(),
		namespaces: factory.Core().V1().Namespaces().Lister(),
		events:     workqueue.NewTyped[event](),
		ready:      ready,
		slices:     map[types.NamespacedName]map[string]*discoveryv1.EndpointSlice{},
	}
	for informer, changed := range map[cache.SharedIndexInformer]func(before, after any){
		factory.Core().V1().Services().Informer(): func(before, after any) {
			for _, object := range objects[*corev1.Service](before, after) {
				w.events.Add(event{Namespace: object.Namespace, Name: object.Name})
			}
		},
		factory.Core().V1().Namespaces().Informer(): func(before, after any) {
			for _, object := range objects[*corev1.Namespace](before, after) {
				w.events.Add(event{Namespace: object.Name})
			}
		},
		factory.Discovery().V1().EndpointSlices().Informer(): func(before, after any) {
			for _, object := range objects[*discoveryv1.EndpointSlice](before) {
				w.setSlice(object, nil)
			}
			for _, object := range objects[*discoveryv1.EndpointSlice](after) {
				w.setSlice(object, object)
			}
		},
	} {
		handle, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { changed(nil, obj) },
			UpdateFunc: changed,
			DeleteFunc: func(obj any) {
				if tombstone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
					obj = tombstone.Obj
				}
				changed(obj, nil)
			},
		})
		if err != nil {
			return nil, err
		}
		w.synced = append(w.synced, handle.HasSynced)
		w.stops = append(w.stops, func() error { return informer.RemoveEventHandler(handle) })
	}
	return w, nil
}

// objects returns those of candidates that are there and of type T.
func objects[T any](candidates ...any) []T {
	var all []T
	for _, candidate := range candidates {
		if object, ok := candidate.(T); ok {
			all = append(all, object)
		}
	}
	return all
}

// setSlice keeps the slices by service, so that a change to one does not cost a search.
func (w *watcher) setSlice(where, slice *discoveryv1.EndpointSlice) {
	name := where.Labels[discoveryv1.LabelServiceName]
	if name == "" {
		return
	}
	key := types.NamespacedName{Namespace: where.Namespace, Name: name}
	w.mu.Lock()
	switch {
	case slice == nil:
		delete(w.slices[key], where.Name)
		if len(w.slices[key]) == 0 {
			delete(w.slices, key)
		}
	case w.slices[key] == nil:
		w.slices[key] = map[string]*discoveryv1.EndpointSlice{slice.Name: slice}
	default:
		w.slices[key][slice.Name] = slice
	}
	w.mu.Unlock()
	w.events.Add(event(key))
}

// run applies events until ctx ends.
func (w *watcher) run(ctx context.Context) {
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if cache.WaitForCacheSync(ctx.Done(), w.synced...) {
			w.events.Add(event{})
		}
		<-ctx.Done()
		w.events.ShutDown()
	})
	for {
		e, shutdown := w.events.Get()
		if shutdown {
			break
		}
		w.apply(e)
		w.events.Done(e)
	}
	waiting.Wait()
	for _, stop := range w.stops {
		_ = stop() // fails only for a handle that is not the informer's own
	}
}

func (w *watcher) apply(e event) {
	switch {
	case e == event{}:
		w.ready.Store(true)
	case e.Name == "":
		// A lister reads the informer's cache: its only error is that there is no such object.
		if _, err := w.namespaces.Get(e.Namespace); err == nil {
			w.table.namespaces.Store(e.Namespace, struct{}{})
		} else {
			w.table.namespaces.Delete(e.Namespace)
		}
	default:
		key := types.NamespacedName(e)
		object, err := w.services.Services(key.Namespace).Get(key.Name)
		if err != nil {
			w.table.set(key, nil)
			return
		}
		w.mu.Lock()
		var of []*discoveryv1.EndpointSlice
		for _, slice := range w.slices[key] {
			of = append(of, slice)
		}
		w.mu.Unlock()
		w.table.set(key, newService(object, of))
	}
}
