// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// ErrDamaged is in the error for a file that is not a whole snapshot.
var ErrDamaged = errors.New("not a whole snapshot")

// format is the version of the archive's form. A reader refuses one that it does not know.
const format = 1

// Bounds of what is read from a file that may be anything.
const (
	maxManifest = 1 << 20
	maxFiles    = 64
	maxKeyFile  = 1 << 20
	maxDatabase = 64 << 30
)

const (
	manifestName = "manifest.json"
	databaseName = "etcd.db"
)

// Manifest says what a snapshot is.
type Manifest struct {
	Format   int       `json:"format"`
	Cause    string    `json:"cause"` // OnDemand or Scheduled
	Node     string    `json:"node"`  // whose server took it
	Version  string    `json:"version"`
	Created  time.Time `json:"created"`
	Revision int64     `json:"revision"` // of the store, at least
	Files    []File    `json:"files"`    // in the order of the archive
}

// File is one file of a snapshot.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// fileName is every name that a snapshot may contain: nothing that leads elsewhere.
var fileName = regexp.MustCompile(`\A(etcd\.db|tls/[a-z0-9][a-z0-9.-]{0,100})\z`)

// check says what is wrong with a manifest that was read from a file.
func (m Manifest) check() error {
	if m.Format != format {
		return fmt.Errorf("its format is %d, this skep knows %d: use the version of skep that made it (%s)", m.Format, format, m.Version)
	}
	seen := map[string]bool{}
	for _, f := range m.Files {
		limit := int64(maxKeyFile)
		if f.Name == databaseName {
			limit = maxDatabase
		}
		if !fileName.MatchString(f.Name) || seen[f.Name] || f.Size < 0 || f.Size > limit {
			return fmt.Errorf("its file %q is none of a snapshot", f.Name)
		}
		seen[f.Name] = true
	}
	if len(m.Files) > maxFiles || !seen[databaseName] || !seen["tls/ca.key"] || !seen["tls/ca.crt"] {
		return errors.New("it lacks the database or the cluster's authority")
	}
	return nil
}

// hashFile describes the file at path under the given name.
func hashFile(path, name string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	h := sha256.New()
	size, err := io.Copy(h, f)
	return File{Name: name, Size: size, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

// write makes the archive of m, whose files are at paths, in the same order.
func write(w io.Writer, m Manifest, paths []string) error {
	// Databases are mostly free pages and text: the fastest level gets most of what there is to get.
	zip, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	archive := tar.NewWriter(zip)
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	header := func(name string, size int64) error {
		return archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: m.Created})
	}
	if err := header(manifestName, int64(len(raw))); err != nil {
		return err
	}
	if _, err := archive.Write(raw); err != nil {
		return err
	}
	for i, file := range m.Files {
		if err := header(file.Name, file.Size); err != nil {
			return err
		}
		if err := copyInto(archive, paths[i]); err != nil {
			return fmt.Errorf("%s: %w", file.Name, err)
		}
	}
	return errors.Join(archive.Close(), zip.Close())
}

func copyInto(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// reader reads an archive from its beginning.
type reader struct {
	zip     *gzip.Reader
	archive *tar.Reader
}

// readManifest reads what comes first.
func readManifest(r io.Reader) (Manifest, *reader, error) {
	damaged := func(err error) (Manifest, *reader, error) {
		return Manifest{}, nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	zip, err := gzip.NewReader(r)
	if err != nil {
		return damaged(err)
	}
	archive := tar.NewReader(zip)
	header, err := archive.Next()
	if err != nil {
		return damaged(err)
	}
	if header.Name != manifestName || header.Size > maxManifest {
		return damaged(fmt.Errorf("it begins with %q, not with %s", header.Name, manifestName))
	}
	var m Manifest
	if err := json.NewDecoder(archive).Decode(&m); err != nil {
		return damaged(fmt.Errorf("%s: %w", manifestName, err))
	}
	if err := m.check(); err != nil {
		return damaged(err)
	}
	return m, &reader{zip, archive}, nil
}

// extract writes the files of m below dir and returns ErrDamaged unless every byte is as m says.
func (r *reader) extract(m Manifest, dir string) error {
	for _, want := range m.Files {
		header, err := r.archive.Next()
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, want.Name, err)
		}
		if header.Name != want.Name || header.Size != want.Size || header.Typeflag != tar.TypeReg {
			return fmt.Errorf("%w: it has %q where %s is to be", ErrDamaged, header.Name, want.Name)
		}
		if err := r.extractFile(want, filepath.Join(dir, want.Name)); err != nil {
			return err
		}
	}
	if _, err := r.archive.Next(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: there is more behind its last file", ErrDamaged)
	}
	// gzip's own checksum is at the very end, and covers the manifest.
	if n, err := io.CopyN(io.Discard, r.zip, maxManifest); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %d bytes behind its end: %w", ErrDamaged, n, err)
	}
	return nil
}

func (r *reader) extractFile(want File, path string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	// What fails to be written is no damage of the snapshot.
	in := readErrors{r: r.archive}
	if _, err := io.Copy(io.MultiWriter(f, h), &in); err != nil {
		if in.err != nil {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, want.Name, in.err)
		}
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != want.SHA256 {
		return fmt.Errorf("%w: %s has not the checksum that its manifest says", ErrDamaged, want.Name)
	}
	return f.Sync()
}

// readErrors keeps an error of its reader, to tell it from one of a writer.
type readErrors struct {
	r   io.Reader
	err error
}

func (e *readErrors) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		e.err = err
	}
	return n, err
}
