// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	roomLeft  = 512 << 20 // bytes of the disk that images never take, or
	roomShare = 20        // one part of so many of it, if that is less
	roomCheck = 100 * time.Millisecond
)

// errNoRoom means that an image does not fit: by mistake, or because it is made to fill disks.
var errNoRoom = errors.New("it does not fit")

// short says whether so few bytes of a disk are left that no more image may go there.
func short(dir string, left, size int64) error {
	if keep := min(roomLeft, size/roomShare); left < keep {
		return fmt.Errorf("%w: only %d MiB are left on the disk of %s, of which %d MiB are kept free of images; make room there, or use a smaller image",
			errNoRoom, left>>20, dir, keep>>20)
	}
	return nil
}

// withinRoom ends the context, with an errNoRoom as its cause, as soon as the disk of dir is short. A layer says
// nothing true about how large it gets, and a full disk has no event: so the disk is looked at while one is unpacked.
func withinRoom(ctx context.Context, dir string) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(roomCheck)
		defer tick.Stop()
		for {
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				cancel(fmt.Errorf("disk of %s: %w", dir, err))
				return
			}
			if err := short(dir, int64(fs.Bavail)*fs.Bsize, int64(fs.Blocks)*fs.Bsize); err != nil {
				cancel(err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return ctx, func() { cancel(nil); <-done }
}

// noRoom is why a pull failed, if that was for want of room: it may have been faster than withinRoom looks, and
// what it had written is gone by now.
func noRoom(ctx context.Context, dir string, err error) error {
	if full := context.Cause(ctx); errors.Is(full, errNoRoom) {
		return full
	}
	if strings.Contains(err.Error(), unix.ENOSPC.Error()) { // its type was lost on the way
		return fmt.Errorf("%w on the disk of %s; make room there, or use a smaller image: %w", errNoRoom, dir, err)
	}
	return err
}
