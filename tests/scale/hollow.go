// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	leaseEvery = 10 * time.Second // as the agent does
	leaseLife  = 40 * time.Second
	retryAfter = time.Second
	maxPods    = 110
)

// hollow is one node.
type hollow struct {
	name   string
	client kubernetes.Interface
	addr   netip.Addr // of the next pod
	failed *failures
}

// followed are what every agent watches of the whole cluster.
var followed = []struct {
	of       func(kubernetes.Interface) rest.Interface
	resource string
}{
	{func(c kubernetes.Interface) rest.Interface { return c.CoreV1().RESTClient() }, "services"},
	{func(c kubernetes.Interface) rest.Interface { return c.CoreV1().RESTClient() }, "nodes"},
	{func(c kubernetes.Interface) rest.Interface { return c.DiscoveryV1().RESTClient() }, "endpointslices"},
	{func(c kubernetes.Interface) rest.Interface { return c.NetworkingV1().RESTClient() }, "ingresses"},
}

// run is a node's life, until ctx ends. ready is called when its Node is there.
func (h *hollow) run(ctx context.Context, ready func()) error {
	if err := h.register(ctx); err != nil {
		return err
	}
	ready()
	for _, f := range followed {
		go h.follow(ctx, f.of(h.client), f.resource)
	}
	go h.renewLease(ctx)
	return h.followPods(ctx)
}

func (h *hollow) register(ctx context.Context) error {
	capacity := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("32"), corev1.ResourceMemory: resource.MustParse("128Gi"), corev1.ResourcePods: *resource.NewQuantity(maxPods, resource.DecimalSI),
	}
	now := metav1.Now()
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: h.name, Labels: map[string]string{corev1.LabelHostname: h.name, corev1.LabelOSStable: "linux"}},
		Status: corev1.NodeStatus{
			Capacity: capacity, Allocatable: capacity,
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Hollow", LastHeartbeatTime: now, LastTransitionTime: now}},
		},
	}
	made, err := h.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("register node %s: %w", h.name, err)
	}
	made.Status = node.Status
	if _, err := h.client.CoreV1().Nodes().UpdateStatus(ctx, made, metav1.UpdateOptions{}); err != nil && !apierrors.IsConflict(err) {
		return fmt.Errorf("register node %s: %w", h.name, err)
	} else if err == nil {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"status": node.Status})
	if err != nil {
		return err
	}
	_, err = h.client.CoreV1().Nodes().Patch(ctx, h.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// follow reads a watch as long as the node lives, and does nothing with it: what that costs is the server's.
func (h *hollow) follow(ctx context.Context, client rest.Interface, resource string) {
	for ctx.Err() == nil {
		stream, err := client.Get().Resource(resource).VersionedParams(&metav1.ListOptions{Watch: true}, metav1.ParameterCodec).Stream(ctx)
		if err == nil {
			_, err = io.Copy(io.Discard, stream)
			_ = stream.Close() // it has been read
		}
		h.pause(ctx, "follow "+resource, err)
	}
}

func (h *hollow) pause(ctx context.Context, doing string, err error) {
	if ctx.Err() == nil {
		h.failed.add(doing, err)
	}
	select {
	case <-ctx.Done():
	case <-time.After(retryAfter):
	}
}

func (h *hollow) renewLease(ctx context.Context) {
	leases := h.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	seconds := int32(leaseLife.Seconds())
	var lease *coordinationv1.Lease
	for ctx.Err() == nil {
		now, err := metav1.NowMicro(), error(nil)
		if lease == nil {
			lease, err = leases.Create(ctx, &coordinationv1.Lease{
				ObjectMeta: metav1.ObjectMeta{Name: h.name},
				Spec:       coordinationv1.LeaseSpec{HolderIdentity: &h.name, LeaseDurationSeconds: &seconds, RenewTime: &now},
			}, metav1.CreateOptions{})
		} else {
			lease.Spec.RenewTime = &now
			lease, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
		}
		if err != nil {
			lease = nil
			if have, getErr := leases.Get(ctx, h.name, metav1.GetOptions{}); getErr == nil {
				lease = have
			}
			h.pause(ctx, "renew a lease", err)
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(leaseEvery):
		}
	}
}

// followPods does for the node's pods what an agent does, as far as the API sees it.
func (h *hollow) followPods(ctx context.Context) error {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", h.name).String()}
	for ctx.Err() == nil {
		w, err := h.client.CoreV1().Pods("").Watch(ctx, options) // without a version: begins with what there is
		if err != nil {
			h.pause(ctx, "follow a node's pods", err)
			continue
		}
		for e := range w.ResultChan() {
			pod, ok := e.Object.(*corev1.Pod)
			if !ok || e.Type == watch.Deleted {
				continue
			}
			if err := h.sync(ctx, pod); ctx.Err() == nil {
				h.failed.add("take a pod on", err)
			}
		}
		w.Stop()
	}
	return nil
}

// sync takes a pod one step on.
func (h *hollow) sync(ctx context.Context, pod *corev1.Pod) error {
	pods := h.client.CoreV1().Pods(pod.Namespace)
	switch {
	case pod.DeletionTimestamp != nil:
		now := int64(0)
		err := pods.Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil // it is gone
		}
		return err
	case pod.Status.Phase != corev1.PodPending:
		return nil
	}
	patch, err := json.Marshal(map[string]any{"status": h.running(pod)})
	if err != nil {
		return err
	}
	_, err = pods.Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func (h *hollow) running(pod *corev1.Pod) corev1.PodStatus {
	now := metav1.Now()
	h.addr = h.addr.Next()
	status := corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &now, PodIP: h.addr.String(), PodIPs: []corev1.PodIP{{IP: h.addr.String()}}}
	for _, kind := range []corev1.PodConditionType{corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
		status.Conditions = append(status.Conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	started := true
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		status.ContainerStatuses = append(status.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Image: c.Image, ImageID: "hollow", ContainerID: "hollow://" + string(pod.UID), Ready: true, Started: &started,
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		})
	}
	return status
}
