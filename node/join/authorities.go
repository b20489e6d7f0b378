// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// authorities are the CAs of the cluster: one, or two while it goes over from one to another. The first signs.
type authorities []*x509.Certificate

// parseAuthorities reads PEM.
func parseAuthorities(data []byte) (authorities, error) {
	var all authorities
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("there is something else than certificates in it")
		}
		ca, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if !ca.IsCA {
			return nil, fmt.Errorf("%s is no certificate authority", ca.Subject)
		}
		all = append(all, ca)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return all, nil
}

func (all authorities) pem() []byte {
	var out []byte
	for _, ca := range all {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})...)
	}
	return out
}

func (all authorities) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range all {
		pool.AddCert(ca)
	}
	return pool
}

// signed says whether one of them signed a certificate.
func (all authorities) signed(c *x509.Certificate) bool {
	return slices.ContainsFunc(all, func(ca *x509.Certificate) bool { return c.CheckSignatureFrom(ca) == nil })
}

// pinned says whether one of them is the one that a token names.
func (all authorities) pinned(t Token) bool {
	return slices.ContainsFunc(all, func(ca *x509.Certificate) bool { return Pin(ca) == t.Authority })
}

// former are the pins of CAs that the cluster had before, in hexadecimal: a token that names one is of this cluster, if
// of no use any more, and may still be among the flags of a machine that needs none.
func former(dir string) []string {
	var pins []string
	if raw, err := os.ReadFile(formerPath(dir)); err == nil {
		_ = json.Unmarshal(raw, &pins) // without it, such a token is refused
	}
	return pins
}

func formerPath(dir string) string { return filepath.Join(dir, "former-authorities.json") }

// remember keeps the pins of those in before that are not in now.
func remember(dir string, before, now authorities) error {
	pins := former(dir)
	for _, ca := range before {
		pin := Pin(ca)
		if text := hex.EncodeToString(pin[:]); !now.pinned(Token{Authority: pin}) && !slices.Contains(pins, text) {
			pins = append(pins, text)
		}
	}
	if len(pins) == 0 {
		return nil
	}
	raw, err := json.Marshal(pins)
	if err != nil {
		return err
	}
	return writeFile(formerPath(dir), raw)
}

// ShortPin names a CA to people.
func ShortPin(ca *x509.Certificate) string {
	pin := Pin(ca)
	return hex.EncodeToString(pin[:4])
}

func (all authorities) String() string {
	var names []string
	for _, ca := range all {
		names = append(names, ShortPin(ca))
	}
	return strings.Join(names, ",")
}

func (i *Identity) trusted() authorities { return *i.authorities.Load() }

func (i *Identity) trustThese(all authorities) { i.authorities.Store(&all) }

// LearnAuthorities takes the cluster's own list of CAs, in PEM, the one that signs first. It is kept for the next start;
// connections are made anew, and certificates of another CA than the first are renewed.
func (i *Identity) LearnAuthorities(list string) error {
	all, err := parseAuthorities([]byte(list))
	if err != nil {
		return fmt.Errorf("the cluster's certificate authorities: %w", err)
	}
	if slices.EqualFunc(all, i.trusted(), (*x509.Certificate).Equal) {
		return nil
	}
	err = remember(i.cfg.Dir, i.trusted(), all)
	if err == nil {
		err = writeFile(filepath.Join(i.cfg.Dir, "ca.crt"), all.pem())
	}
	if err != nil {
		return fmt.Errorf("keep the cluster's certificate authorities: %w", err)
	}
	i.cfg.Log.Info("the cluster has other certificate authorities", "before", i.trusted().String(), "now", all.String())
	i.trustThese(all)
	i.connections.CloseAll()
	select {
	case i.wake <- struct{}{}:
	default: // it will see this one, too
	}
	return nil
}

// Authorities says whom this machine trusts and who signed its client certificate, in short.
func (i *Identity) Authorities() (trusted, signer string) {
	all := i.trusted()
	if have := i.client.Load(); have != nil {
		for _, ca := range all {
			if have.Leaf.CheckSignatureFrom(ca) == nil {
				signer = ShortPin(ca)
			}
		}
	}
	return all.String(), signer
}

// transport connects to any server, and trusts and shows what is right at that moment. client-go's own looks at files
// every few minutes only.
func (i *Identity) transport(clientCertificate func(*tls.CertificateRequestInfo) (*tls.Certificate, error)) http.RoundTripper {
	return utilnet.SetTransportDefaults(&http.Transport{
		DialContext: i.connections.DialContext, TLSHandshakeTimeout: dialTimeout, DisableCompression: true,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, ServerName: serverName, GetClientCertificate: clientCertificate,
			// VerifyConnection does all of it, with the CAs of that moment.
			InsecureSkipVerify: true,
			VerifyConnection: func(s tls.ConnectionState) error {
				if len(s.PeerCertificates) == 0 {
					return fmt.Errorf("%w: it showed no certificate", ErrAuthority)
				}
				return verifyServer(s.PeerCertificates[0], i.trusted().pool(), time.Now())
			},
		},
	})
}
