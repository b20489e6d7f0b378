// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
)

// cluster is what informers know. Before they are started it is empty.
type cluster struct {
	pods       corelisters.PodLister
	namespaces corelisters.NamespaceLister
}

func (c *cluster) Pod(name types.NamespacedName) *Pod {
	if c.pods == nil {
		return nil
	}
	pod, err := c.pods.Pods(name.Namespace).Get(name.Name)
	if err != nil {
		return nil // only that it is not there
	}
	return PodOf(pod)
}

func (c *cluster) Pods(namespace string) (out []*Pod) {
	if c.pods == nil {
		return nil
	}
	all, err := c.pods.Pods(namespace).List(labels.Everything())
	if err != nil {
		return nil // a selector that matches everything cannot be wrong
	}
	for _, pod := range all {
		out = append(out, PodOf(pod))
	}
	return out
}

func (c *cluster) Namespace(name string) labels.Set {
	if c.namespaces == nil {
		return nil
	}
	ns, err := c.namespaces.Get(name)
	if err != nil {
		return nil
	}
	return ns.Labels
}
