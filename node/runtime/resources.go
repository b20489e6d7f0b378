// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"fmt"
	"strings"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"skep.io/skep/node/sandbox/cgroup"
)

const (
	cpuPeriod   = 100_000 // µs
	minQuota    = 1_000   // µs, the kernel's least
	minShares   = 2
	maxShares   = 262_144
	hugePrefix  = "hugepages-"
	milliPerCPU = 1000
)

// resources turns requests and limits into cgroup settings, by kubelet's arithmetic.
func resources(r corev1.ResourceRequirements, host hostFacts) *specs.LinuxResources {
	request, asked := r.Requests[corev1.ResourceCPU]
	limit, limited := r.Limits[corev1.ResourceCPU]
	if !asked && limited {
		request = limit
	}
	period := uint64(cpuPeriod)
	shares := Shares(request.MilliValue())
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}}
	if limited && limit.MilliValue() > 0 {
		quota := Quota(limit.MilliValue())
		out.CPU.Quota, out.CPU.Period = &quota, &period
	}
	if memory := r.Limits[corev1.ResourceMemory]; memory.Value() > 0 {
		bytes := memory.Value()
		out.Memory = &specs.LinuxMemory{Limit: &bytes}
		if host.unified && host.swapLimit {
			// Equal to the limit: no swap. Version 1 counts it only where the kernel was told to.
			out.Memory.Swap = &bytes
		}
	}
	if host.hugetlb {
		for name, quantity := range r.Limits {
			size, ok := strings.CutPrefix(string(name), hugePrefix)
			if !ok {
				continue
			}
			parsed, err := resource.ParseQuantity(size)
			if err != nil {
				continue
			}
			out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{
				Pagesize: pageSize(parsed.Value()), Limit: uint64(quantity.Value()),
			})
		}
	}
	return out
}

// Shares converts thousandths of a CPU to cgroup version 1's weight.
func Shares(milli int64) uint64 {
	shares := milli * 1024 / milliPerCPU
	return uint64(min(max(shares, minShares), maxShares))
}

// Quota converts thousandths of a CPU to µs of processor time per 100 ms.
func Quota(milli int64) int64 {
	return max(milli*cpuPeriod/milliPerCPU, minQuota)
}

// pageSize writes a size as the kernel's hugetlb files are named: 2MB, 1GB.
func pageSize(bytes int64) string {
	units := []string{"B", "KB", "MB", "GB", "TB"}
	i := 0
	for bytes >= 1024 && i < len(units)-1 {
		bytes /= 1024
		i++
	}
	return resource.NewQuantity(bytes, resource.DecimalSI).String() + units[i]
}

// Update implements Containers. The kernel would end processes of a container whose limit falls below what it uses: that
// is refused.
func (r *Runtime) Update(ctx context.Context, id string, wanted corev1.ResourceRequirements) error {
	ctx = r.in(ctx)
	c, err := r.find(id)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	s := c.state()
	if s.State != Running {
		return fmt.Errorf("container %s of pod %s/%s: %w", c.def.Name, c.def.PodNamespace, c.def.PodName, ErrNotRunning)
	}
	if err := cgroup.CheckMemory(c.def.Cgroup, wanted.Limits.Memory().Value()); err != nil {
		return fmt.Errorf("container %s of pod %s/%s: %w", c.def.Name, c.def.PodNamespace, c.def.PodName, err)
	}
	out := resources(wanted, r.host)
	out.HugepageLimits = nil // they do not change
	encoded, err := typeurl.MarshalAnyToProto(out)
	if err != nil {
		return err
	}
	if _, err := r.client.TaskService().Update(ctx, &tasksapi.UpdateTaskRequest{ContainerID: id, Resources: encoded}); err != nil {
		return fmt.Errorf("resources of container %s of pod %s/%s: %w", c.def.Name, c.def.PodNamespace, c.def.PodName, errgrpc.ToNative(err))
	}
	s.Resources = wanted.DeepCopy()
	r.save(c, s)
	return nil
}
