// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// A cluster goes over to another authority in three steps, each of which takes effect at the server's next start:
//
//	Prepare   ca-next.{crt,key} is trusted beside ca.{crt,key}, and signs nothing
//	Switch    ca-next becomes ca and signs; the one before is ca-previous.crt, and trusted
//	Finish    ca-previous.crt goes
//
// Between two steps every machine has to have learnt of the first; who runs the steps looks after that.

// Stage is how far a directory is.
type Stage string

// The stages; in each, the step that follows has the name of the next.
const (
	Settled  Stage = "settled"  // one authority
	Prepared Stage = "prepared" // the next one is trusted
	Switched Stage = "switched" // it signs
)

// ErrStage is in the error for a step that does not come next.
var ErrStage = errors.New("this step does not come next")

// StageOf says how far the directory of an authority is.
func StageOf(dir string) (Stage, error) {
	switch next, previous, err := besides(dir); {
	case err != nil:
		return "", err
	case next:
		return Prepared, nil
	case previous:
		return Switched, nil
	}
	return Settled, nil
}

func besides(dir string) (next, previous bool, err error) {
	for name, found := range map[string]*bool{"ca-next.crt": &next, "ca-previous.crt": &previous} {
		_, statErr := os.Stat(filepath.Join(dir, name))
		if *found = statErr == nil; statErr != nil && !errors.Is(statErr, fs.ErrNotExist) {
			err = errors.Join(err, statErr)
		}
	}
	return next, previous, err
}

// Prepare makes the next authority.
func Prepare(dir string) error {
	if err := expect(dir, Settled); err != nil {
		return err
	}
	a := &Authority{dir: dir, now: time.Now}
	if _, err := a.openCA("ca", "skep-ca"); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	_, err := a.openCA("ca-next", "skep-ca")
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	return nil
}

// Switch lets the next authority sign. After a crash in the middle it does the rest.
func Switch(dir string) error {
	if err := expect(dir, Prepared); err != nil {
		return err
	}
	return moveNext(dir)
}

// moveNext makes the next authority the one that signs.
func moveNext(dir string) error {
	path := func(name string) string { return filepath.Join(dir, name) }
	if _, previous, err := besides(dir); err != nil || !previous {
		old, err := os.ReadFile(path("ca.crt"))
		if err == nil {
			err = WriteFile(path("ca-previous.crt"), old)
		}
		if err != nil {
			return fmt.Errorf("pki: %w", err)
		}
	}
	// The key first: what decides the stage is the certificate.
	if err := os.Rename(path("ca-next.key"), path("ca.key")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pki: %w", err)
	}
	if err := os.Rename(path("ca-next.crt"), path("ca.crt")); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	return nil
}

// Finish ends the trust in the authority before.
func Finish(dir string) error {
	if err := expect(dir, Switched); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "ca-previous.crt")); err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	return nil
}

func expect(dir string, want Stage) error {
	have, err := StageOf(dir)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	if have != want {
		return fmt.Errorf("pki: %w: the authority in %s is %s, and not %s", ErrStage, dir, have, want)
	}
	return nil
}

// openBesides reads the authority that is trusted beside the one that signs, if there is one.
func (a *Authority) openBesides() ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, name := range []string{"ca-next.crt", "ca-previous.crt"} {
		data, err := os.ReadFile(a.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		ca, err := parseCert(data)
		if err != nil || !ca.IsCA {
			return nil, fmt.Errorf("%s is no certificate authority (%w); restore it from a backup", a.path(name), err)
		}
		if !ca.Equal(a.ca.cert) { // as it is in the middle of Switch
			all = append(all, ca)
		}
	}
	return all, nil
}
