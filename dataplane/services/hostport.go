// SPDX-License-Identifier: Apache-2.0

package services

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/dataplane/maps"
)

// HostPorts says what the ports that a pod of this node has on its node need: a frontend each, under
// the address that the pod names, or under all of the node's. They lead to the pod alone whether or
// not it is ready, and what comes from outside keeps its source address. It is pure.
func HostPorts(pod *corev1.Pod) []Set {
	if pod.Spec.HostNetwork || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil
	}
	var out []Set
	for _, p := range podPorts(pod) {
		proto := uint8(maps.TCP)
		switch protocol(p.Protocol) {
		case corev1.ProtocolTCP:
		case corev1.ProtocolUDP:
			proto = maps.UDP
		default:
			continue
		}
		for _, ip := range pod.Status.PodIPs {
			addr, err := netip.ParseAddr(ip.IP)
			if err != nil {
				continue
			}
			on, ok := hostAddress(p.HostIP, addr)
			if !ok {
				continue
			}
			set := Set{
				Name:     fmt.Sprintf("pod %s/%s %s:%d/%s", pod.Namespace, pod.Name, on, p.HostPort, protocol(p.Protocol)),
				Proto:    proto,
				Flags:    maps.ServiceLocal,
				Backends: []netip.AddrPort{netip.AddrPortFrom(addr, uint16(p.ContainerPort))},
			}
			for _, scope := range []uint8{maps.ScopeInternal, maps.ScopeExternal} {
				set.Frontends = append(set.Frontends, Frontend{Addr: on, Port: uint16(p.HostPort), Proto: proto, Scope: scope})
			}
			out = append(out, set)
		}
	}
	return out
}

// podPorts are those with a port on the host, of containers and of sidecars.
func podPorts(pod *corev1.Pod) []corev1.ContainerPort {
	var out []corev1.ContainerPort
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if p.HostPort > 0 {
				out = append(out, p)
			}
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	return out
}

// hostAddress is where on the node a port is that a pod with this address asks for at hostIP. An
// unspecified hostIP means every address of both families, as a listening socket's would.
func hostAddress(hostIP string, pod netip.Addr) (netip.Addr, bool) {
	any := netip.IPv4Unspecified()
	if pod.Is6() {
		any = netip.IPv6Unspecified()
	}
	if hostIP == "" {
		return any, true
	}
	on, err := netip.ParseAddr(hostIP)
	if err != nil {
		return on, false
	}
	if on.IsUnspecified() && on.Is6() {
		return any, true
	}
	return on.Unmap(), on.Unmap().Is4() == pod.Is4()
}

// hasHostPorts says whether HostPorts may give anything, now or once the pod has an address.
func hasHostPorts(pod *corev1.Pod) bool {
	return !pod.Spec.HostNetwork && len(podPorts(pod)) > 0
}
