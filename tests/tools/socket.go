// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket holds a connection's socket in the kernel for as long as it wants to know where it leads: a program at
// connect() may have sent it elsewhere than its owner asked, and tells its owner what was asked for.
type socket struct {
	fd    int // a second descriptor; 0: none
	inode uint64
}

// hold is a net.Dialer's Control.
func (s *socket) hold(_, _ string, c syscall.RawConn) error {
	var err error
	outer := c.Control(func(fd uintptr) {
		var stat unix.Stat_t
		if err = unix.Fstat(int(fd), &stat); err != nil {
			return
		}
		s.release()
		s.inode = stat.Ino
		s.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
	})
	if outer != nil {
		return outer
	}
	return err
}

func (s *socket) release() {
	if s.fd != 0 {
		_ = unix.Close(s.fd)
	}
	s.fd = 0
}

// peer is the address that the socket is connected, or connecting, to; "" if it no longer is.
func (s *socket) peer() string {
	for _, table := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		if peer := peerIn(table, s.inode); peer != "" {
			return peer
		}
	}
	return ""
}

// peerIn looks a socket up in a table of proc_net_tcp's form (Documentation/networking/proc_net_tcp.rst).
func peerIn(table string, inode uint64) string {
	f, err := os.Open(table)
	if err != nil {
		return ""
	}
	defer f.Close()
	const remote, number = 2, 9 // fields
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > number && fields[number] == fmt.Sprint(inode) {
			address, _, _ := strings.Cut(fields[remote], ":")
			return wordsAddress(address)
		}
	}
	return ""
}

// wordsAddress reads an address that is printed as 32-bit words of a little-endian machine.
func wordsAddress(text string) string {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw)%4 != 0 {
		return ""
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	address, ok := netip.AddrFromSlice(raw)
	if !ok || address.IsUnspecified() {
		return ""
	}
	return address.Unmap().String()
}
