// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/fsnotify/fsnotify"
)

// upstreams knows the servers to forward to: those given, or those of a resolv.conf, which is read
// again whenever it changes.
type upstreams struct {
	path   string // empty: servers never change
	own    []netip.AddrPort
	log    *slog.Logger
	list   atomic.Pointer[[]string]
	change func() // called after the servers changed
}

// newUpstreams reads the servers for the first time. given takes precedence over path.
func newUpstreams(given []string, path string, own []netip.AddrPort, log *slog.Logger) (*upstreams, error) {
	u := &upstreams{own: own, log: log, change: func() {}}
	u.list.Store(&[]string{})
	if len(given) == 0 {
		u.path = path
		u.load()
		return u, nil
	}
	servers := make([]string, 0, len(given))
	for _, server := range given {
		address, err := serverAddress(server)
		if err != nil {
			return nil, fmt.Errorf("upstream DNS server %q: %w: give an address, or address:port", server, err)
		}
		servers = append(servers, address.String())
	}
	servers = u.selfless(servers)
	u.list.Store(&servers)
	return u, nil
}

func (u *upstreams) servers() []string { return *u.list.Load() }

// load keeps what was there before when the file cannot be read: it is being replaced.
func (u *upstreams) load() {
	content, err := os.ReadFile(u.path)
	if err != nil {
		u.log.Warn("reading upstream DNS servers failed; the earlier ones stay", "path", u.path, "err", err)
		return
	}
	servers := []string{} // three at most: resolvers look at no more
	for _, server := range parseResolvConf(content).servers {
		if address, err := serverAddress(server); err == nil && len(servers) < maxNameservers {
			servers = append(servers, address.String())
		}
	}
	servers = u.selfless(servers)
	if before := u.servers(); slices.Equal(before, servers) {
		return
	}
	u.list.Store(&servers)
	u.log.Info("upstream DNS servers", "servers", servers, "path", u.path)
	u.change()
}

// selfless leaves out our own addresses: a question sent there would come back for ever.
func (u *upstreams) selfless(servers []string) []string {
	return slices.DeleteFunc(servers, func(server string) bool {
		address, err := netip.ParseAddrPort(server)
		if err != nil {
			return true
		}
		for _, own := range u.own {
			if own.Port() == address.Port() && (own.Addr() == address.Addr() || own.Addr().IsUnspecified() && isLocal(address.Addr())) {
				u.log.Warn("not forwarding DNS questions to ourselves", "server", server)
				return true
			}
		}
		return false
	})
}

func isLocal(address netip.Addr) bool {
	if address.IsLoopback() {
		return true
	}
	locals, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, local := range locals {
		if prefix, err := netip.ParsePrefix(local.String()); err == nil && prefix.Addr() == address {
			return true
		}
	}
	return false
}

// serverAddress adds port 53 where none is given.
func serverAddress(text string) (netip.AddrPort, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(address, 53), nil
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return netip.AddrPort{}, err
	}
	address, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(address, uint16(number)), nil
}

// watch reloads until ctx ends. It watches directories, since the file is usually replaced rather
// than written, and the one that a symbolic link leads to as well. Where that is not possible the
// servers stay as they are: the host may have run out of watches, and that must not end DNS.
func (u *upstreams) watch(ctx context.Context) {
	if u.path == "" {
		return
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		u.log.Warn("changes of upstream DNS servers are not followed: raise fs.inotify.max_user_instances", "path", u.path, "err", err)
		return
	}
	defer watcher.Close()
	watched := ""
	follow := func() {
		target, err := filepath.EvalSymlinks(u.path)
		if err != nil || filepath.Dir(target) == watched {
			return
		}
		if watched != "" && watched != filepath.Dir(u.path) {
			_ = watcher.Remove(watched) // it may be gone
		}
		watched = filepath.Dir(target)
		if err := watcher.Add(watched); err != nil {
			u.log.Warn("watching upstream DNS servers failed", "path", watched, "err", err)
		}
	}
	if err := watcher.Add(filepath.Dir(u.path)); err != nil {
		u.log.Warn("changes of upstream DNS servers are not followed", "path", u.path, "err", err)
		return
	}
	follow()
	u.load() // what changed before the watch began
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-watcher.Events:
			if name := filepath.Base(e.Name); name == filepath.Base(u.path) || filepath.Dir(e.Name) == watched {
				follow()
				u.load()
			}
		case err := <-watcher.Errors:
			u.log.Warn("watching upstream DNS servers", "path", u.path, "err", err)
			u.load() // events may have been lost
		}
	}
}
