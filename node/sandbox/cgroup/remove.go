// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Remove kills what runs in the group and removes it, with those below it, from every hierarchy.
// A group that does not exist is no error.
func Remove(ctx context.Context, group string) error {
	if filepath.Clean("/"+group) == "/" {
		return errors.New("refusing to remove the root cgroup")
	}
	all, err := Hierarchies()
	if err != nil {
		return err
	}
	pids, err := Processes(group)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, h := range all {
		if err := removeTree(ctx, h.Path(group)); err != nil {
			return fmt.Errorf("cgroup %s: %w", group, err)
		}
	}
	return nil
}

// removeTree retries while the kernel is still reaping killed processes, which it tells nobody
// about in version 1.
func removeTree(ctx context.Context, dir string) error {
	wait := time.Millisecond
	for {
		err := tryRemove(dir)
		if err == nil || !errors.Is(err, unix.EBUSY) || wait > 512*time.Millisecond {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(wait):
			wait *= 2
		}
	}
}

func tryRemove(dir string) error {
	if err := unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return skipGone(err)
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs) // children after their parents in the walk
	for _, d := range dirs {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "rmdir", Path: d, Err: err}
		}
	}
	return nil
}
