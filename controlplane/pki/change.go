// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Change is how far a cluster is in going over to another authority: what the files of these names say. With several
// servers it is what they agree on, and Adopt makes a server's files say it.
type Change struct {
	CA       Pair   `json:"ca"`                 // ca.{crt,key}
	Next     *Pair  `json:"next,omitempty"`     // ca-next.{crt,key}
	Previous []byte `json:"previous,omitempty"` // ca-previous.crt
}

// Pair is a certificate and its key, in PEM.
type Pair struct {
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}

// Stage is how far it is.
func (c Change) Stage() Stage {
	switch {
	case c.Next != nil:
		return Prepared
	case c.Previous != nil:
		return Switched
	}
	return Settled
}

// Step is c after the step that leads to a stage, if that comes next.
func (c Change) Step(to Stage) (Change, error) {
	from := map[Stage]Stage{Prepared: Settled, Switched: Prepared, Settled: Switched}[to]
	if c.Stage() != from {
		return c, fmt.Errorf("pki: %w: the authority is %s, and not %s", ErrStage, c.Stage(), from)
	}
	switch to {
	case Prepared:
		s, err := newCA("skep-ca", time.Now())
		if err != nil {
			return c, fmt.Errorf("pki: %w", err)
		}
		key, err := encodeKey(s.key)
		c.Next = &Pair{s.certPEM, key}
		return c, err
	case Switched:
		return Change{CA: *c.Next, Previous: c.CA.Cert}, nil
	}
	return Change{CA: c.CA}, nil
}

// Certificates are those of the authority that signs, the next one and the one before; the latter two nil if there is none.
func (c Change) Certificates() (signs, next, previous *x509.Certificate, err error) {
	for raw, to := range map[*[]byte]**x509.Certificate{&c.CA.Cert: &signs, &c.Previous: &previous} {
		if *raw != nil {
			if *to, err = parseCert(*raw); err != nil {
				return nil, nil, nil, fmt.Errorf("pki: %w", err)
			}
		}
	}
	if c.Next != nil {
		next, err = parseCert(c.Next.Cert)
	}
	if signs == nil && err == nil {
		err = errors.New("pki: there is no authority that signs")
	}
	return signs, next, previous, err
}

// WithoutKeys is c for those who only look.
func (c Change) WithoutKeys() Change {
	c.CA.Key = nil
	if c.Next != nil {
		c.Next = &Pair{Cert: c.Next.Cert}
	}
	return c
}

// ReadChange reads the files of dir.
func ReadChange(dir string) (c Change, err error) {
	if err := finishSwitch(dir); err != nil {
		return c, err
	}
	next, previous, err := besides(dir)
	if err != nil {
		return c, fmt.Errorf("pki: %w", err)
	}
	files := map[string]*[]byte{"ca.crt": &c.CA.Cert, "ca.key": &c.CA.Key}
	if next {
		c.Next = &Pair{}
		files["ca-next.crt"], files["ca-next.key"] = &c.Next.Cert, &c.Next.Key
	}
	if previous {
		files["ca-previous.crt"] = &c.Previous
	}
	for name, to := range files {
		if *to, err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			return c, fmt.Errorf("pki: %w", err)
		}
	}
	return c, nil
}

// Adopt makes the files of dir say what c says, and tells whether that has changed anything. It may be cut off anywhere:
// Open finds an authority that is whole, and another Adopt does the rest. An open Authority stays what it was.
func (c Change) Adopt(dir string) (changed bool, err error) {
	if _, err := parsePair(c.CA.Cert, c.CA.Key); err != nil {
		return false, fmt.Errorf("pki: the authority to go over to: %w", err)
	}
	have, err := ReadChange(dir)
	if err != nil {
		return false, err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	if !bytes.Equal(have.CA.Cert, c.CA.Cert) {
		changed = true
		if have.Next == nil || !bytes.Equal(have.Next.Cert, c.CA.Cert) {
			err = writeNext(dir, c.CA)
		}
		if err == nil {
			err = Switch(dir)
		}
		if err != nil {
			return true, err
		}
		if have, err = ReadChange(dir); err != nil {
			return true, err
		}
	}
	var errs []error
	switch {
	case c.Previous != nil && !bytes.Equal(have.Previous, c.Previous):
		changed = true
		errs = append(errs, WriteFile(path("ca-previous.crt"), c.Previous))
	case c.Previous == nil && have.Previous != nil:
		changed = true
		errs = append(errs, os.Remove(path("ca-previous.crt")))
	}
	switch {
	case c.Next != nil && (have.Next == nil || !bytes.Equal(have.Next.Cert, c.Next.Cert)):
		changed = true
		errs = append(errs, writeNext(dir, *c.Next))
	case c.Next == nil && have.Next != nil:
		changed = true
		errs = append(errs, os.Remove(path("ca-next.crt")), os.Remove(path("ca-next.key"))) // what counts is the certificate
	}
	if err := errors.Join(errs...); err != nil {
		return true, fmt.Errorf("pki: %w", err)
	}
	return changed, nil
}

// writeNext writes the key first: without a certificate it is nothing.
func writeNext(dir string, p Pair) error {
	// One of another key would look like a switch that was cut off.
	if err := os.Remove(filepath.Join(dir, "ca-next.crt")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := WriteFile(filepath.Join(dir, "ca-next.key"), p.Key); err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, "ca-next.crt"), p.Cert)
}

// finishSwitch moves the certificate after the key, if a crash came between: they would not belong together.
func finishSwitch(dir string) error {
	next, err := os.ReadFile(filepath.Join(dir, "ca-next.crt"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ca-next.key")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := os.ReadFile(filepath.Join(dir, "ca.key"))
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	if _, err := parsePair(next, key); err != nil {
		return nil // its key is lost: whoever needs it says so
	}
	return moveNext(dir)
}

// ServersKey is a key of 32 bytes for one purpose that only servers of the cluster have: it follows from the key of
// etcd-ca, which is made if it is missing.
func (a *Authority) ServersKey(purpose string) ([]byte, error) {
	ca, err := a.openCA("etcd-ca", "skep-etcd-ca")
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	secret, err := encodeKey(ca.key)
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return hkdf.Key(sha256.New, secret, nil, purpose, 32)
}

// HasPeers says whether this server is, or was, one of several.
func (a *Authority) HasPeers() bool {
	_, err := os.Stat(a.path("etcd-ca.key"))
	return err == nil
}
