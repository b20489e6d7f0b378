// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"
)

// Why a snapshot was taken. Only scheduled ones are ever deleted.
const (
	OnDemand  = "on-demand"
	Scheduled = "scheduled"
)

// extension of a snapshot's file: what it is, to every tool.
const extension = ".tar.gz"

// Source is what a snapshot is taken of.
type Source interface {
	// Snapshot writes etcd's snapshot and returns its revision.
	Snapshot(ctx context.Context, w io.Writer) (int64, error)
}

// Taker takes snapshots of one server.
type Taker struct {
	Dir     string // gets the snapshots; made with mode 0700
	Store   Source
	Keys    func() ([]string, error) // paths of the keys and certificates that nothing can make again
	Node    string
	Version string

	one sync.Mutex
}

// snapshotName is what a file name and a shell take without quotes.
var snapshotName = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z`)

// CheckName says what is wrong with a name that somebody gave.
func CheckName(name string) error {
	if !snapshotName.MatchString(name) {
		return fmt.Errorf("%q does not do as the name of a snapshot: up to 128 letters, digits, dots, dashes and underscores, with a letter or digit first", name)
	}
	return nil
}

// Taken is a snapshot on disk.
type Taken struct {
	Manifest
	Name string `json:"name"`
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes, compressed
	Err  error  `json:"-"`    // why it cannot be read; then Manifest is empty
}

// Take takes a snapshot. With name empty it is called after its cause, node and second. One is taken at
// a time.
func (t *Taker) Take(ctx context.Context, name, cause string, now time.Time) (Taken, error) {
	t.one.Lock()
	defer t.one.Unlock()
	if name == "" {
		name = cause + "-" + t.Node + "-" + strconv.FormatInt(now.Unix(), 10)
	}
	if err := CheckName(name); err != nil {
		return Taken{}, err
	}
	taken, err := t.take(ctx, name, cause, now)
	if err != nil {
		return Taken{}, fmt.Errorf("snapshot %s: %w", name, err)
	}
	return taken, nil
}

func (t *Taker) take(ctx context.Context, name, cause string, now time.Time) (taken Taken, err error) {
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return Taken{}, err
	}
	path := filepath.Join(t.Dir, name+extension)
	if _, err := os.Lstat(path); err == nil {
		return Taken{}, fmt.Errorf("%s is there already: give it another name", path)
	}
	// What a crash left under these names is overwritten.
	database, partial := filepath.Join(t.Dir, ".partial.db"), filepath.Join(t.Dir, ".partial"+extension)
	defer func() { err = errors.Join(err, removeIfThere(database), removeIfThere(partial)) }()

	m := Manifest{Format: format, Cause: cause, Node: t.Node, Version: t.Version, Created: now.UTC().Truncate(time.Second)}
	if err := create(database, func(f *os.File) error {
		m.Revision, err = t.Store.Snapshot(ctx, f)
		return err
	}); err != nil {
		return Taken{}, err
	}
	paths, err := t.Keys()
	if err != nil {
		return Taken{}, err
	}
	paths = append([]string{database}, paths...)
	for i, p := range paths {
		as := databaseName
		if i > 0 {
			as = "tls/" + filepath.Base(p)
		}
		file, err := hashFile(p, as)
		if err != nil {
			return Taken{}, err
		}
		m.Files = append(m.Files, file)
	}
	if err := m.check(); err != nil {
		return Taken{}, err
	}
	taken = Taken{Manifest: m, Name: name, Path: path}
	if err := create(partial, func(f *os.File) error {
		if err := write(f, m, paths); err != nil {
			return err
		}
		info, err := f.Stat()
		if err == nil {
			taken.Size = info.Size()
		}
		return errors.Join(err, f.Sync())
	}); err != nil {
		return Taken{}, err
	}
	// A link, and not a rename: it replaces nothing.
	if err := os.Link(partial, path); err != nil {
		return Taken{}, err
	}
	return taken, syncDir(t.Dir)
}

// create fills a new file of mode 0600.
func create(path string, fill func(*os.File) error) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
