// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"

	"skep.io/skep/controlplane/pki"
)

// foreign is an etcd that others run: on loopback, for clients with a certificate of the authority.
func foreign(t *testing.T, ca *pki.Authority) (at string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	self := url.URL{Scheme: "https", Host: l.Addr().String()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := ca.ServerFiles("etcd", "etcd", []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := etcdConfig(t.TempDir())
	cfg.TickMs, cfg.ElectionMs, cfg.LogLevel = 10, 100, "fatal"
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{self}, []url.URL{self}
	cfg.ClientTLSInfo = transport.TLSInfo{CertFile: files.Cert, KeyFile: files.Key, TrustedCAFile: ca.CAFile(), ClientCertAuth: true}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd does not start")
	}
	return self.String()
}

func TestExternal(t *testing.T) {
	ca, other := authority(t), authority(t)
	at := foreign(t, ca)
	client, err := ca.ClientFiles("etcd-client", "skep", nil)
	if err != nil {
		t.Fatal(err)
	}
	fits := External{Endpoints: []string{at}, CAFile: ca.CAFile(), CertFile: client.Cert, KeyFile: client.Key}
	open := func(ctx context.Context, e External) (*Store, error) {
		return Open(ctx, Config{DataDir: t.TempDir(), External: &e})
	}
	s, err := open(t.Context(), fits)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "a", "b")
	if got := get(t, s, "a"); got != "b" {
		t.Errorf("got %q", got)
	}
	// What is the etcd's own business.
	if _, err := s.Snapshot(t.Context(), &bytes.Buffer{}); !errors.Is(err, ErrExternal) {
		t.Error(err)
	}
	if _, err := s.Members(t.Context()); !errors.Is(err, ErrExternal) {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "x"); !errors.Is(err, ErrExternal) {
		t.Error(err)
	}
	// Who does not fit, or is one too many, is told why.
	strange, bare := fits, fits
	strange.CAFile = other.CAFile()
	bare.CertFile, bare.KeyFile = "", ""
	for says, e := range map[string]External{"another server of skep uses it": fits, "unknown authority": strange, "certificate required": bare} {
		brief, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		if second, err := open(brief, e); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q, got %v", says, err)
			if err == nil {
				_ = second.Close()
			}
		}
		cancel()
	}
	// One that stops leaves it to the next at once.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = open(t.Context(), fits); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, "a"); got != "b" {
		t.Errorf("got %q after another start", got)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A member shows the certificate that its file has at that moment, and goes on.
func TestMemberCertificateIsRenewed(t *testing.T) {
	ca := authority(t)
	p := newPeer(t, "a", ca)
	p.open(t)
	shown := func() string {
		t.Helper()
		pair, err := tls.LoadX509KeyPair(p.cfg.CertFile, p.cfg.CertFile)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := tls.Dial("tcp", p.cfg.URL[len("https://"):], &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := shown()
	if again := shown(); again != before {
		t.Error("the certificate changes by itself")
	}
	put(t, p.Store, "a", "b")
	if err := os.Remove(p.cfg.CertFile); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.PeerFiles("a", []string{"127.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	if shown() == before {
		t.Error("the certificate of before is shown")
	}
	if got := get(t, p.Store, "a"); got != "b" {
		t.Errorf("got %q", got)
	}
}
