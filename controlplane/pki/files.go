// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Files are where a certificate and its key are: one file under both names, as the kubelet keeps its
// own. One read gets a whole pair, never halves of two. A reader that opens it twice, as upstream's
// does, can still fall between two pairs; it reads again because the file changed.
type Files struct{ Cert, Key string }

// ServerFiles keeps a serving certificate for hosts, its key and the authority's certificate in NAME.pem.
// It is issued anew when it lacks one of hosts, two thirds of its life are over, or another authority
// signed it. The authority is shown to clients so that one that knows only its hash can learn it.
func (a *Authority) ServerFiles(name, cn string, hosts []string) (Files, error) {
	return a.keep(name, a.ca, serverTemplate(cn, hosts))
}

// ClientFiles keeps a client certificate for user cn in groups orgs, as ServerFiles does.
func (a *Authority) ClientFiles(name, cn string, orgs []string) (Files, error) {
	return a.keep(name, a.ca, clientTemplate(cn, orgs))
}

// FrontProxyClientFiles keeps the certificate with which the API server calls aggregated ones.
func (a *Authority) FrontProxyClientFiles() (Files, error) {
	return a.keep("front-proxy-client", a.frontProxy, clientTemplate(FrontProxyClientName, nil))
}

// PeerFiles keeps a certificate with which this server shows other servers' etcd who it is, on both sides of
// a connection, signed by the authority of PeerCAFile, which signs nothing else. Both are made where they are missing.
func (a *Authority) PeerFiles(name string, hosts []string) (Files, error) {
	ca, err := a.openCA("etcd-ca", "skep-etcd-ca")
	if err != nil {
		return Files{}, fmt.Errorf("pki: %w", err)
	}
	want := serverTemplate(name, hosts)
	want.ExtKeyUsage = append(want.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	return a.keep("etcd-peer", ca, want)
}

// PeerCAFile is the path of the authority that members of etcd trust.
func (a *Authority) PeerCAFile() string { return a.path("etcd-ca.crt") }

// FrontProxyClientName is the only name that aggregated API servers accept as a front proxy.
const FrontProxyClientName = "front-proxy-client"

func (a *Authority) keep(name string, parent signer, want *x509.Certificate) (Files, error) {
	path := a.path(name + ".pem")
	files := Files{Cert: path, Key: path}
	pairPEM, err := os.ReadFile(path)
	switch {
	case err == nil:
		// A leaf can always be made again, so an unreadable one is only a reason to do so.
		have, err := tls.X509KeyPair(pairPEM, pairPEM)
		if err == nil && len(have.Certificate) == 2 && reissue(have.Leaf, want, parent.cert, a.now()) == "" {
			return files, nil
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Files{}, fmt.Errorf("pki: %w", err)
	}
	certPEM, keyPEM, err := a.issue(parent, want)
	if err != nil {
		return Files{}, err
	}
	if err := WriteFile(path, slices.Concat(certPEM, keyPEM, parent.certPEM)); err != nil {
		return Files{}, fmt.Errorf("pki: %w", err)
	}
	return files, nil
}

// reissue gives the reason why have no longer serves as want, or "".
func reissue(have, want, parent *x509.Certificate, now time.Time) string {
	life := have.NotAfter.Sub(have.NotBefore)
	switch {
	case have.CheckSignatureFrom(parent) != nil:
		return "signed by another authority"
	case now.Before(have.NotBefore):
		return "not valid yet"
	case now.After(have.NotBefore.Add(life / 3 * 2)):
		return "two thirds of its life are over"
	case have.Subject.CommonName != want.Subject.CommonName:
		return "another name"
	case !sameSet(have.Subject.Organization, want.Subject.Organization):
		return "other groups"
	case !slices.Equal(have.ExtKeyUsage, want.ExtKeyUsage):
		return "another usage"
	}
	for _, name := range want.DNSNames {
		if !slices.Contains(have.DNSNames, name) {
			return "lacks name " + name
		}
	}
	for _, ip := range want.IPAddresses {
		if !slices.ContainsFunc(have.IPAddresses, ip.Equal) {
			return "lacks address " + ip.String()
		}
	}
	return ""
}

func sameSet(a, b []string) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

func (a *Authority) openServiceAccountKey() (*ecdsa.PrivateKey, error) {
	path := a.path("service-account.key")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if data, err = encodeKey(key); err != nil {
			return nil, err
		}
		if err := WriteFile(path, data); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	signer, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; restore it from a backup, or remove it to invalidate every service-account token", path, err)
	}
	key, ok := signer.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: %T is not an ECDSA key", path, signer)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return key, WriteFile(a.path("service-account.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func writePair(certFile, keyFile string, s signer) error {
	key, err := encodeKey(s.key)
	if err != nil {
		return err
	}
	if err := WriteFile(keyFile, key); err != nil {
		return err
	}
	return WriteFile(certFile, s.certPEM)
}

// WriteFile replaces path with data, mode 0600, so that a reader and a crash see the old content or
// the new one.
func WriteFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		f.Close()
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return fmt.Errorf("sync %s: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%T is not an ECDSA key", key)
	}
	der, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func parseKey(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%T cannot sign", key)
	}
	return s, nil
}

func parseCert(certPEM []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no certificate in it")
	}
	return x509.ParseCertificate(block.Bytes)
}

func parsePair(certPEM, keyPEM []byte) (signer, error) {
	cert, err := parseCert(certPEM)
	if err != nil {
		return signer{}, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return signer{}, err
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(cert.PublicKey) {
		return signer{}, errors.New("certificate and key do not belong together")
	}
	return signer{cert: cert, certPEM: encodeCert(cert.Raw), key: key}, nil
}
