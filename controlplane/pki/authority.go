// SPDX-License-Identifier: Apache-2.0

// Package pki is the cluster's certificate authority and the files it keeps.
//
//	DIR/ca.{crt,key}                  signs servers, administrators, nodes
//	DIR/ca-next.{crt,key}             the one to go over to, and ca-previous.crt the one before: see Prepare
//	DIR/trusted.pem                   certificates of all of these, the one that signs first
//	DIR/front-proxy-ca.{crt,key}      signs only front-proxy-client: who holds a certificate of it
//	DIR/front-proxy-client.pem        may assert any user to an aggregated API server
//	DIR/etcd-ca.{crt,key}             signs members of the store, where there are several
//	DIR/service-account.{key,pub}     signs service-account tokens
//	DIR/NAME.pem                      certificate and key, kept by ServerFiles and ClientFiles
//
// Keys are ECDSA P-256. Files have mode 0600, the directory 0700; every file is written beside its
// place, synced and renamed, so a crash leaves the old one or the new one.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 365 * 24 * time.Hour
	// skew is how far behind another machine's clock may be and still accept a new certificate.
	skew = 5 * time.Minute
)

// Authority is an open certificate authority. It is safe for concurrent use.
type Authority struct {
	dir        string
	ca         signer
	trusted    []*x509.Certificate // ca first
	frontProxy signer
	saKey      *ecdsa.PrivateKey
	now        func() time.Time
}

// signer is a certificate with its key.
type signer struct {
	cert    *x509.Certificate
	certPEM []byte
	key     crypto.Signer
}

// Open reads the authority in dir and creates what is missing. A certificate whose key is gone, or
// the reverse, is an error: making a new one would lock out every node that trusts the old.
func Open(dir string) (*Authority, error) { return open(dir, time.Now) }

func open(dir string, now func() time.Time) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if err := finishSwitch(dir); err != nil {
		return nil, err
	}
	a := &Authority{dir: dir, now: now}
	var err error
	if a.ca, err = a.openCA("ca", "skep-ca"); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	besides, err := a.openBesides()
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	a.trusted = append([]*x509.Certificate{a.ca.cert}, besides...)
	if err := WriteFile(a.TrustedFile(), a.CAPEM()); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if a.frontProxy, err = a.openCA("front-proxy-ca", "skep-front-proxy-ca"); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if a.saKey, err = a.openServiceAccountKey(); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return a, nil
}

// CAPEM are the certificates that clients and servers of the cluster trust: the one that signs, and while the cluster
// goes over to another authority that one or the one before.
func (a *Authority) CAPEM() []byte {
	var out []byte
	for _, ca := range a.trusted {
		out = append(out, encodeCert(ca.Raw)...)
	}
	return out
}

// TrustedFile is the path of CAPEM.
func (a *Authority) TrustedFile() string { return a.path("trusted.pem") }

// CAFile is the path of the certificate that signs.
func (a *Authority) CAFile() string { return a.path("ca.crt") }

// CAKeyFile is the path of the CA's key, for the controller that signs certificate requests.
func (a *Authority) CAKeyFile() string { return a.path("ca.key") }

// CAPool holds the certificates of CAPEM.
func (a *Authority) CAPool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range a.trusted {
		pool.AddCert(ca)
	}
	return pool
}

// ServiceAccountKeyFile is the path of the PEM key that signs service-account tokens.
func (a *Authority) ServiceAccountKeyFile() string { return a.path("service-account.key") }

// ServiceAccountKey signs service-account tokens.
func (a *Authority) ServiceAccountKey() *ecdsa.PrivateKey { return a.saKey }

// FrontProxyCAFile is the path of the certificate that aggregated API servers trust.
func (a *Authority) FrontProxyCAFile() string { return a.path("front-proxy-ca.crt") }

// Lasting are the paths of what nothing can make again: the authorities, and the key that signs
// service-account tokens. What is not among them is issued anew where it is missing.
func (a *Authority) Lasting() ([]string, error) {
	var out []string
	for _, pattern := range []string{"*.crt", "*.key", "*.pub"} {
		paths, err := filepath.Glob(a.path(pattern))
		if err != nil {
			return nil, fmt.Errorf("pki: %w", err)
		}
		out = append(out, paths...)
	}
	return out, nil
}

func (a *Authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *Authority) openCA(name, cn string) (signer, error) {
	certFile, keyFile := a.path(name+".crt"), a.path(name+".key")
	certPEM, certErr := os.ReadFile(certFile)
	keyPEM, keyErr := os.ReadFile(keyFile)
	switch {
	case certErr == nil && keyErr == nil:
		s, err := parsePair(certPEM, keyPEM)
		if err != nil {
			return signer{}, fmt.Errorf("%s: %w; restore both files from a backup", certFile, err)
		}
		if !s.cert.IsCA {
			return signer{}, fmt.Errorf("%s is not a certificate authority", certFile)
		}
		if a.now().After(s.cert.NotAfter) {
			return signer{}, fmt.Errorf("%s expired on %s; remove %s to make a new authority, and let nodes join again", certFile, s.cert.NotAfter.Format(time.DateOnly), a.dir)
		}
		return s, nil
	case errors.Is(certErr, fs.ErrNotExist) && errors.Is(keyErr, fs.ErrNotExist):
		return a.createCA(certFile, keyFile, cn)
	case errors.Is(certErr, fs.ErrNotExist) && keyErr == nil:
		// The key is written first: a crash in between leaves a key that has signed nothing.
		return a.createCA(certFile, keyFile, cn)
	}
	return signer{}, fmt.Errorf("%w; restore it from a backup", errors.Join(certErr, keyErr))
}

func (a *Authority) createCA(certFile, keyFile, cn string) (signer, error) {
	s, err := newCA(cn, a.now())
	if err != nil {
		return signer{}, err
	}
	return s, writePair(certFile, keyFile, s)
}

func newCA(cn string, now time.Time) (signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return signer{}, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: cn},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(caLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	return sign(template, key, signer{cert: template, key: key})
}

// sign fills in a serial number and signs template for key with parent's key.
func sign(template *x509.Certificate, key crypto.Signer, parent signer) (signer, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return signer{}, err
	}
	template.SerialNumber = serial.Add(serial, big.NewInt(1))
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, key.Public(), parent.key)
	if err != nil {
		return signer{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return signer{}, err
	}
	return signer{cert: cert, certPEM: encodeCert(der), key: key}, nil
}

// IssueServer makes a key and a certificate for a server that is called by hosts, each a DNS name
// or an address. The result fits tls.X509KeyPair.
func (a *Authority) IssueServer(cn string, hosts []string) (certPEM, keyPEM []byte, err error) {
	return a.issue(a.ca, serverTemplate(cn, hosts))
}

// IssueClient makes a key and a certificate that authenticates as user cn in groups orgs.
func (a *Authority) IssueClient(cn string, orgs []string) (certPEM, keyPEM []byte, err error) {
	return a.issue(a.ca, clientTemplate(cn, orgs))
}

func (a *Authority) issue(parent signer, template *x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: %w", err)
	}
	now := a.now()
	template.NotBefore, template.NotAfter = now.Add(-skew), now.Add(leafLife)
	if template.NotAfter.After(parent.cert.NotAfter) {
		template.NotAfter = parent.cert.NotAfter
	}
	s, err := sign(template, key, parent)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: sign %q: %w", template.Subject.CommonName, err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: %w", err)
	}
	return s.certPEM, keyPEM, nil
}

func serverTemplate(cn string, hosts []string) *x509.Certificate {
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: cn},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return t
}

func clientTemplate(cn string, orgs []string) *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{CommonName: cn, Organization: orgs},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
}
