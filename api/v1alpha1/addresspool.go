// SPDX-License-Identifier: Apache-2.0

// Package v1alpha1 is version v1alpha1 of the API group skep.io.
package v1alpha1

import (
	_ "embed"
	"fmt"
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// AddressPools is the resource.
var AddressPools = schema.GroupVersionResource{Group: "skep.io", Version: "v1alpha1", Resource: "addresspools"}

// AddressPoolsCRD is the CustomResourceDefinition, as YAML.
//
//go:embed addresspools.yaml
var AddressPoolsCRD []byte

// AddressPool has addresses for Services of type LoadBalancer.
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   AddressPoolSpec   `json:"spec"`
	Status AddressPoolStatus `json:"status,omitempty"`
}

// AddressPoolStatus says what is left.
type AddressPoolStatus struct {
	// Addresses counts all of them, IPv4 and IPv6 those of one family.
	Addresses AddressCount  `json:"addresses"`
	IPv4      *AddressCount `json:"ipv4,omitempty"`
	IPv6      *AddressCount `json:"ipv6,omitempty"`
	// Conditions are Ready, Exhausted and Overlapping.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// AddressCount is of addresses; what is beyond an int64 counts as the largest one.
type AddressCount struct {
	Total int64 `json:"total"`
	Used  int64 `json:"used"`
	Free  int64 `json:"free"`
}

// Conditions of an AddressPool.
const (
	PoolReady       = "Ready"       // all that it says makes sense
	PoolExhausted   = "Exhausted"   // no address of a family that it has is free
	PoolOverlapping = "Overlapping" // another pool has some of its addresses, too
)

// AddressPoolSpec says which addresses, and for whom.
type AddressPoolSpec struct {
	// Addresses are prefixes (192.0.2.16/28) and ranges (192.0.2.16-192.0.2.31), of either family.
	Addresses []string `json:"addresses"`
	// ServiceSelector chooses Services by their labels; nil chooses all.
	ServiceSelector *metav1.LabelSelector `json:"serviceSelector,omitempty"`
	// AutoAssign false keeps the pool for Services that name it, or one of its addresses. Default true.
	AutoAssign *bool `json:"autoAssign,omitempty"`
}

// Range is inclusive, and of one family.
type Range struct{ First, Last netip.Addr }

// Contains says whether an address is in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && !a.Less(r.First) && !r.Last.Less(a)
}

// ParseRange reads one entry of Addresses.
func ParseRange(s string) (Range, error) {
	if first, last, ok := strings.Cut(s, "-"); ok {
		a, err := netip.ParseAddr(strings.TrimSpace(first))
		if err != nil {
			return Range{}, fmt.Errorf("%q: %w", s, err)
		}
		b, err := netip.ParseAddr(strings.TrimSpace(last))
		if err != nil {
			return Range{}, fmt.Errorf("%q: %w", s, err)
		}
		if a, b = a.Unmap(), b.Unmap(); a.BitLen() != b.BitLen() || b.Less(a) {
			return Range{}, fmt.Errorf("%q: the first address must come before the last, in the same family", s)
		}
		return Range{a, b}, nil
	}
	p, err := netip.ParsePrefix(strings.TrimSpace(s))
	if err != nil {
		return Range{}, fmt.Errorf("%q is neither a prefix (192.0.2.16/28) nor a range (192.0.2.16-192.0.2.31): %w", s, err)
	}
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 1 << (7 - i%8)
	}
	end, _ := netip.AddrFromSlice(last)
	return Range{p.Addr(), end}, nil
}
