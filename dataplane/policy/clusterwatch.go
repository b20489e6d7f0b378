// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"skep.io/skep/api/clusterpolicy"
)

var definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// clusterPolicies follows ClusterNetworkPolicies once they are defined. Whether they are is asked of the definition
// itself: that the API does not serve the resource may only mean that it has just started, and then nobody knows
// yet what is denied.
type clusterPolicies struct {
	client     dynamic.Interface
	definition cache.SharedIndexInformer
	policies   cache.SharedIndexInformer // nil until they are defined
}

func newClusterPolicies(client dynamic.Interface) *clusterPolicies {
	only := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, clusterpolicy.DefinitionName).String()
	}
	return &clusterPolicies{
		client:     client,
		definition: dynamicinformer.NewFilteredDynamicInformer(client, definitions, metav1.NamespaceAll, 0, cache.Indexers{}, only).Informer(),
	}
}

// start waits until it is known whether ClusterNetworkPolicies are defined, and then for those.
func (p *clusterPolicies) start(ctx context.Context, defined, changed cache.ResourceEventHandler) error {
	registration, err := p.definition.AddEventHandler(defined)
	if err != nil {
		return fmt.Errorf("watching the definition of ClusterNetworkPolicies: %w", err)
	}
	go p.definition.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return ctx.Err()
	}
	return p.watch(ctx, changed)
}

// watch follows the policies if they are defined and are not followed yet.
func (p *clusterPolicies) watch(ctx context.Context, changed cache.ResourceEventHandler) error {
	if p.policies != nil {
		return nil
	}
	// Its informer would pause for a second if it asked before the API serves the resource.
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		if len(p.definition.GetStore().ListKeys()) == 0 {
			return nil
		}
		if _, err := p.client.Resource(clusterpolicy.Resource).List(ctx, metav1.ListOptions{Limit: 1}); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(delay):
		}
	}
	informer := dynamicinformer.NewFilteredDynamicInformer(p.client, clusterpolicy.Resource, metav1.NamespaceAll, 0, cache.Indexers{}, nil).Informer()
	registration, err := informer.AddEventHandler(changed)
	if err != nil {
		return fmt.Errorf("watching ClusterNetworkPolicies: %w", err)
	}
	go informer.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return ctx.Err()
	}
	p.policies = informer
	return nil
}

// get is nil if there is no such policy.
func (p *clusterPolicies) get(name string) (*v1beta1.ClusterNetworkPolicy, error) {
	if p == nil || p.policies == nil {
		return nil, nil
	}
	o, found, err := p.policies.GetStore().GetByKey(name)
	if err != nil || !found {
		return nil, err
	}
	return clusterPolicyOf(o)
}

func (p *clusterPolicies) list() (out []*v1beta1.ClusterNetworkPolicy, err error) {
	if p == nil || p.policies == nil {
		return nil, nil
	}
	for _, o := range p.policies.GetStore().List() {
		one, err := clusterPolicyOf(o)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

func clusterPolicyOf(o any) (*v1beta1.ClusterNetworkPolicy, error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil, fmt.Errorf("a cache of ClusterNetworkPolicies holds %T", o)
	}
	out := &v1beta1.ClusterNetworkPolicy{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, out); err != nil {
		return nil, fmt.Errorf("ClusterNetworkPolicy %s: %w", u.GetName(), err)
	}
	return out, nil
}
