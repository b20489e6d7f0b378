// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	etcdversion "go.etcd.io/etcd/api/v3/version"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/version"
)

// Free bytes that a start asks for. etcd preallocates two log segments of 64 MB each when it
// creates a member, and one when a segment is full.
const (
	minFreeNew      = 160 << 20
	minFreeExisting = 8 << 20
)

// onDisk is what a data directory holds, as far as it decides whether etcd may touch it.
type onDisk struct {
	wal       bool   // at least one log segment
	db        bool   // the database file has content
	dbErr     error  // why the database cannot be opened
	committed bool   // the database has applied at least one log entry
	version   string // of the newest etcd that wrote the database, as far as it says so
	free      uint64 // bytes available on the file system
}

// inspect reads dir without changing anything in it.
func inspect(dir string) (onDisk, error) {
	var d onDisk
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return d, fmt.Errorf("statfs %s: %w", dir, err)
	}
	d.free = st.Bavail * uint64(st.Bsize)

	segments, err := os.ReadDir(filepath.Join(dir, "member", "wal"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return d, err
	}
	for _, s := range segments {
		d.wal = d.wal || strings.HasSuffix(s.Name(), ".wal")
	}

	db := filepath.Join(dir, "member", "snap", "db")
	fi, err := os.Stat(db)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d, nil
	case err != nil:
		return d, err
	case fi.Size() == 0:
		return d, nil
	}
	d.db = true
	d.committed, d.version, d.dbErr = peek(db)
	return d, nil
}

// peek opens a bolt database read-only, walks its root and says whether etcd has applied an entry, and which etcd wrote it.
// bolt maps the file: a file cut short shows as SIGBUS and a broken page as a panic.
func peek(path string) (committed bool, newest string, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		if errors.Is(err, bolterrors.ErrTimeout) {
			return false, "", ErrLocked
		}
		return false, "", err
	}
	defer db.Close()
	err = db.View(func(tx *bolt.Tx) error {
		if size := tx.Size(); size > 0 {
			fi, err := os.Stat(path)
			if err != nil {
				return err
			}
			if fi.Size() < size {
				return fmt.Errorf("file has %d bytes of %d", fi.Size(), size)
			}
		}
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			switch string(name) {
			case "meta":
				for _, c := range b.Get([]byte("consistent_index")) {
					committed = committed || c != 0
				}
				newest = newer(newest, string(b.Get([]byte("storageVersion"))))
			case "cluster":
				newest = newer(newest, string(b.Get([]byte("clusterVersion"))))
			}
			return nil
		})
	})
	return committed, newest, err
}

// newer is the later one of two versions; what is none is older than any.
func newer(a, b string) string {
	av, aErr := version.ParseSemantic(a)
	bv, bErr := version.ParseSemantic(b)
	if bErr != nil || aErr == nil && !av.LessThan(bv) {
		return a
	}
	return b
}

// tooNew says whether a database is of a later minor version than this etcd, which could misread it.
func tooNew(found string) bool {
	v, err := version.ParseSemantic(found)
	own := version.MustParseSemantic(etcdversion.Version)
	return err == nil && (v.Major() > own.Major() || v.Major() == own.Major() && v.Minor() > own.Minor())
}

// judge says whether etcd may start on what inspect found. A directory with half of its parts is
// refused: etcd would start an empty member over the other half.
func judge(d onDisk, dir string) error {
	const remedy = "restore the directory from a backup, or move it away to start an empty cluster"
	switch {
	case errors.Is(d.dbErr, ErrLocked):
		return fmt.Errorf("%w: another process has opened the database in %s; stop it", ErrLocked, dir)
	case d.dbErr != nil:
		return fmt.Errorf("%w: %s/member/snap/db: %w; %s", ErrCorrupt, dir, d.dbErr, remedy)
	case tooNew(d.version):
		return fmt.Errorf("%w: %s was written by etcd %s, and this is %s; start the version of skep that wrote it, or a later one, or restore a snapshot of before", ErrTooNew, dir, d.version, etcdversion.Version)
	case d.wal && !d.db:
		return fmt.Errorf("%w: %s has a write-ahead log but no database; %s", ErrCorrupt, dir, remedy)
	case !d.wal && d.committed:
		return fmt.Errorf("%w: %s has a database but no write-ahead log; %s", ErrCorrupt, dir, remedy)
	}
	need := uint64(minFreeExisting)
	if !d.wal {
		need = minFreeNew
	}
	if d.free < need {
		return fmt.Errorf("%w: %s has %d MiB free, a start needs %d MiB; free some, or choose another --data-dir", ErrNoSpace, dir, d.free>>20, need>>20)
	}
	return nil
}
