// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// serverTimeout bounds an attempt at one of several servers.
	serverTimeout = 3 * time.Second
	// silentLimit is how long a server may leave sent data unacknowledged: then it counts as gone. A node's
	// heartbeat sends something every ten seconds.
	silentLimit = 10 * time.Second
)

// servers are the addresses at which the API is reached. All show certificates of one name, so any does.
type servers struct {
	path string // keeps the list

	mu    sync.Mutex
	first string   // what the machine was told when it joined; always known
	list  []string // what the cluster says
	last  string   // answered last
}

// newServers reads the list that an earlier process kept.
func newServers(first, path string) *servers {
	s := &servers{first: first, path: path, last: first}
	if raw, err := os.ReadFile(path); err == nil {
		_ = json.Unmarshal(raw, &s.list) // without it, first has to answer
	}
	return s
}

// order is in which order to try: the last that answered, the others of the list, the first of all.
func (s *servers) order() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return candidates(s.last, s.list, s.first)
}

// candidates leaves a last out that is neither in the list nor first: such a server was removed.
func candidates(last string, list []string, first string) []string {
	var out []string
	if last == first && len(list) == 0 || slices.Contains(list, last) {
		out = append(out, last)
	}
	for _, a := range append(slices.Clone(list), first) {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// learn takes the cluster's own list. One server is what the machine knows already.
func (s *servers) learn(list []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(list) == 0 || slices.Equal(list, s.list) {
		return nil
	}
	alone := len(list) == 1 && len(s.list) == 0
	s.list = slices.Clone(list)
	if alone {
		return nil
	}
	raw, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return writeFile(s.path, raw)
}

// dial connects to whichever server answers; the address that is asked for is one of theirs.
func (s *servers) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: serverTimeout, Control: limitSilence,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silentLimit / 2, Interval: silentLimit / 4, Count: 2},
	}
	var errs []error
	for _, address := range s.order() {
		conn, err := d.DialContext(ctx, network, address)
		if err == nil {
			s.mu.Lock()
			s.last = address
			s.mu.Unlock()
			return conn, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("no server answers: %w", errors.Join(errs...))
}

// limitSilence makes the kernel end a connection whose other side is silent (RFC 5482's user timeout).
func limitSilence(_, _ string, c syscall.RawConn) error {
	var err error
	if outer := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silentLimit.Milliseconds()))
	}); outer != nil {
		return outer
	}
	return err
}

// LearnServers tells the identity where the API is served, as HOST:PORT. It is kept for the next start.
func (i *Identity) LearnServers(list []string) error { return i.servers.learn(list) }

func serversPath(dir string) string { return filepath.Join(dir, "servers.json") }
