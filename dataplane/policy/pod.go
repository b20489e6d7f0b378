// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// Pod is what policies can tell of a pod.
type Pod struct {
	Namespace, Name string
	UID             types.UID
	Labels          labels.Set
	Addrs           []netip.Addr
	Ports           []ContainerPort // those with names
}

// ContainerPort is a named one.
type ContainerPort struct {
	Name  string
	Proto uint8
	Port  uint16
}

func (p *Pod) key() types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}

// PodOf reads a Pod. Its addresses are nil as long as it has none of its own: on the host's network, or
// when it has ended and the address may be another's.
func PodOf(o *corev1.Pod) *Pod {
	p := &Pod{Namespace: o.Namespace, Name: o.Name, UID: o.UID, Labels: o.Labels}
	if uid, ok := o.Annotations[corev1.MirrorPodAnnotationKey]; ok {
		p.UID = types.UID(uid) // it shows a static pod, which has that uid on its node
	}
	add := func(c *corev1.Container) {
		for _, port := range c.Ports {
			proto, err := protocol(port.Protocol)
			if port.Name == "" || err != nil {
				continue
			}
			p.Ports = append(p.Ports, ContainerPort{port.Name, proto, uint16(port.ContainerPort)})
		}
	}
	for i := range o.Spec.Containers {
		add(&o.Spec.Containers[i])
	}
	for i := range o.Spec.InitContainers {
		if c := &o.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	if o.Spec.HostNetwork || o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
		return p
	}
	for _, ip := range o.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			p.Addrs = append(p.Addrs, a.Unmap())
		}
	}
	return p
}

// identityKey is the same for pods that no rule can tell apart.
func identityKey(p *Pod, namespace labels.Set) string {
	var b strings.Builder
	write := func(set labels.Set) {
		for _, k := range slices.Sorted(maps.Keys(set)) {
			fmt.Fprintf(&b, "%s=%s,", k, set[k])
		}
		b.WriteByte(';')
	}
	b.WriteString(p.Namespace)
	b.WriteByte(';')
	write(namespace)
	write(p.Labels)
	for _, c := range p.Ports {
		fmt.Fprintf(&b, "%s=%d/%d,", c.Name, c.Proto, c.Port)
	}
	return b.String()
}
