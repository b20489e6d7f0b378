// SPDX-License-Identifier: Apache-2.0

// Package csrapproval approves what nodes, and machines that want to become nodes, ask to have signed:
// a client certificate in their name and a serving certificate for their own addresses. Upstream's
// controllers then sign. Requests of anybody else, or for other signers, are left to people
// (`skep certificate approve`).
package csrapproval

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/api"
)

const (
	nodePrefix = "system:node:"
	nodesGroup = "system:nodes"
)

// Action is what is to be done with a request.
type Action int

// What can be done with a request.
const (
	Leave Action = iota // it is for somebody else to decide
	Approve
	Deny
)

// Verdict is an Action with what the requester gets to read.
type Verdict struct {
	Action          Action
	Reason, Message string
}

// Facts are what a verdict depends on besides the request.
type Facts struct {
	Nodes []*corev1.Node
	// Others are all requests that have not been cleaned up yet.
	Others []*certificatesv1.CertificateSigningRequest
	// Reserved are the ranges of pods and services: no machine's address is in them.
	Reserved []netip.Prefix
}

// reservedNames are those by which API servers are verified.
var reservedNames = []string{"kubernetes", "localhost"}

// Decide is pure. csr is one that nobody has decided yet.
func Decide(csr *certificatesv1.CertificateSigningRequest, f Facts) Verdict {
	spec := csr.Spec
	client := spec.SignerName == certificatesv1.KubeAPIServerClientKubeletSignerName
	serving := spec.SignerName == certificatesv1.KubeletServingSignerName
	self, isNode := strings.CutPrefix(spec.Username, nodePrefix)
	isNode = isNode && slices.Contains(spec.Groups, nodesGroup)
	joins := slices.Contains(spec.Groups, api.BootstrapGroup)
	if !client && !serving || !isNode && !joins {
		return Verdict{}
	}
	request, err := parse(spec.Request)
	if err != nil {
		return deny("Malformed", "the request cannot be read: %v", err)
	}
	name, ok := strings.CutPrefix(request.Subject.CommonName, nodePrefix)
	if !ok || name == "" || !slices.Equal(request.Subject.Organization, []string{nodesGroup}) {
		return deny("WrongSubject", "a node's certificate is for %sNAME in the group %s, this asks for %q in %q", nodePrefix, nodesGroup,
			request.Subject.CommonName, request.Subject.Organization)
	}
	if isReserved(name) {
		return deny("ReservedName", "no node can be called %q: API servers are", name)
	}
	usage := certificatesv1.UsageClientAuth
	if serving {
		usage = certificatesv1.UsageServerAuth
	}
	if bad := slices.IndexFunc(spec.Usages, func(u certificatesv1.KeyUsage) bool {
		return u != usage && u != certificatesv1.UsageDigitalSignature && u != certificatesv1.UsageKeyEncipherment
	}); bad >= 0 || !slices.Contains(spec.Usages, usage) {
		return deny("WrongUsage", "a node's certificate from %s is for %q, this asks for %q", spec.SignerName, usage, spec.Usages)
	}
	switch {
	case isNode && name != self:
		return deny("WrongNode", "node %q can ask for its own certificates only, not for those of %q", self, name)
	case serving && !isNode:
		return deny("NotANode", "a machine that joins asks for its client certificate first")
	case serving:
		return decideServing(request, name, f)
	case len(request.DNSNames)+len(request.IPAddresses)+len(request.EmailAddresses)+len(request.URIs) > 0:
		return deny("WrongSubject", "a client certificate has no names beside its subject")
	case isNode:
		return Verdict{Approve, "Renewed", "node " + name + " renews its client certificate"}
	}
	return decideJoining(csr, request, name, f)
}

// decideJoining lets a machine have the name of a node that does not exist, or that is dead.
func decideJoining(csr *certificatesv1.CertificateSigningRequest, request *x509.CertificateRequest, name string, f Facts) Verdict {
	const remedy = "give this machine another --node-name; if it replaces the other for good, stop that one and `skep delete node %[1]s`, then join again"
	for _, n := range f.Nodes {
		if n.Name == name && isLive(n) {
			return deny("NameTaken", "node name %q is taken by a node that is alive: "+remedy, name)
		}
	}
	// A machine that was let in a moment ago may not have registered yet.
	for _, o := range f.Others {
		if o.UID == csr.UID || o.Spec.SignerName != csr.Spec.SignerName || !has(o, certificatesv1.CertificateApproved) {
			continue
		}
		other, err := parse(o.Spec.Request)
		if err != nil || other.Subject.CommonName != request.Subject.CommonName || bytes.Equal(other.RawSubjectPublicKeyInfo, request.RawSubjectPublicKeyInfo) {
			continue
		}
		if registered := slices.ContainsFunc(f.Nodes, func(n *corev1.Node) bool {
			return n.Name == name && n.CreationTimestamp.After(o.CreationTimestamp.Time)
		}); !registered && o.CreationTimestamp.Add(joinTime).After(csr.CreationTimestamp.Time) {
			return deny("NameTaken", "node name %q is taken by a machine that is just joining: "+remedy, name)
		}
	}
	return Verdict{Approve, "Joined", "a machine with a token joins as node " + name}
}

// decideServing lets a node show its own name and addresses.
func decideServing(request *x509.CertificateRequest, name string, f Facts) Verdict {
	if len(request.EmailAddresses)+len(request.URIs) > 0 {
		return deny("WrongNames", "a node's serving certificate is for host names and addresses only")
	}
	for _, dns := range request.DNSNames {
		if dns != name {
			return deny("WrongNames", "node %q can show no other host name than its own, this asks for %q", name, dns)
		}
	}
	for _, ip := range request.IPAddresses {
		addr, _ := netip.AddrFromSlice(ip)
		addr = addr.Unmap()
		if addr.IsUnspecified() || addr.IsMulticast() {
			return deny("WrongAddress", "%s is no address of a machine", addr)
		}
		for _, r := range f.Reserved {
			if r.Contains(addr) {
				return deny("WrongAddress", "%s is in the range %s, which is the cluster's own", addr, r)
			}
		}
		for _, n := range f.Nodes {
			if n.Name != name && isLive(n) && slices.ContainsFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool { return a.Address == addr.String() }) {
				return deny("AddressTaken", "address %s is that of node %q, which is alive: give this machine another --node-ip", addr, n.Name)
			}
		}
	}
	return Verdict{Approve, "Serving", "node " + name + " serves under its own names"}
}

// isLive tells a node that reports. The node life-cycle controller sets Ready to Unknown when it does not.
func isLive(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status != corev1.ConditionUnknown
		}
	}
	return true // it has only just registered
}

func isReserved(name string) bool {
	return slices.Contains(reservedNames, name) || strings.HasPrefix(name, "kubernetes.default")
}

func has(csr *certificatesv1.CertificateSigningRequest, t certificatesv1.RequestConditionType) bool {
	return slices.ContainsFunc(csr.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool { return c.Type == t })
}

func parse(data []byte) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("there is no certificate request in it")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	return request, request.CheckSignature()
}

func deny(reason, format string, args ...any) Verdict {
	return Verdict{Deny, reason, fmt.Sprintf(format, args...)}
}
