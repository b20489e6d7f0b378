// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

func TestDNSAddress(t *testing.T) {
	for cidr, want := range map[string]string{
		"10.43.0.0/16": "10.43.0.10", "fd73:6b65:7043::/112": "fd73:6b65:7043::a", "10.43.0.5/16": "10.43.0.10", "10.0.0.0/28": "10.0.0.10",
	} {
		if got, err := DNSAddress(netip.MustParsePrefix(cidr)); err != nil || got.String() != want {
			t.Errorf("%s: %s %v, want %s", cidr, got, err, want)
		}
	}
	if _, err := DNSAddress(netip.MustParsePrefix("10.0.0.0/29")); err == nil {
		t.Error("a range of eight addresses has a tenth")
	}
}

func TestDNSService(t *testing.T) {
	for _, tt := range []struct {
		cidrs            string
		policy           corev1.IPFamilyPolicy
		wantIPs, wantFam string
	}{
		{"10.43.0.0/16,fd73:6b65:7043::/112", corev1.IPFamilyPolicyRequireDualStack, "10.43.0.10 fd73:6b65:7043::a", "IPv4 IPv6"},
		{"10.43.0.0/16", corev1.IPFamilyPolicySingleStack, "10.43.0.10", "IPv4"},
		{"fd73:6b65:7043::/112", corev1.IPFamilyPolicySingleStack, "fd73:6b65:7043::a", "IPv6"},
	} {
		var cidrs []netip.Prefix
		for _, s := range strings.Split(tt.cidrs, ",") {
			cidrs = append(cidrs, netip.MustParsePrefix(s))
		}
		s, err := DNSService(cidrs)
		if err != nil {
			t.Fatal(err)
		}
		var families []string
		for _, f := range s.Spec.IPFamilies {
			families = append(families, string(f))
		}
		if strings.Join(s.Spec.ClusterIPs, " ") != tt.wantIPs || strings.Join(families, " ") != tt.wantFam || *s.Spec.IPFamilyPolicy != tt.policy {
			t.Errorf("%s: %v %v %v", tt.cidrs, s.Spec.ClusterIPs, families, *s.Spec.IPFamilyPolicy)
		}
		if s.Spec.Selector != nil || s.Annotations["skep.io/node-local"] != "true" || s.Labels["k8s-app"] != "kube-dns" {
			t.Errorf("%+v", s)
		}
	}
}

func TestRepairService(t *testing.T) {
	cidrs := []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd73:6b65:7043::/112")}
	want, err := DNSService(cidrs)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*corev1.Service)
		repair Repair
	}{
		{"as it should be", func(*corev1.Service) {}, Keep},
		{"labels added", func(s *corev1.Service) { s.Labels["team"] = "net" }, Keep},
		{"annotation removed", func(s *corev1.Service) { s.Annotations = nil }, Update},
		{"selector added", func(s *corev1.Service) { s.Spec.Selector = map[string]string{"k8s-app": "kube-dns"} }, Update},
		{"port removed", func(s *corev1.Service) { s.Spec.Ports = s.Spec.Ports[:1] }, Update},
		{"range of one family before", func(s *corev1.Service) {
			s.Spec.ClusterIPs, s.Spec.IPFamilies = s.Spec.ClusterIPs[:1], s.Spec.IPFamilies[:1]
		}, Update},
		{"another address", func(s *corev1.Service) { s.Spec.ClusterIP = "10.43.0.99" }, Replace},
		{"another second address", func(s *corev1.Service) { s.Spec.ClusterIPs[1] = "fd73:6b65:7043::b" }, Replace},
	} {
		have := want.DeepCopy()
		have.UID, have.ResourceVersion = "u", "5"
		tt.change(have)
		write, repair := RepairService(have, want)
		if repair != tt.repair {
			t.Errorf("%s: %v, want %v", tt.name, repair, tt.repair)
		}
		if repair == Update {
			if _, again := RepairService(write, want); again != Keep {
				t.Errorf("%s: repaired, it needs repair again", tt.name)
			}
			if write.ResourceVersion != "5" {
				t.Errorf("%s: another's change would be undone", tt.name)
			}
		}
	}
}

func TestRepairIngressClass(t *testing.T) {
	want := IngressClass()
	have := want.DeepCopy()
	have.Annotations = nil // somebody made another class the default
	if _, repair := RepairIngressClass(have, want); repair != Keep {
		t.Errorf("repair %v", repair)
	}
	have.Spec.Controller = "other"
	if _, repair := RepairIngressClass(have, want); repair != Replace {
		t.Errorf("repair %v", repair)
	}
}

func TestIsHolder(t *testing.T) {
	service := &corev1.Service{}
	service.Namespace, service.Name = "kube-system", "kube-dns"
	for _, tt := range []struct {
		ref  *networkingv1.ParentReference
		want bool
	}{
		{nil, false},
		{&networkingv1.ParentReference{Resource: "services", Namespace: "kube-system", Name: "kube-dns"}, true},
		{&networkingv1.ParentReference{Resource: "services", Namespace: "default", Name: "kube-dns"}, false},
		{&networkingv1.ParentReference{Group: "x", Resource: "services", Namespace: "kube-system", Name: "kube-dns"}, false},
	} {
		if got := IsHolder(&networkingv1.IPAddress{Spec: networkingv1.IPAddressSpec{ParentRef: tt.ref}}, service); got != tt.want {
			t.Errorf("%+v: %v", tt.ref, got)
		}
	}
}
