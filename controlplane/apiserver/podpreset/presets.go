// SPDX-License-Identifier: Apache-2.0

package podpreset

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	api "skep.io/skep/api/podpreset"
)

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// presets are the PodPresets of all namespaces. They are known once it is known that they are not defined, or, if they
// are, which there are: that the API does not serve them may only mean that it has just started.
type presets struct {
	known chan struct{} // closed then

	mu    sync.Mutex
	index cache.Indexer // nil while they are not defined
}

func newPresets() *presets { return &presets{known: make(chan struct{})} }

// Run follows the presets until ctx ends. Call it once the API answers. events is who writes events.
func (p *Plugin) Run(ctx context.Context, client dynamic.Interface, events kubernetes.Interface) error {
	broadcaster := record.NewBroadcaster(record.WithContext(context.WithoutCancel(ctx)))
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: events.CoreV1().Events("")})
	defer broadcaster.Shutdown()
	p.recorder = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "podpreset-admission"})
	only := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, api.DefinitionName).String()
	}
	definition := dynamicinformer.NewFilteredDynamicInformer(client, definitions, metav1.NamespaceAll, 0, cache.Indexers{}, only).Informer()
	defined := make(chan struct{}, 1)
	tell := func() {
		select {
		case defined <- struct{}{}:
		default:
		}
	}
	registration, err := definition.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) {
			if served(o) {
				tell()
			}
		},
		UpdateFunc: func(_, o any) {
			if served(o) {
				tell()
			}
		},
	})
	if err != nil {
		return fmt.Errorf("watching the definition of PodPresets: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { definition.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return nil
	}
	known := sync.OnceFunc(func() { close(p.presets.known) })
	if len(definition.GetStore().ListKeys()) == 0 {
		known()
	}
	select {
	case <-defined:
	case <-ctx.Done():
		return nil
	}
	informer := dynamicinformer.NewFilteredDynamicInformer(client, api.Resource, metav1.NamespaceAll, 0,
		cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}, nil).Informer()
	wg.Go(func() { informer.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil
	}
	p.presets.mu.Lock()
	p.presets.index = informer.GetIndexer()
	p.presets.mu.Unlock()
	known()
	<-ctx.Done()
	return nil
}

// served reports whether a definition is in force.
func served(o any) bool {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return false
	}
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	for _, c := range conditions {
		if c, ok := c.(map[string]any); ok && c["type"] == "Established" && c["status"] == "True" {
			return true
		}
	}
	return false
}

// of lists those of a namespace.
func (s *presets) of(ctx context.Context, namespace string) ([]*api.PodPreset, error) {
	select {
	case <-s.known:
	default:
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		select {
		case <-s.known:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s.mu.Lock()
	index := s.index
	s.mu.Unlock()
	if index == nil {
		return nil, nil
	}
	list, err := index.ByIndex(cache.NamespaceIndex, namespace)
	if err != nil {
		return nil, err
	}
	out := make([]*api.PodPreset, 0, len(list))
	for _, o := range list {
		u, ok := o.(*unstructured.Unstructured)
		if !ok {
			return nil, fmt.Errorf("a cache of PodPresets holds %T", o)
		}
		p := &api.PodPreset{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, p); err != nil {
			return nil, fmt.Errorf("PodPreset %s/%s: %w", u.GetNamespace(), u.GetName(), err)
		}
		out = append(out, p)
	}
	return out, nil
}
