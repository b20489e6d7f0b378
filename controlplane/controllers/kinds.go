// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"fmt"
	"slices"
	"sync"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	resourcev1 "k8s.io/api/resource/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
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
	server   informers.SharedInformerFactory // may be nil
	metadata metadatainformer.SharedInformerFactory
	mapper   meta.ResettableRESTMapper
	started  chan struct{}
	once     sync.Once
}

// inFull are kinds that controllers watch in full, or a node beside them, or whose spec quotas count by.
var inFull = resources{
	corev1.GroupName: {
		"configmaps", "endpoints", "namespaces", "nodes", "persistentvolumeclaims", "persistentvolumes", "pods", "replicationcontrollers",
		"resourcequotas", "serviceaccounts", "services",
	},
	appsv1.GroupName:         {"controllerrevisions", "daemonsets", "deployments", "replicasets", "statefulsets"},
	autoscalingv2.GroupName:  {"horizontalpodautoscalers"},
	batchv1.GroupName:        {"cronjobs", "jobs"},
	certificatesv1.GroupName: {"certificatesigningrequests"},
	discoveryv1.GroupName:    {"endpointslices"},
	networkingv1.GroupName:   {"ingresses", "networkpolicies"},
	policyv1.GroupName:       {"poddisruptionbudgets"},
	resourcev1.GroupName:     {"resourceclaims"},
	storagev1.GroupName:      {"csidrivers", "csinodes", "storageclasses", "volumeattachments", "volumeattributesclasses"},
}

// byServer are kinds that the API server watches in full and no controller does.
var byServer = resources{
	corev1.GroupName: {"limitranges", "secrets"},
	admissionv1.GroupName: {
		"mutatingadmissionpolicies", "mutatingadmissionpolicybindings", "mutatingwebhookconfigurations",
		"validatingadmissionpolicies", "validatingadmissionpolicybindings", "validatingwebhookconfigurations",
	},
	coordinationv1.GroupName: {"leases"},
	flowcontrolv1.GroupName:  {"flowschemas", "prioritylevelconfigurations"},
	networkingv1.GroupName:   {"ingressclasses", "ipaddresses", "servicecidrs"},
	nodev1.GroupName:         {"runtimeclasses"},
	rbacv1.GroupName:         {"clusterrolebindings", "clusterroles", "rolebindings", "roles"},
	resourcev1.GroupName:     {"deviceclasses", "resourceslices"},
	schedulingv1.GroupName:   {"priorityclasses"},
}

// resources are names of kinds by API group.
type resources map[string][]string

func (r resources) has(resource schema.GroupVersionResource) bool {
	return slices.Contains(r[resource.Group], resource.Resource)
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
		server:   cfg.ServersInformers,
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
	var factory informers.SharedInformerFactory
	switch {
	case inFull.has(resource):
		factory = k.full
	case k.server != nil && byServer.has(resource):
		factory = k.server
	}
	if factory != nil {
		if informer, err := factory.ForResource(resource); err == nil {
			return informer, nil
		} // a version that the clients do not know
	}
	return k.metadata.ForResource(resource), nil
}

// Start implements informerfactory.InformerFactory: the collectors call it whenever they learn of a new kind.
func (k *kinds) Start(stop <-chan struct{}) {
	k.full.Start(stop)
	if k.server != nil {
		k.server.Start(stop) // what it has that runs already is left alone
	}
	k.metadata.Start(stop)
	k.once.Do(func() { close(k.started) })
}
