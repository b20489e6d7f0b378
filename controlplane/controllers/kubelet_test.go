// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	daemonutil "k8s.io/kubernetes/pkg/controller/daemon/util"
)

// kubelet plays scheduler and kubelet of one node: it binds every pod, to node unless the pod names another, reports
// it ready, and ends it when it is deleted.
func (c *cluster) kubelet(node string) {
	c.Helper()
	ctx := c.Context()
	watchPods := func() (watch.Interface, error) {
		return c.client.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{})
	}
	pods, err := watchPods()
	if err != nil {
		c.Fatal(err)
	}
	var next atomic.Int32
	handle := func(event watch.Event) {
		pod, ok := event.Object.(*corev1.Pod)
		if !ok || event.Type == watch.Deleted {
			return
		}
		if err := c.step(ctx, node, pod, &next); err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			c.Errorf("kubelet: pod %s/%s: %v", pod.Namespace, pod.Name, err)
		}
	}
	go func() {
		for ctx.Err() == nil {
			for event := range pods.ResultChan() {
				handle(event)
			}
			// The server ends the watch of who falls behind, as this does on a busy machine; the next begins with all pods.
			if pods, err = watchPods(); err != nil {
				if ctx.Err() == nil {
					c.Errorf("kubelet: %v", err)
				}
				return
			}
		}
	}()
}

func (c *cluster) step(ctx context.Context, node string, pod *corev1.Pod, next *atomic.Int32) error {
	client := c.client.CoreV1().Pods(pod.Namespace)
	switch {
	case pod.DeletionTimestamp != nil:
		return client.Delete(ctx, pod.Name, *metav1.NewDeleteOptions(0))
	case len(pod.Spec.SchedulingGates) > 0:
		return nil
	case pod.Spec.NodeName == "":
		if target, err := daemonutil.GetTargetNodeName(pod); err == nil {
			node = target
		}
		return client.Bind(ctx, &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
			Target:     corev1.ObjectReference{Kind: "Node", Name: node},
		}, metav1.CreateOptions{})
	case pod.Status.PodIP == "":
		n := next.Add(1)
		ready := pod.DeepCopy()
		ready.Status.Phase = corev1.PodRunning
		ready.Status.PodIP = fmt.Sprintf("10.42.0.%d", n%250+2)
		ready.Status.PodIPs = []corev1.PodIP{{IP: ready.Status.PodIP}, {IP: fmt.Sprintf("fd73:6b65:7042::%x", n+1)}}
		ready.Status.Conditions = append(ready.Status.Conditions, corev1.PodCondition{
			Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now(),
		})
		_, err := client.UpdateStatus(ctx, ready, metav1.UpdateOptions{})
		return err
	}
	return nil
}
