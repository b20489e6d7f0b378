// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// ErrExternal says that something is not this server's to do, because its store is elsewhere.
var ErrExternal = errors.New("the store is an etcd of its own (--etcd-servers): use its own tools, such as etcdctl")

// External is an etcd that others run, and that no other skep uses.
type External struct {
	Endpoints []string // https://HOST:PORT; http only on this host
	// CAFile has the authorities that signed etcd's certificates; without it, those that this host trusts. CertFile and
	// KeyFile are what this server shows, if any. They are read again for each connection.
	CAFile, CertFile, KeyFile string
}

const (
	externalDial = 10 * time.Second
	// externalClaim is how long a server that has died keeps others from its etcd.
	externalClaim = 15 * time.Second
	// claimKey says which server uses an etcd.
	claimKey = "/skep.io/server"
)

// Validate tells of everything that makes no sense, without asking anybody.
func (e External) Validate() error {
	var errs []error
	for _, text := range e.Endpoints {
		u, err := url.Parse(text)
		switch {
		case err != nil || u.Host == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "":
			errs = append(errs, fmt.Errorf("%q is not of the form https://HOST:2379", text))
		case u.Scheme == "https":
		case u.Scheme != "http":
			errs = append(errs, fmt.Errorf("%q is not of the form https://HOST:2379", text))
		case !isLoopback(u.Hostname()):
			errs = append(errs, fmt.Errorf("%s: all secrets of the cluster would be sent in the clear: etcd has to serve https", text))
		}
	}
	if (e.CertFile == "") != (e.KeyFile == "") {
		errs = append(errs, errors.New("a certificate for etcd needs its key, and a key its certificate"))
	}
	return errors.Join(errs...)
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// connect makes the client, and claims the etcd for this server. It returns when etcd has answered, ctx has ended, or
// another server uses it.
func (s *Store) connect(ctx context.Context, e External, log *slog.Logger) error {
	if err := e.Validate(); err != nil {
		return err
	}
	info := transport.TLSInfo{TrustedCAFile: e.CAFile, CertFile: e.CertFile, KeyFile: e.KeyFile}
	config, err := info.ClientConfig()
	if err != nil {
		return fmt.Errorf("certificates for etcd: %w", err)
	}
	cfg := clientv3.Config{
		Endpoints: e.Endpoints, TLS: config, DialTimeout: externalDial, DialKeepAliveTime: externalDial, DialKeepAliveTimeout: externalDial / 2,
		Logger: newLogger(log, s.failure),
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return fmt.Errorf("etcd at %s: %w", strings.Join(e.Endpoints, ", "), err)
	}
	if err := s.claim(ctx, client); err != nil {
		// gRPC tries again and again, and tells of no attempt.
		for _, endpoint := range e.Endpoints {
			if u, parsed := url.Parse(endpoint); parsed == nil && u.Scheme == "https" {
				err = errors.Join(err, refusedBy(u.Host, info))
			}
		}
		return errors.Join(fmt.Errorf("etcd at %s: %w", strings.Join(e.Endpoints, ", "), err), client.Close())
	}
	s.client = client
	return nil
}

// refusedBy says what a TLS server has against this client, or this client against it.
func refusedBy(address string, info transport.TLSInfo) error {
	config, err := info.ClientConfig()
	if err != nil {
		return err
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: externalDial / 5}, "tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	// TLS 1.3 tells a client that it is refused with its first read; a server that is content says nothing.
	if err := conn.SetReadDeadline(time.Now().Add(externalDial / 10)); err != nil {
		return err
	}
	if _, err = conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// claim takes the etcd for this server as long as it lives: two that do not know of each other would undo each other's work.
func (s *Store) claim(ctx context.Context, client *clientv3.Client) error {
	first, cancel := context.WithTimeout(ctx, externalDial)
	defer cancel()
	if _, err := client.Get(first, claimKey); err != nil {
		return fmt.Errorf("it does not answer as it should: %w; is it there, and do --etcd-cafile, --etcd-certfile and --etcd-keyfile fit it?", err)
	}
	session, err := concurrency.NewSession(client, concurrency.WithTTL(int(externalClaim.Seconds())))
	if err != nil {
		return err
	}
	wait, stop := context.WithTimeout(ctx, externalClaim+externalDial)
	defer stop()
	if err := concurrency.NewMutex(session, claimKey).Lock(wait); err != nil {
		_ = session.Close() // the wait is what matters
		return fmt.Errorf("another server of skep uses it: one etcd is for one server (%w)", err)
	}
	s.session = session
	return nil
}

// watchClaim ends the store when the claim is lost.
func (s *Store) watchClaim(ctx context.Context) {
	select {
	case <-s.session.Done():
		if ctx.Err() == nil {
			s.failure.set(fmt.Errorf("etcd has not answered for %s, and another server might have taken over: start again", externalClaim))
		}
	case <-ctx.Done():
	}
}
