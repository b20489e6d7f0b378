// SPDX-License-Identifier: Apache-2.0

package csrapproval

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/api"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// ask makes a request for node "a"; change may spoil it before it is signed and after.
func ask(t *testing.T, signer string, user string, groups []string, template func(*x509.CertificateRequest)) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:a", Organization: []string{"system:nodes"}}}
	if template != nil {
		template(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	usage := certificatesv1.UsageClientAuth
	if signer == certificatesv1.KubeletServingSignerName {
		usage = certificatesv1.UsageServerAuth
	}
	return &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: rand.Text(), UID: types.UID(rand.Text()), CreationTimestamp: metav1.NewTime(now)},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: signer, Username: user, Groups: groups,
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, usage},
		},
	}
}

const (
	client  = certificatesv1.KubeAPIServerClientKubeletSignerName
	serving = certificatesv1.KubeletServingSignerName
)

var (
	newcomer = []string{"system:bootstrappers", api.BootstrapGroup}
	nodes    = []string{"system:nodes", "system:authenticated"}
)

func member(name string, ready corev1.ConditionStatus, created time.Time, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(created)}}
	if ready != "" {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
	}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func TestDecide(t *testing.T) {
	addresses := func(list ...string) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			r.DNSNames = []string{"a"}
			for _, a := range list {
				r.IPAddresses = append(r.IPAddresses, net.ParseIP(a))
			}
		}
	}
	approved := func(csr *certificatesv1.CertificateSigningRequest, at time.Time) *certificatesv1.CertificateSigningRequest {
		csr.CreationTimestamp = metav1.NewTime(at)
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved}}
		return csr
	}
	facts := Facts{Reserved: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd73::/48")}}
	with := func(nodes ...*corev1.Node) Facts { f := facts; f.Nodes = nodes; return f }
	after := func(others ...*certificatesv1.CertificateSigningRequest) Facts {
		f := facts
		f.Others = others
		return f
	}
	joining := func() *certificatesv1.CertificateSigningRequest {
		return ask(t, client, "system:bootstrap:abcdef", newcomer, nil)
	}
	spoil := func(csr *certificatesv1.CertificateSigningRequest, change func(*certificatesv1.CertificateSigningRequestSpec)) *certificatesv1.CertificateSigningRequest {
		change(&csr.Spec)
		return csr
	}
	subject := func(cn string, orgs ...string) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			r.Subject = pkix.Name{CommonName: cn, Organization: orgs}
		}
	}
	same := joining()
	for _, c := range []struct {
		name   string
		csr    *certificatesv1.CertificateSigningRequest
		facts  Facts
		action Action
		reason string
	}{
		{"a newcomer", joining(), facts, Approve, "Joined"},
		{"a newcomer takes a live name", joining(), with(member("a", corev1.ConditionTrue, now)), Deny, "NameTaken"},
		{"of a node that has problems but reports", joining(), with(member("a", corev1.ConditionFalse, now)), Deny, "NameTaken"},
		{"of a node that has just registered", joining(), with(member("a", "", now)), Deny, "NameTaken"},
		{"of a dead node", joining(), with(member("a", corev1.ConditionUnknown, now.Add(-time.Hour))), Approve, "Joined"},
		{"others live", joining(), with(member("b", corev1.ConditionTrue, now)), Approve, "Joined"},
		{"somebody else is just joining", joining(), after(approved(joining(), now.Add(-time.Minute))), Deny, "NameTaken"},
		{"somebody else never came", joining(), after(approved(joining(), now.Add(-joinTime))), Approve, "Joined"},
		{"somebody else asked, too", joining(), after(joining()), Approve, "Joined"},
		{"the same machine again", same, after(approved(same.DeepCopy(), now.Add(-time.Minute))), Approve, "Joined"},
		{"joined, registered and died at once", joining(), Facts{
			Nodes:  []*corev1.Node{member("a", corev1.ConditionUnknown, now.Add(-time.Minute))},
			Others: []*certificatesv1.CertificateSigningRequest{approved(joining(), now.Add(-2*time.Minute))},
		}, Approve, "Joined"},
		{"another name is joining", joining(), after(approved(ask(t, client, "x", newcomer, subject("system:node:b", "system:nodes")), now)), Approve, "Joined"},
		{"an API server's name", ask(t, client, "x", newcomer, subject("system:node:kubernetes", "system:nodes")), facts, Deny, "ReservedName"},
		{"and a longer one", ask(t, client, "x", newcomer, subject("system:node:kubernetes.default.svc", "system:nodes")), facts, Deny, "ReservedName"},
		{"no node's name", ask(t, client, "x", newcomer, subject("admin", "system:nodes")), facts, Deny, "WrongSubject"},
		{"an empty name", ask(t, client, "x", newcomer, subject("system:node:", "system:nodes")), facts, Deny, "WrongSubject"},
		{"masters", ask(t, client, "x", newcomer, subject("system:node:a", "system:masters")), facts, Deny, "WrongSubject"},
		{"nodes and masters", ask(t, client, "x", newcomer, subject("system:node:a", "system:nodes", "system:masters")), facts, Deny, "WrongSubject"},
		{"no group", ask(t, client, "x", newcomer, subject("system:node:a")), facts, Deny, "WrongSubject"},
		{"a client that serves", spoil(joining(), func(s *certificatesv1.CertificateSigningRequestSpec) {
			s.Usages = append(s.Usages, certificatesv1.UsageServerAuth)
		}), facts, Deny, "WrongUsage"},
		{"a client of no use", spoil(joining(), func(s *certificatesv1.CertificateSigningRequestSpec) { s.Usages = s.Usages[:1] }), facts, Deny, "WrongUsage"},
		{"a client with names", ask(t, client, "x", newcomer, addresses("192.0.2.1")), facts, Deny, "WrongSubject"},
		{"rubbish", spoil(joining(), func(s *certificatesv1.CertificateSigningRequestSpec) { s.Request = []byte("x") }), facts, Deny, "Malformed"},
		{"a request that was tampered with", spoil(joining(), func(s *certificatesv1.CertificateSigningRequestSpec) {
			block, _ := pem.Decode(s.Request)
			block.Bytes[len(block.Bytes)-1] ^= 1
			s.Request = pem.EncodeToMemory(block)
		}), facts, Deny, "Malformed"},
		{"a newcomer that serves", ask(t, serving, "x", newcomer, addresses("192.0.2.1")), facts, Deny, "NotANode"},

		{"a node renews", ask(t, client, "system:node:a", nodes, nil), with(member("a", corev1.ConditionTrue, now)), Approve, "Renewed"},
		{"for another", ask(t, client, "system:node:b", nodes, nil), facts, Deny, "WrongNode"},
		{"a node serves", ask(t, serving, "system:node:a", nodes, addresses("192.0.2.1", "2001:db8::1")), with(member("a", corev1.ConditionTrue, now, "192.0.2.1")), Approve, "Serving"},
		{"for another's name", ask(t, serving, "system:node:b", nodes, addresses("192.0.2.1")), facts, Deny, "WrongNode"},
		{"another host name", ask(t, serving, "system:node:a", nodes, func(r *x509.CertificateRequest) { r.DNSNames = []string{"a", "kubernetes"} }), facts, Deny, "WrongNames"},
		{"a URI", ask(t, serving, "system:node:a", nodes, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{{Scheme: "spiffe", Host: "x"}} }), facts, Deny, "WrongNames"},
		{"another's address", ask(t, serving, "system:node:a", nodes, addresses("192.0.2.2")), with(member("b", corev1.ConditionTrue, now, "192.0.2.2")), Deny, "AddressTaken"},
		{"a dead node's address", ask(t, serving, "system:node:a", nodes, addresses("192.0.2.2")), with(member("b", corev1.ConditionUnknown, now, "192.0.2.2")), Approve, "Serving"},
		{"a pod's address", ask(t, serving, "system:node:a", nodes, addresses("10.42.3.4")), facts, Deny, "WrongAddress"},
		{"a pod's other address", ask(t, serving, "system:node:a", nodes, addresses("fd73::1")), facts, Deny, "WrongAddress"},
		{"no address", ask(t, serving, "system:node:a", nodes, addresses("0.0.0.0")), facts, Deny, "WrongAddress"},

		{"not a newcomer", ask(t, client, "system:bootstrap:abcdef", []string{"system:bootstrappers"}, nil), facts, Leave, ""},
		{"not in the group", ask(t, client, "system:node:a", []string{"system:authenticated"}, nil), facts, Leave, ""},
		{"a person", ask(t, certificatesv1.KubeAPIServerClientSignerName, "jane", nil, nil), facts, Leave, ""},
		{"a node for another signer", ask(t, certificatesv1.KubeAPIServerClientSignerName, "system:node:a", nodes, nil), facts, Leave, ""},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			v := Decide(c.csr, c.facts)
			if v.Action != c.action || v.Reason != c.reason || v.Action == Deny && v.Message == "" {
				t.Errorf("got %+v, want %v %s", v, c.action, c.reason)
			}
		})
	}
}
