// SPDX-License-Identifier: Apache-2.0

// Package clusterpolicy has what every part of skep must agree on about ClusterNetworkPolicies
// (policy.networking.k8s.io): how the resource is defined, and which of its rules can be honoured.
package clusterpolicy

import (
	_ "embed"
	"errors"
	"fmt"
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"
)

// Resource is that of ClusterNetworkPolicies.
var Resource = schema.GroupVersionResource{Group: v1beta1.GroupName, Version: "v1beta1", Resource: "clusternetworkpolicies"}

// DefinitionName is the name of the CustomResourceDefinition.
const DefinitionName = "clusternetworkpolicies." + v1beta1.GroupName

// Definition is the CustomResourceDefinition, as YAML: the experimental channel of network-policy-api v0.3.0, whose
// named ports and nodes are honoured, without its older version.
//
//go:embed clusternetworkpolicies.yaml
var Definition []byte

// Condition of a ClusterNetworkPolicy that says whether all of it is honoured.
const Condition = "Accepted"

// Problems of a policy: what of it cannot be honoured, and what happens instead. API validation lets through what it
// cannot check, and a later version may know more.
func Problems(p *v1beta1.ClusterNetworkPolicy) []error {
	var out []error
	if err := Subject(&p.Spec.Subject); err != nil {
		out = append(out, fmt.Errorf("subject: %w; the Deny rules are in force at every pod, the others nowhere", err))
	}
	instead := func(direction string, i int, name string, a v1beta1.ClusterNetworkPolicyRuleAction, err error) {
		if err == nil {
			return
		}
		if name != "" {
			name = fmt.Sprintf(" (%s)", name)
		}
		what := "matches nothing"
		if a != v1beta1.ClusterNetworkPolicyRuleActionAccept {
			what = "denies everything"
		}
		out = append(out, fmt.Errorf("%s[%d]%s: %w; the rule %s", direction, i, name, err, what))
	}
	for i := range p.Spec.Ingress {
		r := &p.Spec.Ingress[i]
		instead("ingress", i, r.Name, r.Action, Ingress(r))
	}
	for i := range p.Spec.Egress {
		r := &p.Spec.Egress[i]
		instead("egress", i, r.Name, r.Action, Egress(r))
	}
	return out
}

// Subject says what is wrong with a subject.
func Subject(s *v1beta1.ClusterNetworkPolicySubject) error {
	switch {
	case s.Namespaces != nil:
		return selector(s.Namespaces)
	case s.Pods != nil:
		return pods(s.Pods)
	}
	return errors.New("neither namespaces nor pods")
}

// Ingress says what is wrong with a rule.
func Ingress(r *v1beta1.ClusterNetworkPolicyIngressRule) error {
	if len(r.From) == 0 {
		return errors.New("from is empty")
	}
	for i := range r.From {
		p := &r.From[i]
		var err error
		switch {
		case p.Namespaces != nil:
			err = selector(p.Namespaces)
		case p.Pods != nil:
			err = pods(p.Pods)
		default:
			err = errors.New("neither namespaces nor pods")
		}
		if err != nil {
			return fmt.Errorf("from[%d]: %w", i, err)
		}
	}
	return common(r.Action, r.Protocols)
}

// Egress says what is wrong with a rule.
func Egress(r *v1beta1.ClusterNetworkPolicyEgressRule) error {
	if len(r.To) == 0 {
		return errors.New("to is empty")
	}
	nameless := false // a peer without names for its ports
	for i := range r.To {
		p := &r.To[i]
		var err error
		switch {
		case len(p.DomainNames) > 0:
			err = errors.New("domainNames are not supported: name networks")
		case p.Namespaces != nil:
			err = selector(p.Namespaces)
		case p.Pods != nil:
			err = pods(p.Pods)
		case p.Nodes != nil:
			nameless = true
			err = selector(p.Nodes)
		case len(p.Networks) > 0:
			nameless = true
			for _, n := range p.Networks {
				if _, e := netip.ParsePrefix(string(n)); e != nil {
					err = e
				}
			}
		default:
			err = errors.New("none of namespaces, pods, nodes and networks")
		}
		if err != nil {
			return fmt.Errorf("to[%d]: %w", i, err)
		}
	}
	for i := range r.Protocols {
		if r.Protocols[i].DestinationNamedPort != "" && nameless {
			return fmt.Errorf("protocols[%d]: destinationNamedPort beside nodes or networks, which name no ports", i)
		}
	}
	return common(r.Action, r.Protocols)
}

func common(a v1beta1.ClusterNetworkPolicyRuleAction, protocols []v1beta1.ClusterNetworkPolicyProtocol) error {
	switch a {
	case v1beta1.ClusterNetworkPolicyRuleActionAccept, v1beta1.ClusterNetworkPolicyRuleActionDeny, v1beta1.ClusterNetworkPolicyRuleActionPass:
	default:
		return fmt.Errorf("action %q is none of Accept, Deny and Pass", a)
	}
	for i := range protocols {
		p := &protocols[i]
		var err error
		switch {
		case p.TCP != nil:
			err = port(p.TCP.DestinationPort)
		case p.UDP != nil:
			err = port(p.UDP.DestinationPort)
		case p.SCTP != nil:
			err = port(p.SCTP.DestinationPort)
		case p.DestinationNamedPort != "":
		default:
			err = errors.New("none of tcp, udp, sctp and destinationNamedPort")
		}
		if err != nil {
			return fmt.Errorf("protocols[%d]: %w", i, err)
		}
	}
	return nil
}

func port(p *v1beta1.Port) error {
	valid := func(n int32) bool { return n >= 1 && n <= 65535 }
	switch {
	case p == nil:
	case p.Range != nil:
		if !valid(p.Range.Start) || !valid(p.Range.End) || p.Range.End < p.Range.Start {
			return fmt.Errorf("%d-%d is no range of ports", p.Range.Start, p.Range.End)
		}
	case !valid(p.Number):
		return fmt.Errorf("%d is no port", p.Number)
	}
	return nil
}

func pods(p *v1beta1.NamespacedPod) error {
	if err := selector(&p.NamespaceSelector); err != nil {
		return fmt.Errorf("namespaceSelector: %w", err)
	}
	if err := selector(&p.PodSelector); err != nil {
		return fmt.Errorf("podSelector: %w", err)
	}
	return nil
}

func selector(s *metav1.LabelSelector) error {
	_, err := metav1.LabelSelectorAsSelector(s)
	return err
}
