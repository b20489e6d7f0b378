// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"
)

// serverName is in the certificate of every API server and in no other: nodes may not be called so.
// Verifying it, and not the address that was dialled, lets a server be reached by any address.
const serverName = "kubernetes"

// ErrAuthority is in the error for a server whose CA is not the expected one.
var ErrAuthority = errors.New("this server belongs to another cluster, or is not what it says")

// ErrClock is in the error for a certificate that is right but for the time.
var ErrClock = errors.New("set the clock, then try again")

// pinnedAuthority looks at the certificates that the server at a URL shows and returns the CA that pin
// names, once the server has proven to hold a certificate of it. Only TLS's first messages are sent.
func pinnedAuthority(ctx context.Context, server *url.URL, pin [32]byte) (*x509.Certificate, error) {
	var found *x509.Certificate
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: serverName,
		// VerifyConnection does all of it, with a CA that only now becomes known.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) (err error) {
			found, err = verifyPinned(s.PeerCertificates, pin, time.Now())
			return err
		},
	}}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", server.Host)
	if err != nil {
		return nil, err
	}
	return found, conn.Close()
}

// verifyPinned checks that chain, a server's certificates with its own first, has the pinned CA and
// leads to it.
func verifyPinned(chain []*x509.Certificate, pin [32]byte, now time.Time) (*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: it showed no certificate", ErrAuthority)
	}
	for _, ca := range chain {
		if !ca.IsCA || Pin(ca) != pin {
			continue
		}
		return ca, verifyServer(chain[0], authorities{ca}.pool(), now)
	}
	return nil, fmt.Errorf("%w: its certificate authority is not the one that the token names (a server of skep shows its CA, a proxy in between may not); nothing secret was sent", ErrAuthority)
}

func verifyServer(leaf *x509.Certificate, by *x509.CertPool, now time.Time) error {
	_, err := leaf.Verify(x509.VerifyOptions{Roots: by, DNSName: serverName, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("the server's certificate is valid from %s to %s, and this machine's clock says %s: %w",
			leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339), ErrClock)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAuthority, err)
	}
	return nil
}
