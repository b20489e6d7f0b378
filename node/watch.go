// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/node/pods"
)

// watchPods follows the pods that are bound to this node, and only those.
func (a *Agent) watchPods(ctx context.Context, set *pods.Set) error {
	selector := fields.OneTermEqualSelector("spec.nodeName", a.cfg.NodeName).String()
	client := a.cfg.Client.CoreV1().Pods(corev1.NamespaceAll)
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			o.FieldSelector = selector
			return client.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return client.Watch(ctx, o)
		},
	}
	mine := func(pod *corev1.Pod) bool { return pod.Spec.NodeName == a.cfg.NodeName }
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: lw, ObjectType: &corev1.Pod{}, Transform: dropManagedFields,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc: func(o any) {
				if pod, ok := o.(*corev1.Pod); ok && mine(pod) {
					set.Update(pod)
				}
			},
			UpdateFunc: func(old, o any) {
				before, ok1 := old.(*corev1.Pod)
				pod, ok2 := o.(*corev1.Pod)
				if !ok1 || !ok2 || !mine(pod) {
					return
				}
				if before.UID != pod.UID {
					set.Delete(before) // it was deleted and made anew while the watch was broken
				}
				set.Update(pod)
			},
			DeleteFunc: func(o any) {
				if t, ok := o.(cache.DeletedFinalStateUnknown); ok {
					o = t.Obj
				}
				if pod, ok := o.(*corev1.Pod); ok && mine(pod) {
					set.Delete(pod)
				}
			},
		},
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		informer.RunWithContext(ctx)
	}()
	select {
	case <-informer.HasSyncedChecker().Done():
		// Only now is it known which pods exist: what is left belongs to nobody.
		if err := set.Prune(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("remove what belongs to no pod", "error", err)
		}
	case <-ctx.Done():
	}
	<-done
	return nil
}

// dropManagedFields frees what nobody here reads.
func dropManagedFields(o any) (any, error) {
	if m, ok := o.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return o, nil
}

// watchNode follows the node's own object: the control plane puts the pod ranges there.
func (a *Agent) watchNode(ctx context.Context) error {
	selector := fields.OneTermEqualSelector("metadata.name", a.cfg.NodeName).String()
	client := a.cfg.Client.CoreV1().Nodes()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			o.FieldSelector = selector
			return client.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return client.Watch(ctx, o)
		},
	}
	nodes := make(chan *corev1.Node, 1)
	latest := func(o any) {
		node, ok := o.(*corev1.Node)
		if !ok || node.Name != a.cfg.NodeName {
			return
		}
		select { // only the newest counts
		case <-nodes:
		default:
		}
		nodes <- node
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: lw, ObjectType: &corev1.Node{}, Transform: dropManagedFields,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc: latest, UpdateFunc: func(_, o any) { latest(o) },
			DeleteFunc: func(any) { a.status.deleted() },
		},
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		informer.RunWithContext(ctx)
	}()
	defer func() { <-done }()
	for {
		select {
		case node := <-nodes:
			a.status.seen(node)
			if err := a.configure(ctx, node); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				a.status.network(err)
				a.log.Error("configure the pod network", "error", err)
				retry := time.AfterFunc(5*time.Second, func() {
					select {
					case nodes <- node:
					default:
					}
				})
				defer retry.Stop()
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// configure gives the data plane and the sandboxes the node's pod ranges, once they are known and when they change.
func (a *Agent) configure(ctx context.Context, node *corev1.Node) error {
	list := node.Spec.PodCIDRs
	if len(list) == 0 && node.Spec.PodCIDR != "" {
		list = []string{node.Spec.PodCIDR}
	}
	if len(list) == 0 {
		return nil
	}
	ranges := make([]netip.Prefix, 0, len(list))
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("node %s: pod range: %w", node.Name, err)
		}
		ranges = append(ranges, p)
	}
	// Pods show their IPv4 address first only if the node does: the order is the control plane's.
	if slices.Equal(ranges, a.PodCIDRs()) {
		return nil
	}
	if a.cfg.Network != nil {
		if err := a.cfg.Network.ConfigureNode(ctx, ranges); err != nil {
			return fmt.Errorf("configure the node for %v: %w", ranges, err)
		}
	}
	a.podCIDRs.Store(&ranges)
	a.log.Info("pod network is ready", "ranges", ranges)
	a.status.network(nil)
	if set := a.set.Load(); set != nil {
		set.NetworkReady()
	}
	return nil
}
