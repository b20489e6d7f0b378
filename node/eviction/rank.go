// SPDX-License-Identifier: Apache-2.0

package eviction

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/apis/scheduling"
)

// Usage is what a pod uses of a node.
type Usage struct {
	Memory     int64 // bytes of its working set
	Disk       int64 // bytes: writable layers, logs, emptyDir volumes on disk
	Inodes     int64
	Pids       int64
	Containers map[string]ContainerUsage
	EmptyDirs  map[string]int64 // bytes on disk, by volume
}

// ContainerUsage is what one container uses.
type ContainerUsage struct {
	Memory int64 // bytes of its working set
	Disk   int64 // bytes: writable layer and logs
}

// Pod is a pod that may be evicted.
type Pod struct {
	*corev1.Pod
	// Static: it comes from a file of the node.
	Static bool
	Usage  Usage
}

// critical pods are never evicted (kubelet: types.IsCriticalPod).
func (p *Pod) critical() bool {
	return p.Static || p.priority() >= scheduling.SystemCriticalPriority
}

func (p *Pod) priority() int32 {
	if p.Spec.Priority == nil {
		return 0
	}
	return *p.Spec.Priority
}

// excess is by how much the pod uses more than it asked for.
func (p *Pod) excess(name corev1.ResourceName, used int64) int64 {
	asked := resourcehelper.PodRequests(p.Pod, resourcehelper.PodResourcesOptions{})[name]
	return used - asked.Value()
}

// rank sorts pods so that the first is evicted first when the node is short of what the signal says: those that use more
// than they asked for, then those of lower priority, then those by how much they use more. Of processes and inodes
// nobody asks for any.
func rank(pods []*Pod, s Signal) {
	slices.SortStableFunc(pods, func(a, b *Pod) int {
		var over func(p *Pod) int64
		switch s {
		case Memory:
			over = func(p *Pod) int64 { return p.excess(corev1.ResourceMemory, p.Usage.Memory) }
		case Disk:
			over = func(p *Pod) int64 { return p.excess(corev1.ResourceEphemeralStorage, p.Usage.Disk) }
		case Inodes:
			over = func(p *Pod) int64 { return p.Usage.Inodes }
		default:
			over = func(p *Pod) int64 { return p.Usage.Pids }
		}
		x, y := over(a), over(b)
		exceeds := 0
		if (s == Memory || s == Disk) && (x > 0) != (y > 0) {
			exceeds = 1
			if x > 0 {
				exceeds = -1
			}
		}
		return cmp.Or(exceeds, cmp.Compare(a.priority(), b.priority()), cmp.Compare(y, x))
	})
}

// Eviction is a pod to end, and what its status and event say.
type Eviction struct {
	Pod     types.UID
	Message string
}

// message says why a pod goes when the node is short of something.
func message(p *Pod, s Signal, threshold, available int64) string {
	var b strings.Builder
	name := about[s].resource
	fmt.Fprintf(&b, "The node was low on resource: %s. Threshold quantity: %s, available: %s. ", name, show(s, threshold), show(s, available))
	if s != Memory && s != Disk {
		return b.String()
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		u, ok := p.Usage.Containers[c.Name]
		if !ok {
			continue
		}
		used := u.Memory
		if s == Disk {
			used = u.Disk
		}
		asked := c.Resources.Requests[name]
		if used > asked.Value() {
			fmt.Fprintf(&b, "Container %s was using %s, request is %s, has larger consumption of %s. ", c.Name, show(s, used), asked.String(), name)
		}
	}
	return b.String()
}

func show(s Signal, n int64) string {
	format := resource.BinarySI
	if s == Inodes || s == Pids {
		format = resource.DecimalSI
	}
	return resource.NewQuantity(n, format).String()
}

// OverLimit says why a pod must go for what it has on disk; empty if it need not. Limits are those of emptyDir
// volumes, of the pod, and of containers, in that order.
func OverLimit(p *Pod) string {
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if v.EmptyDir == nil || v.EmptyDir.SizeLimit == nil || v.EmptyDir.SizeLimit.Sign() <= 0 || v.EmptyDir.Medium == corev1.StorageMediumMemory {
			continue
		}
		if p.Usage.EmptyDirs[v.Name] > v.EmptyDir.SizeLimit.Value() {
			return fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q. ", v.Name, v.EmptyDir.SizeLimit.String())
		}
	}
	limits := resourcehelper.PodLimits(p.Pod, resourcehelper.PodResourcesOptions{})
	if q, ok := limits[corev1.ResourceEphemeralStorage]; ok && p.Usage.Disk > q.Value() {
		return fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s. ", q.String())
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if q, ok := c.Resources.Limits[corev1.ResourceEphemeralStorage]; ok && p.Usage.Containers[c.Name].Disk > q.Value() {
			return fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q. ", c.Name, q.String())
		}
	}
	return ""
}

// Limited reports whether anything bounds what the pod may have on disk.
func Limited(p *corev1.Pod) bool {
	for i := range p.Spec.Volumes {
		if e := p.Spec.Volumes[i].EmptyDir; e != nil && e.SizeLimit != nil && e.Medium != corev1.StorageMediumMemory {
			return true
		}
	}
	_, ok := resourcehelper.PodLimits(p, resourcehelper.PodResourcesOptions{})[corev1.ResourceEphemeralStorage]
	return ok
}
