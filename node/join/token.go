// SPDX-License-Identifier: Apache-2.0

// Package join makes a machine a member of a cluster: from a token to certificates, and from
// certificates to newer ones for as long as the machine stays.
//
//	token ──► handshake that shows the CA ──► is it the token's? ──► request, as the token's holder, a client
//	certificate ──► with it a serving certificate ──► both anew after two thirds of their life
//
// Until the CA is known to be the right one nothing is sent but a TLS client hello.
package join

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"regexp"
)

// Token is what a machine needs to join: whom to trust, and what to show to be let in.
type Token struct {
	// Authority is the SHA-256 hash of the DER-encoded public key of the cluster's CA, as kubeadm pins it.
	Authority [sha256.Size]byte
	ID        string // six characters; not secret
	Secret    string // sixteen characters
}

// tokenPattern has nothing that a shell, YAML or a unit file would want quoted.
var tokenPattern = regexp.MustCompile(`\Askep1\.([0-9a-f]{64})\.([a-z0-9]{6})\.([a-z0-9]{16})\z`)

// ParseToken reads what String writes. Its error never repeats the secret.
func ParseToken(text string) (Token, error) {
	m := tokenPattern.FindStringSubmatch(text)
	if m == nil {
		return Token{}, fmt.Errorf("this is not a token (skep1.HASH.ID.SECRET): copy all of what `skep token create` printed on a server, it has %d characters, this has %d",
			len("skep1.")+64+1+6+1+16, len(text))
	}
	t := Token{ID: m[2], Secret: m[3]}
	_, err := hex.Decode(t.Authority[:], []byte(m[1]))
	return t, err
}

// String is the form that people copy.
func (t Token) String() string {
	return "skep1." + hex.EncodeToString(t.Authority[:]) + "." + t.ID + "." + t.Secret
}

// Bearer is the form that the API server knows: a bootstrap token.
func (t Token) Bearer() string { return t.ID + "." + t.Secret }

// Pin is the hash by which a token names a CA.
func Pin(ca *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(ca.RawSubjectPublicKeyInfo) }
