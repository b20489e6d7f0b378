// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"sigs.k8s.io/yaml"

	"skep.io/skep/controlplane/pki"
)

// File is the path of a file of keys. It holds everything that decrypts the Secrets of the store.
type File string

// Read returns an error that is fs.ErrNotExist if there is no such file.
func (f File) Read() (Ring, error) {
	raw, err := os.ReadFile(string(f))
	if err != nil {
		return Ring{}, fmt.Errorf("keys of Secrets: %w", err)
	}
	r, err := Parse(raw)
	if err != nil {
		return r, fmt.Errorf("keys of Secrets in %s: %w", f, err)
	}
	return r, nil
}

// Parse reads the content of such a file.
func Parse(raw []byte) (Ring, error) {
	var c apiserverv1.EncryptionConfiguration
	if err := yaml.UnmarshalStrict(raw, &c); err != nil {
		return Ring{}, fmt.Errorf("%w; restore it from a snapshot: without it no Secret can be read", err)
	}
	return ringOf(c)
}

// Marshal is the content of such a file.
func (r Ring) Marshal() ([]byte, error) {
	raw, err := yaml.Marshal(r.configuration())
	if err != nil {
		return nil, fmt.Errorf("keys of Secrets: %w", err)
	}
	return raw, nil
}

// Write replaces the file at once, or leaves it as it was; it can be read by its owner only.
func (f File) Write(r Ring) error {
	raw, err := r.Marshal()
	if err != nil {
		return err
	}
	if err := pki.WriteFile(string(f), raw); err != nil {
		return fmt.Errorf("keys of Secrets: %w", err)
	}
	return nil
}

// Prepare makes the file say what a server is started for, and returns its path; empty if Secrets neither are
// encrypted nor ever were.
func (f File) Prepare(on bool) (string, error) {
	r, err := f.Read()
	if errors.Is(err, fs.ErrNotExist) {
		if !on {
			return "", nil
		}
		err = nil
	}
	if err != nil {
		return "", err
	}
	if r.On == on && (!on || len(r.Keys) > 0) {
		return string(f), nil
	}
	if r, err = r.Switch(on); err != nil {
		return "", err
	}
	return string(f), f.Write(r)
}
