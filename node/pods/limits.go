// SPDX-License-Identifier: Apache-2.0

package pods

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"skep.io/skep/node/sandbox/cgroup"
)

// What cgroups take (kubelet: cm/helpers_linux.go).
const (
	minShares   = 2
	maxShares   = 262144
	cpuPeriod   = 100_000 // µs
	minCPUQuota = 1_000   // µs
)

// podLimits bounds the pod's cgroup as a whole. A limit of the pod is only known where each container has one. pids is
// how many processes and threads any pod may have; 0 for no limit.
func podLimits(pod *corev1.Pod, pids int64) cgroup.Limits {
	requests := resource.PodRequests(pod, resource.PodResourcesOptions{})
	limits := resource.PodLimits(pod, resource.PodResourcesOptions{})
	l := cgroup.Limits{CPUShares: minShares, Pids: pids}
	class := qos.GetPodQOS(pod)
	if class == corev1.PodQOSBestEffort {
		return l
	}
	l.CPUShares = shares(requests.Cpu().MilliValue())
	if declared(pod, corev1.ResourceCPU) {
		l.CPUPeriod, l.CPUQuota = cpuPeriod, max(limits.Cpu().MilliValue()*cpuPeriod/1000, minCPUQuota)
	}
	if declared(pod, corev1.ResourceMemory) {
		l.MemoryBytes = limits.Memory().Value()
	}
	return l
}

// shares is a weight in cgroup version 1's units.
func shares(milliCPU int64) uint64 {
	return uint64(min(max(milliCPU*1024/1000, minShares), maxShares))
}

// declared reports whether the pod, or each of its containers, has a limit of that resource.
func declared(pod *corev1.Pod, name corev1.ResourceName) bool {
	if r := pod.Spec.Resources; r != nil {
		if q, ok := r.Limits[name]; ok && !q.IsZero() {
			return true
		}
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if q, ok := list[i].Resources.Limits[name]; !ok || q.IsZero() {
				return false
			}
		}
	}
	return true
}
