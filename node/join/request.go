// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// ErrRefused is in the error for a request that was denied.
var ErrRefused = errors.New("the cluster refuses this machine")

// kind is one of the two certificates of a node.
type kind struct {
	name   string // of its file, and part of the request's
	signer string
	usage  certificatesv1.KeyUsage
}

var (
	clientKind  = kind{"client", certificatesv1.KubeAPIServerClientKubeletSignerName, certificatesv1.UsageClientAuth}
	servingKind = kind{"serving", certificatesv1.KubeletServingSignerName, certificatesv1.UsageServerAuth}
)

// subject is who a node is in its certificates.
func subject(node string) pkix.Name {
	return pkix.Name{CommonName: "system:node:" + node, Organization: []string{"system:nodes"}}
}

// template is what a node asks to have signed.
func (k kind) template(node string, addrs []netip.Addr) *x509.CertificateRequest {
	t := &x509.CertificateRequest{Subject: subject(node)}
	if k.usage == certificatesv1.UsageServerAuth {
		t.DNSNames = []string{node}
		for _, a := range addrs {
			t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
		}
	}
	return t
}

// lacks says why have does not do for what is wanted, or "".
func lacks(have *x509.Certificate, want *x509.CertificateRequest, by authorities) string {
	switch {
	case !by.signed(have):
		return "another authority signed it"
	case have.Subject.CommonName != want.Subject.CommonName:
		return "it names another node"
	}
	for _, ip := range want.IPAddresses {
		if !slices.ContainsFunc(have.IPAddresses, ip.Equal) {
			return "it lacks address " + ip.String()
		}
	}
	return ""
}

// renewAt is when two thirds of a certificate's life are over.
func renewAt(c *x509.Certificate) time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 3 * 2)
}

// obtain asks for a certificate and waits until it is signed or refused. The key is kept in DIR/NAME.key
// meanwhile: a machine that is restarted asks for the same again. The result goes to DIR/NAME.pem.
func obtain(ctx context.Context, client kubernetes.Interface, dir string, k kind, node string, addrs []netip.Addr) error {
	key, err := pendingKey(filepath.Join(dir, k.name+".key"))
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, k.template(node, addrs), key)
	if err != nil {
		return fmt.Errorf("make certificate request: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	sum := sha256.Sum256(append(public, fmt.Sprint(addrs)...))
	csr := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "skep-" + k.name + "-" + node + "-" + hex.EncodeToString(sum[:6])},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: k.signer, Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, k.usage},
		},
	}
	requests := client.CertificatesV1().CertificateSigningRequests()
	if _, err := requests.Create(ctx, csr, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("request %s certificate: %w", k.name, err)
	}
	certPEM, err := await(ctx, client, csr.Name)
	if errors.Is(err, ErrRefused) {
		// A refusal is for this request: the next attempt makes another.
		return errors.Join(err, os.Remove(filepath.Join(dir, k.name+".key")))
	}
	if err != nil {
		return fmt.Errorf("%s certificate (request %s): %w", k.name, csr.Name, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return fmt.Errorf("%s certificate (request %s) is not for the key it was asked for: %w", k.name, csr.Name, err)
	}
	if err := writeFile(filepath.Join(dir, k.name+".pem"), slices.Concat(certPEM, keyPEM)); err != nil {
		return err
	}
	return os.Remove(filepath.Join(dir, k.name+".key"))
}

// await returns the certificate once the request has one.
func await(ctx context.Context, client kubernetes.Interface, name string) ([]byte, error) {
	requests := client.CertificatesV1().CertificateSigningRequests()
	for {
		w, err := requests.Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()})
		if err != nil {
			return nil, err
		}
		certPEM, err := firstAnswer(ctx, w.ResultChan(), name)
		w.Stop()
		if certPEM != nil || err != nil {
			return certPEM, err
		}
	}
}

// firstAnswer reads a watch of one request until it has come to something. Neither means that the
// watch ended first.
func firstAnswer(ctx context.Context, events <-chan watch.Event, name string) ([]byte, error) {
	for {
		select {
		case e, ok := <-events:
			if !ok || e.Type == watch.Error {
				return nil, nil
			}
			csr, isCSR := e.Object.(*certificatesv1.CertificateSigningRequest)
			if !isCSR || csr.Name != name {
				continue
			}
			if certPEM, err := answer(csr); certPEM != nil || err != nil {
				return certPEM, err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// answer is what a request has come to: a certificate, a refusal, or neither yet.
func answer(csr *certificatesv1.CertificateSigningRequest) ([]byte, error) {
	for _, c := range csr.Status.Conditions {
		if c.Status != corev1.ConditionFalse && (c.Type == certificatesv1.CertificateDenied || c.Type == certificatesv1.CertificateFailed) {
			return nil, fmt.Errorf("%w: %s", ErrRefused, c.Message)
		}
	}
	if len(csr.Status.Certificate) == 0 {
		return nil, nil
	}
	return csr.Status.Certificate, nil
}

func pendingKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err == nil {
		if block, _ := pem.Decode(data); block != nil {
			if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if ec, ok := key.(*ecdsa.PrivateKey); ok {
					return ec, nil
				}
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if data, err = encodeKey(key); err != nil {
		return nil, err
	}
	return key, writeFile(path, data)
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
