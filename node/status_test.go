// SPDX-License-Identifier: Apache-2.0

package node

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// TestExtendedResources lets somebody say what a node has, and take it back.
func TestExtendedResources(t *testing.T) {
	const fpga corev1.ResourceName = "example.com/fpga"
	host := &hostFacts{cpus: 4000, memory: 8 << 30, storage: 100 << 30}
	was := nodeStatus(corev1.NodeStatus{}, facts{host: host, maxPods: 110})
	was.Capacity[fpga] = resource.MustParse("4")
	was.Capacity["hugepages-1Gi"] = resource.MustParse("4Gi") // the host's own, of which it has none any more
	now := nodeStatus(was, facts{host: host, maxPods: 110})
	for what, list := range map[string]corev1.ResourceList{"capacity": now.Capacity, "allocatable": now.Allocatable} {
		if q := list[fpga]; q.Value() != 4 {
			t.Errorf("%s: got %s of %s", what, q.String(), fpga)
		}
		if q, ok := list["hugepages-1Gi"]; ok {
			t.Errorf("%s: kept %s of huge pages", what, q.String())
		}
	}
	delete(now.Capacity, fpga)
	after := nodeStatus(now, facts{host: host, maxPods: 110})
	if q, ok := after.Allocatable[fpga]; ok {
		t.Errorf("still allocatable: %s", q.String())
	}
}
