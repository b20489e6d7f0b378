// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"fmt"
	"sync"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

// kinds gives informers for every kind there is to the controllers that follow all of them. Only what the
// process watches in full anyway comes from the shared factory; of everything else (secrets, config maps, custom
// resources and so on) only the metadata is kept.
type kinds struct {
	full     informers.SharedInformerFactory
	metadata metadatainformer.SharedInformerFactory
	mapper   meta.ResettableRESTMapper
	started  chan struct{}
	once     sync.Once
}

// inFull are kinds that skep watches in full, or whose spec quotas count by.
var inFull = map[schema.GroupVersionResource]bool{
	corev1.SchemeGroupVersion.WithResource("pods"):                   true,
	corev1.SchemeGroupVersion.WithResource("services"):               true,
	corev1.SchemeGroupVersion.WithResource("endpoints"):              true,
	corev1.SchemeGroupVersion.WithResource("nodes"):                  true,
	corev1.SchemeGroupVersion.WithResource("namespaces"):             true,
	corev1.SchemeGroupVersion.WithResource("serviceaccounts"):        true,
	corev1.SchemeGroupVersion.WithResource("resourcequotas"):         true,
	corev1.SchemeGroupVersion.WithResource("persistentvolumeclaims"): true,
	corev1.SchemeGroupVersion.WithResource("configmaps"):             true,
	appsv1.SchemeGroupVersion.WithResource("deployments"):            true,
	appsv1.SchemeGroupVersion.WithResource("replicasets"):            true,
	appsv1.SchemeGroupVersion.WithResource("daemonsets"):             true,
	appsv1.SchemeGroupVersion.WithResource("statefulsets"):           true,
	appsv1.SchemeGroupVersion.WithResource("controllerrevisions"):    true,
	batchv1.SchemeGroupVersion.WithResource("cronjobs"):              true,
	batchv1.SchemeGroupVersion.WithResource("jobs"):                  true,
	discoveryv1.SchemeGroupVersion.WithResource("endpointslices"):    true,
	networkingv1.SchemeGroupVersion.WithResource("ingresses"):        true,
	resourcev1.SchemeGroupVersion.WithResource("resourceclaims"):     true,
}

func newKinds(cfg Config) (*kinds, error) {
	if cfg.RESTConfig == nil {
		return nil, nil
	}
	config := rest.CopyConfig(cfg.RESTConfig(account("generic-garbage-collector")))
	config.QPS = -1
	objects, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	discover, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("discovery client: %w", err)
	}
	return &kinds{
		full:     cfg.Informers,
		metadata: metadatainformer.NewSharedInformerFactoryWithOptions(objects, 0, metadatainformer.WithTransform(identityOnly)),
		mapper:   restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discover)),
		started:  make(chan struct{}),
	}, nil
}

// identityOnly leaves of an object that is kept for its metadata what its followers ask: who it is, whose it is and
// whether it is going. Who wrote which field of it, and what people noted on it, is most of it.
func identityOnly(object any) (any, error) {
	if m, ok := object.(*metav1.PartialObjectMetadata); ok {
		m.ManagedFields, m.Annotations, m.Labels = nil, nil, nil
	}
	return object, nil
}

// ForResource implements informerfactory.InformerFactory.
func (k *kinds) ForResource(resource schema.GroupVersionResource) (informers.GenericInformer, error) {
	if inFull[resource] {
		return k.full.ForResource(resource)
	}
	return k.metadata.ForResource(resource), nil
}

// Start implements informerfactory.InformerFactory: the collectors call it whenever they learn of a new kind.
func (k *kinds) Start(stop <-chan struct{}) {
	k.full.Start(stop)
	k.metadata.Start(stop)
	k.once.Do(func() { close(k.started) })
}
