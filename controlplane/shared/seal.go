// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
)

// ErrSealed says that a content was sealed by servers of another cluster, or changed by somebody who is none.
var ErrSealed = errors.New("it was sealed with another key than this server has: restore etcd-ca.key in DATA-DIR/server/tls from where the store comes")

// sealer encrypts contents. Nonces are random: there are a handful of contents in the life of a cluster.
type sealer struct{ aead cipher.AEAD }

// newSealer takes a key of 32 bytes.
func newSealer(key []byte) (sealer, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return sealer{}, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return sealer{aead}, err
}

// seal binds content to its place: it can be opened for no other.
func (s sealer) seal(content []byte, place string) []byte {
	return s.aead.Seal(nil, nil, content, []byte(place))
}

func (s sealer) open(sealed []byte, place string) ([]byte, error) {
	content, err := s.aead.Open(nil, nil, sealed, []byte(place))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", place, ErrSealed)
	}
	return content, nil
}
