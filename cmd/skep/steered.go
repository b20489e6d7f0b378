// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// steered listens where only the kernel's socket lookup finds it, and has the data plane hand it
// the connections to port.
func (a *agent) steered(ctx context.Context, port uint16) (net.Listener, error) {
	l, err := listenSteered()
	if err != nil {
		return nil, fmt.Errorf("ingress port %d: %w", port, err)
	}
	if err := a.dataplane.SteerIngress(ctx, port, l); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// listenSteered opens a listener on loopback and a port of the kernel's choice that takes
// connections of both families from a socket lookup program. bpf_sk_assign refuses IPv4 connections
// to a socket that is for IPv6 only, and binding to ::1 makes one so; ::ffff:127.0.0.1 does not
// (__inet6_bind). Package net would open a plain IPv4 socket for that address.
func listenSteered() (*net.TCPListener, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return listenSteered4()
	}
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "ingress")
	defer file.Close() // FileListener duplicates it
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	mapped := unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}}
	if err := unix.Bind(fd, &mapped); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// listenSteered4 serves a kernel without IPv6.
func listenSteered4() (*net.TCPListener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // a socket map takes plain TCP only
	l, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}
