// SPDX-License-Identifier: Apache-2.0

// Package dataplane owns what the kernel programs of this node read and say.
package dataplane

import (
	"net"
	"net/netip"

	"k8s.io/apimachinery/pkg/types"
)

// Endpoint is one pod's attachment to this node's network.
type Endpoint struct {
	PodUID    types.UID
	Namespace string
	Name      string
	Addrs     []netip.Addr     // one a family, IPv4 first
	Ifindex   int              // of the veth's end in the node's namespace
	PodMAC    net.HardwareAddr // of the pod's end
	HostMAC   net.HardwareAddr // of the node's end
}
