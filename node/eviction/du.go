// SPDX-License-Identifier: Apache-2.0

package eviction

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how deep a tree is looked into: each level holds a descriptor open. A path that the kernel takes in one
// call has no more than 2,048.
const maxDepth = 2048

// Tree is what a tree of files takes.
type Tree struct{ Bytes, Inodes int64 }

// DiskUsage adds up what a tree takes on its own file system; 0 if there is none. Files with several names count once. The
// tree may be a hostile container's, which changes it meanwhile: no link is followed, and nothing but directories is opened.
func DiskUsage(ctx context.Context, root string) (Tree, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return Tree{}, nil
	}
	if err != nil {
		return Tree{}, fmt.Errorf("disk usage of %s: %w", root, err)
	}
	dir := os.NewFile(uintptr(fd), root)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Tree{}, errors.Join(fmt.Errorf("disk usage of %s: %w", root, err), dir.Close())
	}
	w := walk{ctx: ctx, device: st.Dev, linked: map[uint64]bool{}}
	w.add(&st)
	err = w.dir(dir, 0)
	return w.sum, err
}

type walk struct {
	ctx    context.Context
	device uint64
	linked map[uint64]bool // inodes with several names that were counted
	sum    Tree
}

func (w *walk) add(st *unix.Stat_t) {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		if w.linked[st.Ino] {
			return
		}
		w.linked[st.Ino] = true
	}
	w.sum.Bytes += st.Blocks * 512 // what stat(2) counts in, whatever the file system's blocks are
	w.sum.Inodes++
}

// dir adds what is in d, and closes it.
func (w *walk) dir(d *os.File, depth int) (err error) {
	defer func() { err = errors.Join(err, d.Close()) }()
	for {
		names, err := d.Readdirnames(1000)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("disk usage: %w", err)
		}
		if w.ctx.Err() != nil {
			return w.ctx.Err()
		}
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(d.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				continue // it has gone meanwhile
			}
			if st.Dev != w.device {
				continue
			}
			w.add(&st)
			if st.Mode&unix.S_IFMT != unix.S_IFDIR || depth >= maxDepth {
				continue
			}
			fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				continue // it has gone, or is something else by now
			}
			if err := w.dir(os.NewFile(uintptr(fd), filepath.Join(d.Name(), name)), depth+1); err != nil {
				return err
			}
		}
	}
}
