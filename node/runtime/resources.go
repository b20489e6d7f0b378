// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
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
