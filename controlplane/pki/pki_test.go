// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

func mustOpen(t *testing.T, dir string, now time.Time) *Authority {
	t.Helper()
	a, err := open(dir, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func leaf(t *testing.T, certPEM []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestReopenKeepsEverything(t *testing.T) {
	dir, now := filepath.Join(t.TempDir(), "pki"), time.Now()
	first := mustOpen(t, dir, now)
	read := func() map[string][]byte {
		out := map[string][]byte{}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			fi, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if fi.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %o", e.Name(), fi.Mode().Perm())
			}
			if out[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		return out
	}
	if _, err := first.ServerFiles("apiserver", "kube-apiserver", []string{"a", "10.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := first.FrontProxyClientFiles(); err != nil {
		t.Fatal(err)
	}
	files := read()
	second := mustOpen(t, dir, now)
	if _, err := second.ServerFiles("apiserver", "kube-apiserver", []string{"10.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := second.FrontProxyClientFiles(); err != nil {
		t.Fatal(err)
	}
	for name, data := range read() {
		if !bytes.Equal(files[name], data) {
			t.Errorf("%s changed", name)
		}
	}
	if fi, _ := os.Stat(dir); fi.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %o", fi.Mode().Perm())
	}
}

func TestServerAndClientMeet(t *testing.T) {
	a := mustOpen(t, t.TempDir(), time.Now())
	cert, key, err := a.IssueServer("server", []string{"127.0.0.1", "::1", "example.test"})
	if err != nil {
		t.Fatal(err)
	}
	serving, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		subject := r.TLS.PeerCertificates[0].Subject
		_, _ = w.Write([]byte(subject.CommonName + " of " + strings.Join(subject.Organization, ",")))
	}))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{serving}, ClientCAs: a.CAPool(), ClientAuth: tls.RequireAndVerifyClientCert}
	srv.StartTLS()
	defer srv.Close()

	cert, key, err = a.IssueClient("anna", []string{"x", "y"})
	if err != nil {
		t.Fatal(err)
	}
	client, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"127.0.0.1", "::1", "example.test"} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: a.CAPool(), Certificates: []tls.Certificate{client}, ServerName: name}}
		resp, err := (&http.Client{Transport: tr}).Get(srv.URL)
		if err != nil {
			t.Fatalf("as %s: %v", name, err)
		}
		var body bytes.Buffer
		_, _ = body.ReadFrom(resp.Body)
		resp.Body.Close()
		tr.CloseIdleConnections()
		if body.String() != "anna of x,y" {
			t.Errorf("server saw %q", body.String())
		}
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: a.CAPool(), Certificates: []tls.Certificate{client}, ServerName: "other.test"}}
	if _, err := (&http.Client{Transport: tr}).Get(srv.URL); err == nil {
		t.Error("a name that the certificate lacks was accepted")
	}
}

func TestReissue(t *testing.T) {
	now := time.Now()
	ca, other := mustOpen(t, t.TempDir(), now), mustOpen(t, t.TempDir(), now)
	issue := func(a *Authority) *x509.Certificate {
		c, _, err := a.IssueServer("cn", []string{"a", "b", "10.0.0.1"})
		if err != nil {
			t.Fatal(err)
		}
		return leaf(t, c)
	}
	have := issue(ca)
	client := clientTemplate("cn", nil)
	tests := map[string]struct {
		have, want *x509.Certificate
		at         time.Duration
		reason     string
	}{
		"same":              {have, serverTemplate("cn", []string{"a", "b", "10.0.0.1"}), 0, ""},
		"needs fewer":       {have, serverTemplate("cn", []string{"b"}), 0, ""},
		"new name":          {have, serverTemplate("cn", []string{"a", "c"}), 0, "lacks name c"},
		"new address":       {have, serverTemplate("cn", []string{"fd00::1"}), 0, "lacks address fd00::1"},
		"v4-mapped":         {have, serverTemplate("cn", []string{"::ffff:10.0.0.1"}), 0, ""},
		"other cn":          {have, serverTemplate("dn", nil), 0, "another name"},
		"other usage":       {have, client, 0, "another usage"},
		"other groups":      {have, &x509.Certificate{Subject: pkix.Name{CommonName: "cn", Organization: []string{"g"}}}, 0, "other groups"},
		"before two thirds": {have, serverTemplate("cn", nil), leafLife*2/3 - time.Hour, ""},
		"after two thirds":  {have, serverTemplate("cn", nil), leafLife*2/3 + time.Hour, "two thirds of its life are over"},
		"clock went back":   {have, serverTemplate("cn", nil), -time.Hour, "not valid yet"},
		"other authority":   {issue(other), serverTemplate("cn", nil), 0, "signed by another authority"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := reissue(tt.have, tt.want, ca.ca.cert, now.Add(tt.at)); got != tt.reason {
				t.Errorf("got %q, want %q", got, tt.reason)
			}
		})
	}
}

func TestKeepRenewsAndRepairs(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	a := mustOpen(t, dir, now)
	files, err := a.ServerFiles("s", "cn", []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	old := read(t, files.Cert)
	a = mustOpen(t, dir, now.Add(300*24*time.Hour))
	if _, err := a.ServerFiles("s", "cn", []string{"a"}); err != nil {
		t.Fatal(err)
	}
	renewed := read(t, files.Cert)
	if bytes.Equal(old, renewed) {
		t.Error("not renewed after 300 of 365 days")
	}
	_, oldKey := pem.Decode(old)
	other, _ := pem.Decode(renewed)
	for damage, content := range map[string][]byte{
		"another certificate's key": append(pem.EncodeToMemory(other), oldKey...),
		"cut off":                   renewed[:len(renewed)/2],
		"empty":                     nil,
	} {
		if err := os.WriteFile(files.Cert, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := a.ServerFiles("s", "cn", []string{"a"}); err != nil {
			t.Fatal(err)
		}
		if _, err := tls.LoadX509KeyPair(files.Cert, files.Key); err != nil {
			t.Errorf("%s: %v", damage, err)
		}
	}
}

// A server that runs reads its certificate again as soon as the file changes: it must never find a
// certificate with the key of another.
func TestReplacedPairIsNeverHalf(t *testing.T) {
	a := mustOpen(t, t.TempDir(), time.Now())
	files, err := a.ServerFiles("s", "cn", nil)
	if err != nil {
		t.Fatal(err)
	}
	if files.Cert != files.Key {
		t.Fatalf("certificate in %s, key in %s: a reader can see one new and one old", files.Cert, files.Key)
	}
	done := make(chan error, 1)
	go func() {
		for i := range 100 {
			if _, err := a.ServerFiles("s", "cn", []string{fmt.Sprint(i)}); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		pair := read(t, files.Cert)
		if _, err := tls.X509KeyPair(pair, pair); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestDamagedAuthorityIsAnErrorNotANewOne(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"key gone":        func(dir string) error { return os.Remove(dir + "/ca.key") },
		"certificate bad": func(dir string) error { return os.WriteFile(dir+"/ca.crt", []byte("x"), 0o600) },
		"key of another": func(dir string) error {
			data, err := os.ReadFile(dir + "/front-proxy-ca.key")
			if err != nil {
				return err
			}
			return os.WriteFile(dir+"/ca.key", data, 0o600)
		},
		"service account key bad": func(dir string) error { return os.WriteFile(dir+"/service-account.key", []byte("x"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			mustOpen(t, dir, time.Now())
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			_, err := Open(dir)
			if err == nil || !strings.Contains(err.Error(), "restore") {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

func TestExpiredAuthority(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	mustOpen(t, dir, now)
	if _, err := open(dir, func() time.Time { return now.Add(caLife + time.Hour) }); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("Open: %v", err)
	}
	// A leaf never outlives its authority.
	a := mustOpen(t, dir, now.Add(caLife-time.Hour))
	c, _, err := a.IssueClient("u", nil)
	if err != nil {
		t.Fatal(err)
	}
	if leaf(t, c).NotAfter.After(a.ca.cert.NotAfter) {
		t.Error("leaf outlives its authority")
	}
}

func TestWriteKubeconfig(t *testing.T) {
	a := mustOpen(t, t.TempDir(), time.Now())
	cert, key, err := a.IssueClient("admin", []string{"system:masters"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "etc", "kubeconfig")
	for range 2 {
		if err := WriteKubeconfig(path, "https://127.0.0.1:6443", a.CAPEM(), cert, key); err != nil {
			t.Fatal(err)
		}
	}
	if fi, _ := os.Stat(path); fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", fi.Mode().Perm())
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Host != "https://127.0.0.1:6443" || !bytes.Equal(cfg.CAData, a.CAPEM()) || !bytes.Equal(cfg.CertData, cert) {
		t.Errorf("config %+v", cfg)
	}
	left, _ := filepath.Glob(filepath.Dir(path) + "/.*")
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
