// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"errors"
	"fmt"
	"net"
	"os"
)

// echoMain answers on one port over TCP and UDP: "HOSTNAME CLIENT: what came". It runs until it is killed.
func echoMain(args []string) error {
	if len(args) != 1 {
		return errors.New("echo: one address to listen on is needed")
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", tcp.Addr().String())
	if err != nil {
		return errors.Join(err, tcp.Close())
	}
	fmt.Println("echo on", tcp.Addr())
	failed := make(chan error, 2)
	go func() { failed <- echoTCP(tcp, name) }()
	go func() { failed <- echoUDP(udp, name) }()
	return errors.Join(<-failed, tcp.Close(), udp.Close())
}

func reply(name string, client net.Addr, message []byte) []byte {
	host, _, _ := net.SplitHostPort(client.String())
	return fmt.Appendf(nil, "%s %s: %s", name, host, message)
}

func echoTCP(l net.Listener, name string) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			buffer := make([]byte, 4096)
			for {
				n, err := conn.Read(buffer)
				if err != nil {
					return
				}
				if _, err := conn.Write(reply(name, conn.RemoteAddr(), buffer[:n])); err != nil {
					return
				}
			}
		}()
	}
}

func echoUDP(conn net.PacketConn, name string) error {
	buffer := make([]byte, 64<<10)
	for {
		n, client, err := conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		// A reply that cannot be sent is a lost datagram, which clients expect.
		_, _ = conn.WriteTo(reply(name, client, buffer[:n]), client)
	}
}
