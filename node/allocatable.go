// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"skep.io/skep/node/eviction"
	"skep.io/skep/node/pods"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

// Reserved is what a node keeps from pods, as kubelet's flags --kube-reserved and --system-reserved have it
// (https://kubernetes.io/docs/tasks/administer-cluster/reserve-compute-resources/).
type Reserved corev1.ResourceList

// pids is the name of process numbers among what is reserved.
const pids corev1.ResourceName = "pid"

// reservable are the names that ParseReserved takes.
var reservable = []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage, pids}

// ParseReserved reads NAME=QUANTITY of cpu, memory, ephemeral-storage and pid, separated by commas.
func ParseReserved(text string) (Reserved, error) {
	out := Reserved{}
	pairs, err := eviction.Pairs(text, "=", "NAME=QUANTITY")
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		name, value := p.Name, p.Value
		if !slices.Contains(reservable, corev1.ResourceName(name)) {
			return nil, fmt.Errorf("%q cannot be reserved: use cpu, memory, ephemeral-storage or pid", name)
		}
		q, err := resource.ParseQuantity(value)
		if err != nil || q.Sign() < 0 {
			return nil, fmt.Errorf("%s: %q is not a quantity", name, value)
		}
		out[corev1.ResourceName(name)] = q
	}
	return out, nil
}

// kept is what pods do not get: reserved is never theirs, hard is what eviction keeps free beyond that.
type kept struct {
	reserved map[corev1.ResourceName]int64 // thousandths of processors; bytes; processes
	memory   int64                         // bytes
	storage  int64                         // bytes
}

// keep notes what pods do not get. It is an error if nothing is left for them.
func (h *hostFacts) keep(kube, system Reserved, hard map[eviction.Signal]eviction.Threshold) error {
	h.kept = kept{reserved: map[corev1.ResourceName]int64{}, memory: hard[eviction.Memory].Of(h.memory), storage: hard[eviction.Disk].Of(h.storage)}
	for _, r := range []Reserved{kube, system} {
		for name, q := range r {
			n := q.Value()
			if name == corev1.ResourceCPU {
				n = q.MilliValue()
			}
			h.kept.reserved[name] += n
		}
	}
	for name, has := range map[corev1.ResourceName]int64{
		corev1.ResourceCPU: h.cpus, corev1.ResourceMemory: h.memory - h.kept.memory, corev1.ResourceEphemeralStorage: h.storage - h.kept.storage, pids: h.pids,
	} {
		if n := h.kept.reserved[name]; n > 0 && n >= has {
			return fmt.Errorf("--kube-reserved and --system-reserved leave no %s for pods: %d of %d, what --eviction-hard keeps free not counted", name, n, has)
		}
	}
	return nil
}

// allocatable is what pods may ask for.
func (h *hostFacts) allocatable(maxPods int) corev1.ResourceList {
	l := h.capacity(maxPods)
	huge := int64(0)
	for _, n := range h.huge {
		huge += n
	}
	r := h.kept.reserved
	l[corev1.ResourceCPU] = *resource.NewMilliQuantity(max(h.cpus-r[corev1.ResourceCPU], 0), resource.DecimalSI)
	l[corev1.ResourceMemory] = *resource.NewQuantity(max(h.memory-r[corev1.ResourceMemory]-h.kept.memory-huge, 0), resource.BinarySI)
	l[corev1.ResourceEphemeralStorage] = *resource.NewQuantity(max(h.storage-r[corev1.ResourceEphemeralStorage]-h.kept.storage, 0), resource.BinarySI)
	return l
}

// podsLimits bounds all pods together: what is reserved stays out of their reach whatever they do. What eviction keeps
// free is within it, or the kernel would end processes before eviction sees the shortage.
func (h *hostFacts) podsLimits() cgroup.Limits {
	r := h.kept.reserved
	return cgroup.Limits{
		CPUShares:   runtime.Shares(h.cpus - r[corev1.ResourceCPU]),
		MemoryBytes: h.memory - r[corev1.ResourceMemory],
		Pids:        max(h.pids-r[pids], 0),
	}
}

// podPids is how many processes and threads one pod may have; 0 for no limit of its own. Without an order it is a
// quarter of what all may have, so that no single pod keeps the others from starting processes.
func (h *hostFacts) podPids(wanted int64) int64 {
	switch {
	case wanted < 0:
		return 0
	case wanted > 0:
		return wanted
	default:
		return h.podsLimits().Pids / 4
	}
}

// mostPids is how many processes and threads the kernel lets there be; 0 if that is not known.
func mostPids() int64 {
	ids, threads := number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")
	if ids == 0 || threads == 0 {
		return max(ids, threads)
	}
	return min(ids, threads)
}

// weighBurstable gives pods that ask for less than they may use a weight of their own, between those that have what they
// ask for and those that ask for nothing.
func weighBurstable(shares uint64) error {
	group := pods.CgroupRoot + "/burstable"
	if err := cgroup.Create(group); err != nil {
		return err
	}
	return cgroup.Set(group, cgroup.Limits{CPUShares: shares})
}

// limitPods bounds the cgroup of all pods. Where they use more memory than that already, it stays as it is.
func (a *Agent) limitPods() error {
	limits := a.host.podsLimits()
	if err := cgroup.Create(pods.CgroupRoot); err != nil {
		return err
	}
	if err := cgroup.CheckMemory(pods.CgroupRoot, limits.MemoryBytes); err != nil {
		return fmt.Errorf("pods use more memory than --kube-reserved and --system-reserved leave them: %w", err)
	}
	if err := cgroup.Set(pods.CgroupRoot, limits); err != nil {
		return err
	}
	// Pods that ask for nothing come last (kubelet: qos_container_manager_linux.go).
	leftovers := pods.CgroupRoot + "/besteffort"
	if err := cgroup.Create(leftovers); err != nil {
		return err
	}
	return cgroup.Set(leftovers, cgroup.Limits{CPUShares: runtime.Shares(0)})
}
