// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"skep.io/skep/controlplane/pki"
)

func TestAdmit(t *testing.T) {
	one := Member{Name: "a", URL: "https://1:2380", Self: true, Leader: true}
	two := Member{Name: "b", URL: "https://2:2380"}
	for name, c := range map[string]struct {
		all []Member
		add bool
		ok  bool
	}{
		"second":              {[]Member{one}, true, true},
		"asks again":          {[]Member{one, {URL: "https://9:2380", Learner: true}}, false, true},
		"name taken":          {[]Member{one, {Name: "n", URL: "https://3:2380"}}, false, false},
		"address taken":       {[]Member{one, {Name: "x", URL: "https://9:2380"}}, false, false},
		"another is joining":  {[]Member{one, {URL: "https://3:2380", Learner: true}}, false, false},
		"another catches up":  {[]Member{one, {Name: "c", URL: "https://3:2380", Learner: true}}, false, false},
		"nobody can reach us": {[]Member{{Name: "skep", URL: "http://127.0.0.1:0", Self: true}}, false, false},
		"there are enough":    {[]Member{one, two, two, two, two, two, two}, false, false},
		"a third beside two":  {[]Member{one, two}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			if add, err := admit(c.all, "n", "https://9:2380"); add != c.add || (err == nil) != c.ok {
				t.Errorf("add %v, %v", add, err)
			}
		})
	}
}

// peer is a member of a cluster on loopback.
type peer struct {
	dir string
	*Store
	cfg Cluster
}

func (p *peer) open(t *testing.T) {
	t.Helper()
	var err error
	if p.Store, err = Open(t.Context(), Config{DataDir: p.dir, Cluster: &p.cfg}); err != nil {
		t.Fatal(err)
	}
	s := p.Store
	t.Cleanup(func() { _ = s.Close() })
}

// newPeer makes a member with a certificate of the authority in tls.
func newPeer(t *testing.T, name string, ca *pki.Authority) *peer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := "https://" + l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := ca.PeerFiles(name, []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	return &peer{dir: t.TempDir(), cfg: Cluster{Name: name, URL: at, CertFile: files.Cert, CAFile: ca.PeerCAFile()}}
}

func authority(t *testing.T) *pki.Authority {
	t.Helper()
	a, err := pki.Open(filepath.Join(t.TempDir(), "tls"))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSingleGrowsToThreeAndSurvivesALoss(t *testing.T) {
	if inChild(t) { // a member that was removed leaves goroutines of etcd's behind
		return
	}
	ctx, ca := t.Context(), authority(t)
	a := newPeer(t, "a", ca)
	single := open(t, a.dir)
	put(t, single, "before", "1")
	if err := single.Close(); err != nil {
		t.Fatal(err)
	}
	a.open(t)
	peers := []*peer{a}
	for _, name := range []string{"b", "c"} {
		p := newPeer(t, name, ca)
		var err error
		if p.cfg.Initial, err = a.Add(ctx, name, p.cfg.URL); err != nil {
			t.Fatal(err)
		}
		if again, err := a.Add(ctx, name, p.cfg.URL); err != nil || fmt.Sprint(again) != fmt.Sprint(p.cfg.Initial) {
			t.Errorf("asked again: %v, %v", again, err)
		}
		p.open(t)
		peers = append(peers, p)
	}
	b, c := peers[1], peers[2]
	all, err := b.Members(ctx)
	if err != nil || len(all) != 3 {
		t.Fatalf("members %+v, %v", all, err)
	}
	for i, m := range all {
		if m.Learner || m.Name != peers[i].cfg.Name || m.URL != peers[i].cfg.URL || m.Self != (m.Name == "b") {
			t.Errorf("member %+v", m)
		}
	}
	if v := get(t, c.Store, "before"); v != "1" {
		t.Errorf("the last member reads %q", v)
	}

	// The one goes that was there first, and the others go on; it returns and has what it missed.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	put(t, c.Store, "while away", "1")
	a.open(t)
	if v := get(t, a.Store, "while away"); v != "1" {
		t.Errorf("who was away reads %q", v)
	}

	if err := b.Remove(ctx, "b"); err == nil {
		t.Error("a member removed itself")
	}
	if err := b.Remove(ctx, "nobody"); err == nil {
		t.Error("a member was removed that there is not")
	}
	if err := b.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	<-c.Failed()
	if !errors.Is(c.Err(), ErrRemoved) {
		t.Errorf("who was removed says %v", c.Err())
	}
	put(t, b.Store, "after", "1")
	if v := get(t, a.Store, "after"); v != "1" {
		t.Errorf("a reads %q", v)
	}
	// It stays out.
	_ = c.Close()
	if s, err := Open(ctx, Config{DataDir: c.dir, Cluster: &c.cfg}); !errors.Is(err, ErrRemoved) {
		t.Errorf("who was removed starts again: %v", err)
		_ = s.Close()
	}
}

func TestStrangersAreNoPeers(t *testing.T) {
	ca := authority(t)
	a := newPeer(t, "a", ca)
	a.open(t)
	addr := a.cfg.URL[len("https://"):]
	pair := func(cert, key []byte) tls.Certificate {
		c, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// A node's certificate, or an administrator's, is of the cluster, but of no member.
	cert, key, err := ca.IssueClient("system:node:x", []string{"system:nodes"})
	if err != nil {
		t.Fatal(err)
	}
	files, err := ca.PeerFiles("a", []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile(files.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		certificates []tls.Certificate
		ok           bool
	}{
		"nobody": {nil, false}, "a node": {[]tls.Certificate{pair(cert, key)}, false}, "a member": {[]tls.Certificate{pair(own, own)}, true},
	} {
		conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, Certificates: c.certificates}}).DialContext(context.Background(), "tcp", addr)
		if err == nil {
			// TLS 1.3 tells a client that it is refused with its first read.
			_, err = fmt.Fprintf(conn, "GET /version HTTP/1.0\r\n\r\n")
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
			_ = conn.Close()
		}
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A member that starts again after many writes says nothing of etcd's refusing itself meanwhile.
func TestRestartAfterManyWrites(t *testing.T) {
	a := newPeer(t, "a", authority(t))
	a.open(t)
	writes, ctx := errgroup.WithContext(t.Context())
	writes.SetLimit(64)
	for i := range 7000 { // more than the 5,000 that etcd allows itself
		writes.Go(func() error {
			_, err := a.Client().Put(ctx, fmt.Sprint("k", i), "v")
			return err
		})
	}
	if err := writes.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	s, err := Open(t.Context(), Config{DataDir: a.dir, Cluster: &a.cfg, Log: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Fatal(err)
	}
	if v := get(t, s, "k0"); v != "v" {
		t.Errorf("k0 is %q", v)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(said.String(), "failed to publish") {
		t.Errorf("%d lines: %.2000s", strings.Count(said.String(), "\n"), said.String())
	}
}
