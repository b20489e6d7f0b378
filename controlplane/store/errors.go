// SPDX-License-Identifier: Apache-2.0

package store

import "errors"

var (
	// ErrLocked says that another process uses the data directory.
	ErrLocked = errors.New("data directory is in use")
	// ErrCorrupt says that what is on disk cannot be read. Nothing was changed.
	ErrCorrupt = errors.New("data is corrupt")
	// ErrTooNew says that a later version has written what is on disk. Nothing was changed.
	ErrTooNew = errors.New("data is of a later version")
	// ErrNoSpace says that the file system is full.
	ErrNoSpace = errors.New("no space left for data")
	// ErrFailed wraps any other failure that etcd cannot survive.
	ErrFailed = errors.New("etcd failed")
)
