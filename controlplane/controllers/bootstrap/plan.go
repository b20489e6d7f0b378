// SPDX-License-Identifier: Apache-2.0

// Package bootstrap creates the objects that every skep cluster has: the DNS Service and the default
// IngressClass. It puts back what is deleted and mends what the cluster depends on, but leaves labels and
// annotations that people add alone.
package bootstrap

import (
	"fmt"
	"maps"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skep.io/skep/api"
)

// DNSAddress is the tenth address of a Service range.
func DNSAddress(serviceCIDR netip.Prefix) (netip.Addr, error) {
	addr := serviceCIDR.Masked().Addr()
	for range 10 {
		addr = addr.Next()
	}
	if !serviceCIDR.Contains(addr) {
		return netip.Addr{}, fmt.Errorf("service range %s has no tenth address for DNS: choose a /28 (IPv4) or /124 (IPv6) at least", serviceCIDR)
	}
	return addr, nil
}

// DNSService is the Service that pods ask for names. It has no selector: each node answers itself.
func DNSService(serviceCIDRs []netip.Prefix) (*corev1.Service, error) {
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: metav1.NamespaceSystem,
			Name:      api.DNSServiceName,
			Labels: map[string]string{
				"k8s-app":                       "kube-dns",
				"kubernetes.io/cluster-service": "true",
				"kubernetes.io/name":            "CoreDNS",
			},
			Annotations: map[string]string{api.NodeLocalAnnotation: "true"},
		},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP,
			Ports: []corev1.ServicePort{
				{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53, TargetPort: intstr.FromInt32(53)},
				{Name: "dns-tcp", Protocol: corev1.ProtocolTCP, Port: 53, TargetPort: intstr.FromInt32(53)},
			},
		},
	}
	for _, cidr := range serviceCIDRs {
		addr, err := DNSAddress(cidr)
		if err != nil {
			return nil, err
		}
		family := corev1.IPv4Protocol
		if addr.Is6() {
			family = corev1.IPv6Protocol
		}
		service.Spec.ClusterIPs = append(service.Spec.ClusterIPs, addr.String())
		service.Spec.IPFamilies = append(service.Spec.IPFamilies, family)
	}
	if len(service.Spec.ClusterIPs) == 0 {
		return nil, fmt.Errorf("no service range is configured: the DNS service needs an address")
	}
	policy := corev1.IPFamilyPolicySingleStack
	if len(serviceCIDRs) > 1 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	service.Spec.IPFamilyPolicy = &policy
	service.Spec.ClusterIP = service.Spec.ClusterIPs[0]
	return service, nil
}

// IngressClass is what an Ingress without a class gets.
func IngressClass() *networkingv1.IngressClass {
	return &networkingv1.IngressClass{
		ObjectMeta: metav1.ObjectMeta{
			Name:        api.IngressClassName,
			Annotations: map[string]string{networkingv1.AnnotationIsDefaultIngressClass: "true"},
		},
		Spec: networkingv1.IngressClassSpec{Controller: api.IngressControllerName},
	}
}

// Repair is what to do about an object that exists.
type Repair int

// Nothing, update it in place, or delete and create it: addresses and controller names cannot change.
const (
	Keep Repair = iota
	Update
	Replace
)

// RepairService compares the DNS Service with what it should be. The returned object is what to write.
func RepairService(have, want *corev1.Service) (*corev1.Service, Repair) {
	// The first address of each family may not change; a second one may come or go.
	if have.Spec.ClusterIP != want.Spec.ClusterIP || have.Spec.Type != want.Spec.Type ||
		len(have.Spec.ClusterIPs) > 1 && len(want.Spec.ClusterIPs) > 1 && have.Spec.ClusterIPs[1] != want.Spec.ClusterIPs[1] {
		return want, Replace
	}
	changed := have.DeepCopy()
	changed.Labels, changed.Annotations = merge(have.Labels, want.Labels), merge(have.Annotations, want.Annotations)
	changed.Spec.Ports = want.Spec.Ports
	changed.Spec.Selector = nil
	changed.Spec.ClusterIPs, changed.Spec.IPFamilies, changed.Spec.IPFamilyPolicy = want.Spec.ClusterIPs, want.Spec.IPFamilies, want.Spec.IPFamilyPolicy
	if apiequality.Semantic.DeepEqual(have, changed) {
		return have, Keep
	}
	return changed, Update
}

// RepairIngressClass compares the IngressClass with what it should be. Whether it is the default is for
// people to change once it exists.
func RepairIngressClass(have, want *networkingv1.IngressClass) (*networkingv1.IngressClass, Repair) {
	if have.Spec.Controller != want.Spec.Controller {
		return want, Replace
	}
	return have, Keep
}

// IsHolder tells whether a Service address belongs to a Service, by name.
func IsHolder(address *networkingv1.IPAddress, service *corev1.Service) bool {
	ref := address.Spec.ParentRef
	return ref != nil && ref.Group == "" && ref.Resource == "services" && ref.Namespace == service.Namespace && ref.Name == service.Name
}

func merge(have, want map[string]string) map[string]string {
	merged := maps.Clone(have)
	if merged == nil {
		merged = map[string]string{}
	}
	maps.Copy(merged, want)
	return merged
}
