// SPDX-License-Identifier: Apache-2.0

// Package dns answers the DNS questions of a node's pods: about the cluster from the Services and
// EndpointSlices that the agent watches anyway, about everything else by asking the servers that
// the host uses.
//
// One writer (watch.go) keeps a table (table.go) that questions read without locks (answer.go).
// Everything else goes through a cache to other servers (forward.go, upstreams.go). The package
// also says what stands in a pod's resolv.conf (resolvconf.go).
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/informers"
)

const (
	// tcpConnections bounds the TCP connections that are open at a time, on each address.
	tcpConnections = 512
	tcpIdle        = 10 * time.Second
	// questionSize is the largest question that is read from a datagram.
	questionSize = 4096
	// drain is how long questions that are being answered may take when the server ends.
	drain = 2 * time.Second
)

// Config says where and from what to answer. Addrs, Domain, Informers and Log are required.
type Config struct {
	Addrs  []netip.Addr // to listen on; they may appear on the host later
	Port   int          // 53 if zero, any free one if negative
	Domain string       // the cluster's, such as cluster.local
	// Informers for Services, EndpointSlices and Namespaces.
	Informers informers.SharedInformerFactory
	NodeName  string
	// Prefixes are the cluster's address ranges (pods and services). Reverse questions about them
	// are never forwarded.
	Prefixes []netip.Prefix
	// Upstreams are servers ("address" or "address:port") to forward to. If empty, those in
	// ResolvConfPath are used, and followed as it changes.
	Upstreams      []string
	ResolvConfPath string // SystemResolvConf if empty
	Log            *slog.Logger
	Metrics        prometheus.Registerer
	// Listening, if set, is called once with the addresses that are being answered on.
	Listening func([]netip.AddrPort)
}

// Run answers questions until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	if len(cfg.Addrs) == 0 || cfg.Domain == "" || cfg.Informers == nil || cfg.Log == nil {
		return errors.New("dns: Addrs, Domain, Informers and Log are required")
	}
	if cfg.ResolvConfPath == "" {
		cfg.ResolvConfPath = SystemResolvConf
	}
	switch {
	case cfg.Port == 0:
		cfg.Port = 53
	case cfg.Port < 0:
		cfg.Port = 0
	}
	log := cfg.Log
	sockets, err := listen(ctx, cfg.Addrs, cfg.Port, log)
	if err != nil {
		return err
	}
	defer sockets.close()

	servers, err := newUpstreams(cfg.Upstreams, cfg.ResolvConfPath, sockets.addresses, log)
	if err != nil {
		return err
	}
	m := newMetrics()
	forward := newForwarder(servers.servers, m)
	servers.change = forward.cache.clear // other servers may know other names
	if err := m.register(cfg.Metrics, forward); err != nil {
		return fmt.Errorf("dns: registering metrics: %w", err)
	}
	process := ctx
	group, ctx := errgroup.WithContext(process)
	h := &handler{
		zone:     &zone{domain: strings.ToLower(dns.Fqdn(cfg.Domain)), table: &table{}},
		forward:  forward,
		prefixes: cfg.Prefixes,
		ready:    &atomic.Bool{},
		metrics:  m,
		ctx:      ctx,
	}
	w, err := newWatcher(h.zone.table, cfg.Informers, h.ready)
	if process.Err() != nil {
		return nil // and the informers may have ended before
	}
	if err != nil {
		return fmt.Errorf("dns: watching services: %w", err)
	}
	// The informers are everybody's: they must not end because this part does.
	cfg.Informers.Start(process.Done())
	group.Go(func() error { w.run(ctx); return nil })
	group.Go(func() error { servers.watch(ctx); return nil })
	for _, server := range sockets.servers(h) {
		group.Go(func() error {
			if err := server.ActivateAndServe(); err != nil && ctx.Err() == nil {
				return fmt.Errorf("dns: answering: %w", err)
			}
			return nil
		})
		group.Go(func() error {
			<-ctx.Done()
			shutdown, cancel := context.WithTimeout(context.Background(), drain)
			defer cancel()
			_ = server.ShutdownContext(shutdown) // what is not done by then is cut off
			sockets.close()                      // a server that had not begun yet ends by this
			return nil
		})
	}
	log.Info("answering DNS questions", "addresses", sockets.addresses, "domain", h.zone.domain, "node", cfg.NodeName)
	if cfg.Listening != nil {
		cfg.Listening(sockets.addresses)
	}
	return group.Wait()
}

// sockets are what we listen on; the nth of each belongs to the nth address.
type sockets struct {
	addresses []netip.AddrPort
	packets   []net.PacketConn
	listeners []net.Listener
}

func listen(ctx context.Context, addrs []netip.Addr, port int, log *slog.Logger) (s *sockets, err error) {
	s = &sockets{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, addr := range addrs {
		err := s.add(ctx, netip.AddrPortFrom(addr, uint16(port)))
		// Any free port may turn out to be free for UDP only.
		for range 10 {
			if port != 0 || !errors.Is(err, unix.EADDRINUSE) {
				break
			}
			err = s.add(ctx, netip.AddrPortFrom(addr, 0))
		}
		if errors.Is(err, unix.EAFNOSUPPORT) {
			log.Warn("the host has no such address family: not answering there", "address", addr)
			continue
		}
		if err != nil {
			return s, err
		}
	}
	if len(s.addresses) == 0 {
		return s, fmt.Errorf("dns: none of the addresses %v can be listened on: the host lacks their address families", addrs)
	}
	return s, nil
}

// add listens on one address, by UDP and TCP on the same port.
func (s *sockets) add(ctx context.Context, address netip.AddrPort) error {
	config := net.ListenConfig{Control: freeBind}
	packets, err := config.ListenPacket(ctx, "udp", address.String())
	if err != nil {
		return listenError(address, err)
	}
	address = netip.AddrPortFrom(address.Addr(), packets.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	listener, err := config.Listen(ctx, "tcp", address.String())
	if err != nil {
		_ = packets.Close() // nothing was received on it yet
		return listenError(address, err)
	}
	s.packets = append(s.packets, packets)
	s.listeners = append(s.listeners, netutil.LimitListener(listener, tcpConnections))
	s.addresses = append(s.addresses, address)
	return nil
}

func listenError(address netip.AddrPort, err error) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("dns: %s is taken: stop the other DNS server there (ss -lnptu 'sport = %d' shows it): %w", address, address.Port(), err)
	}
	return fmt.Errorf("dns: listening on %s: %w", address, err)
}

// freeBind allows listening on an address that the host does not have yet.
func freeBind(network, _ string, c syscall.RawConn) error {
	var option error
	err := c.Control(func(fd uintptr) {
		if strings.HasSuffix(network, "6") {
			option = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		} else {
			option = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
		}
	})
	return errors.Join(err, option)
}

func (s *sockets) servers(h dns.Handler) []*dns.Server {
	var all []*dns.Server
	for i := range s.addresses {
		all = append(all,
			&dns.Server{PacketConn: s.packets[i], Handler: h, UDPSize: questionSize},
			&dns.Server{Listener: s.listeners[i], Handler: h, IdleTimeout: func() time.Duration { return tcpIdle }, ReadTimeout: tcpIdle})
	}
	return all
}

func (s *sockets) close() {
	for _, c := range s.packets {
		_ = c.Close() // closed already when the server ended
	}
	for _, l := range s.listeners {
		_ = l.Close()
	}
}
