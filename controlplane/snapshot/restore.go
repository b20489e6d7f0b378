// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/controlplane/store"
)

// ErrOccupied is in the error for a data directory that holds a control plane already.
var ErrOccupied = errors.New("there is a control plane already")

// Target is where a snapshot is restored to.
type Target struct {
	DataDir string // gets server/
	// Replace allows server/ to be there already; it is kept under another name.
	Replace bool
	Now     time.Time
	Log     *slog.Logger
}

// Restored says what Restore did.
type Restored struct {
	Manifest
	Aside string // what was replaced, "" if nothing was
}

// Restore makes DATA-DIR/server out of the snapshot in file. Nothing at its place is touched before the
// snapshot has proven to be whole and the new directory is complete and on disk. No server may run.
func Restore(ctx context.Context, file string, to Target) (Restored, error) {
	place := filepath.Join(to.DataDir, "server")
	occupied, err := isOccupied(place)
	if err != nil {
		return Restored{}, err
	}
	if occupied && !to.Replace {
		return Restored{}, fmt.Errorf("%w in %s: --replace keeps it beside the restored one, under another name", ErrOccupied, place)
	}
	if occupied {
		release, err := store.Claim(ctx, place)
		if err != nil {
			return Restored{}, err
		}
		defer release()
	}
	m, built, err := build(file, to)
	if err != nil {
		return Restored{}, fmt.Errorf("restore %s: %w", file, err)
	}
	r := Restored{Manifest: m}
	if occupied {
		r.Aside = place + ".replaced-" + to.Now.UTC().Format("20060102T150405Z")
		if _, err := os.Lstat(r.Aside); err == nil {
			return Restored{}, fmt.Errorf("%s is there already: try again", r.Aside)
		}
	}
	if err := putInPlace(built, place, r.Aside); err != nil {
		return Restored{}, fmt.Errorf("restore %s: %w", file, err)
	}
	return r, syncDir(to.DataDir)
}

// isOccupied says whether there is more at place than the lock of a server that never got further.
func isOccupied(place string) (bool, error) {
	entries, err := os.ReadDir(place)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	for _, e := range entries {
		if e.Name() != "lock" {
			return true, err
		}
	}
	return false, err
}

// build makes the new directory beside its place.
func build(file string, to Target) (m Manifest, dir string, err error) {
	building := filepath.Join(to.DataDir, ".restoring")
	dir = building
	// An earlier attempt may have been interrupted.
	if err := os.RemoveAll(dir); err != nil {
		return m, "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return m, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(building))
		}
	}()
	f, err := os.Open(file)
	if err != nil {
		return m, "", err
	}
	defer f.Close()
	m, archive, err := readManifest(f)
	if err != nil {
		return m, "", err
	}
	if err := archive.extract(m, dir); err != nil {
		return m, "", err
	}
	database := filepath.Join(dir, databaseName)
	if err := store.Restore(database, dir, to.Log); err != nil {
		return m, "", err
	}
	return m, dir, errors.Join(os.Remove(database), syncFileSystem(dir))
}

func syncFileSystem(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// putInPlace moves built to place and what is there to aside, where one is given. The two change places
// in one step where the file system can do that.
func putInPlace(built, place, aside string) error {
	if aside == "" {
		// Only a lock can be there.
		if err := os.RemoveAll(place); err != nil {
			return err
		}
		return os.Rename(built, place)
	}
	err := unix.Renameat2(unix.AT_FDCWD, built, unix.AT_FDCWD, place, unix.RENAME_EXCHANGE)
	if err == nil {
		return os.Rename(built, aside)
	}
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("exchange %s and %s: %w", built, place, err)
	}
	if err := os.Rename(place, aside); err != nil {
		return err
	}
	return os.Rename(built, place)
}
