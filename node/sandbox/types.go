// SPDX-License-Identifier: Apache-2.0

// Package sandbox makes what the containers of a pod share: network, IPC and UTS namespaces pinned
// as bind mounts under /run/skep, the veth pair with the pod's addresses, and the pod's cgroup.
// There is no pause process.
package sandbox

import (
	"context"
	"net/netip"

	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane"
	"skep.io/skep/node/sandbox/cgroup"
)

// Spec says what the sandbox of one pod must be.
type Spec struct {
	PodUID       types.UID
	Namespace    string
	Name         string
	Hostname     string // as the UTS namespace shows it; empty with HostNetwork
	HostNetwork  bool
	HostIPC      bool
	CgroupParent string        // the pod's cgroup, relative to each hierarchy's root; empty for none
	CgroupLimits cgroup.Limits // of the pod's cgroup as a whole
	Sysctls      map[string]string
}

// Sandbox is what exists. Paths are empty where the pod uses the host's namespace.
type Sandbox struct {
	PodUID    types.UID
	Namespace string
	Name      string
	NetNS     string // path of the pinned network namespace
	IPCNS     string
	UTSNS     string
	ShmPath   string       // the pod's own /dev/shm, which belongs to its IPC namespace
	Addrs     []netip.Addr // one a family, IPv4 first
	Endpoint  dataplane.Endpoint
}

// Network attaches pods to the node's data plane. *dataplane.Dataplane implements it.
type Network interface {
	AttachEndpoint(ctx context.Context, e dataplane.Endpoint) error
	DetachEndpoint(ctx context.Context, e dataplane.Endpoint) error
	PruneEndpoints(ctx context.Context, keep []dataplane.Endpoint) error
}
