// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/etcdutl/v3/snapshot"
)

// revisionBump is added to the revision of a restored store, and everything before is marked as
// compacted: clients that saw later revisions than the snapshot's, which were lost, are told that
// theirs is too old and read everything again. Upstream's documentation of disaster recovery names
// this number: no cluster makes a thousand million writes between two snapshots.
const revisionBump = 1_000_000_000

// Snapshot writes the whole database to w, in etcd's own form: a bolt file followed by its SHA-256.
// It holds at least every write that was acknowledged before the call, by any member. The revision
// that it returns is the least that the snapshot contains.
func (s *Store) Snapshot(ctx context.Context, w io.Writer) (revision int64, err error) {
	if s.etcd == nil {
		return 0, fmt.Errorf("store: snapshot: %w", ErrExternal)
	}
	// A linearizable read: this member has applied what any member has acknowledged.
	read, err := s.client.Get(ctx, "health")
	if err != nil {
		return 0, fmt.Errorf("store: read before the snapshot: %w", err)
	}
	// The in-process client loses the end of a stream when its sender returns: ask the database itself.
	view := s.etcd.Server.Backend().Snapshot()
	h := sha256.New()
	_, err = view.WriteTo(io.MultiWriter(untilDone{ctx, w}, h))
	if err = errors.Join(err, view.Close()); err != nil {
		return 0, fmt.Errorf("store: snapshot: %w", err)
	}
	if _, err := w.Write(h.Sum(nil)); err != nil {
		return 0, fmt.Errorf("store: snapshot: %w", err)
	}
	return read.Header.Revision, nil
}

// untilDone is a writer that fails once ctx has ended.
type untilDone struct {
	ctx context.Context
	w   io.Writer
}

func (u untilDone) Write(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.w.Write(p)
}

// Claim locks a data directory as Open does, without opening anything. It returns ErrLocked while a
// server uses the directory.
func Claim(ctx context.Context, dataDir string) (release func(), err error) {
	lock, err := takeLock(ctx, filepath.Join(dataDir, "lock"), 0)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return func() { lock.Close() }, nil
}

// Restore makes an etcd member in dataDir, as Open expects it, out of a file that Snapshot wrote. The
// member is the only one of a new cluster. dataDir must hold no member yet. The checksum in the file
// is verified.
func Restore(file, dataDir string, log *slog.Logger) (err error) {
	dir := filepath.Join(dataDir, "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	cfg := etcdConfig(dir)
	f := newFailure(dir)
	done := make(chan error, 1)
	go func() {
		// bolt panics on pages that it cannot read.
		defer func() {
			if r := recover(); r != nil {
				done <- fmt.Errorf("%w: %s: %v", ErrCorrupt, file, r)
			}
		}()
		done <- snapshot.NewV3(newLogger(log, f)).Restore(snapshot.RestoreConfig{
			SnapshotPath: file, Name: cfg.Name, OutputDataDir: dir,
			PeerURLs: []string{cfg.AdvertisePeerUrls[0].String()}, InitialCluster: cfg.InitialCluster,
			InitialClusterToken: cfg.InitialClusterToken,
			RevisionBump:        revisionBump, MarkCompacted: true,
		})
	}()
	select {
	case err = <-done:
	case <-f.ch:
		err = f.err
	}
	if err != nil {
		return fmt.Errorf("store: restore %s: %w", file, err)
	}
	return nil
}
