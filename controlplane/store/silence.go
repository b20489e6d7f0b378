// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// silentLimit is how long another member may leave what was sent to it unacknowledged: then the connection is ended,
	// and made anew. It is the time in which a member that leads no longer does, ten times over.
	silentLimit = 10 * time.Second
	// boundEvery is how often connections are looked for that have no such limit yet.
	boundEvery = 2 * time.Second
)

// boundSilence gives every connection between members a limit, until ctx ends. etcd means to, and does not: its
// transport for streams sets Dial, which net/http does not use beside DialContext (client/pkg/transport of 3.6). After a
// partition such a connection would stay until TCP sends again, which takes as long as the partition took, up to two
// minutes; meanwhile the member is away. etcd lets nobody else dial, so the process looks at its own sockets.
func (s *Store) boundSilence(ctx context.Context, at string) error {
	u, err := url.Parse(at)
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		return fmt.Errorf("port of %s: %w", at, err)
	}
	tick := time.NewTicker(boundEvery)
	defer tick.Stop()
	done := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if done, err = boundSockets(done, port); err != nil {
			return err
		}
	}
}

// boundSockets limits the silence of this process's TCP connections from or to a port. It returns the sockets that there
// are, by what the kernel calls them; those in done have been looked at.
func boundSockets(done map[string]bool, port int) (map[string]bool, error) {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return done, err
	}
	now := map[string]bool{}
	for _, e := range entries {
		name, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(name, "socket:") {
			continue // closed since, or something else
		}
		now[name] = true
		fd, err := strconv.Atoi(e.Name())
		if err != nil || done[name] {
			continue
		}
		if err := boundSocket(fd, port); err != nil && !errors.Is(err, fs.ErrClosed) {
			return now, fmt.Errorf("limit the silence of a connection between servers: %w", err)
		}
	}
	return now, nil
}

// boundSocket limits one. It works on a descriptor of its own: the other may meanwhile become another socket's.
func boundSocket(fd, port int) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fs.ErrClosed
	}
	defer unix.Close(own)
	if kind, err := unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || kind != unix.IPPROTO_TCP {
		return nil
	}
	here, hereErr := unix.Getsockname(own)
	there, thereErr := unix.Getpeername(own)
	if hereErr != nil || thereErr != nil || portOf(here) != port && portOf(there) != port {
		return nil // not connected, or another's
	}
	for _, option := range []struct{ name, value int }{
		{unix.TCP_USER_TIMEOUT, int(silentLimit.Milliseconds())},
		{unix.TCP_KEEPIDLE, int((silentLimit / 2).Seconds())},
		{unix.TCP_KEEPINTVL, int((silentLimit / 4).Seconds())},
	} {
		if err := unix.SetsockoptInt(own, unix.IPPROTO_TCP, option.name, option.value); err != nil {
			return err
		}
	}
	return unix.SetsockoptInt(own, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

func portOf(a unix.Sockaddr) int {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return a.Port
	case *unix.SockaddrInet6:
		return a.Port
	}
	return 0
}
