// SPDX-License-Identifier: Apache-2.0

// Package sandbox makes what the containers of a pod share: network, IPC and UTS namespaces pinned
// as bind mounts under /run/skep, a user namespace if it wants one, the veth pair with the pod's
// addresses, and the pod's cgroup.
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
	OwnUsers     bool // the pod has a user namespace, to which its other namespaces belong; not with HostNetwork or HostIPC
}

// Sandbox is what exists. Paths are empty where the pod uses the host's namespace.
type Sandbox struct {
	PodUID    types.UID
	Namespace string
	Name      string
	NetNS     string // path of the pinned network namespace
	IPCNS     string
	UTSNS     string
	UserNS    string       // empty unless the pod has user ids of its own
	FirstID   uint32       // of the host, which the pod's user and group 0 are; 0 without UserNS
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
