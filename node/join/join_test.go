// SPDX-License-Identifier: Apache-2.0

package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/version"
	discoveryfake "k8s.io/client-go/discovery/fake"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skep.io/skep/api"
)

func TestTokenRoundTrip(t *testing.T) {
	want := Token{ID: "abc123", Secret: "0123456789abcdef"}
	want.Authority[0], want.Authority[31] = 0xab, 0xcd
	text := want.String()
	got, err := ParseToken(text)
	if err != nil || got != want || got.Bearer() != "abc123.0123456789abcdef" {
		t.Errorf("%s: %+v, %v", text, got, err)
	}
	for _, bad := range []string{"", text[1:], text + "0", strings.ToUpper(text), text[:len(text)-1], "\n" + text, strings.Replace(text, "skep1", "skep2", 1), want.Bearer()} {
		if _, err := ParseToken(bad); err == nil {
			t.Errorf("%q is a token", bad)
		} else if strings.Contains(err.Error(), want.Secret[:15]) {
			t.Errorf("the secret is in %v", err)
		}
	}
}

// authority signs for one test.
type authority struct {
	*testing.T
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := authority{T: t, key: key}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	a.ca = template
	a.ca = a.sign(template, key)
	return a
}

func (a authority) sign(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	a.Helper()
	return a.signFor(template, key.Public())
}

func (a authority) signFor(template *x509.Certificate, public any) *x509.Certificate {
	a.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, template, a.ca, public, a.key)
	if err != nil {
		a.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.Fatal(err)
	}
	return cert
}

// server makes the chain and key of a server of that name.
func (a authority) server(name string) tls.Certificate {
	a.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.Fatal(err)
	}
	leaf := a.sign(&x509.Certificate{
		DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().AddDate(1, 0, 0),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, a.ca.Raw}, PrivateKey: key, Leaf: leaf}
}

// listen is a server that shows a certificate and counts the bytes that come after the handshake.
func listen(t *testing.T, pair tls.Certificate) (*url.URL, *atomic.Int64) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var got atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				n, _ := io.Copy(io.Discard, conn) // the client breaks off
				got.Add(n)
			}()
		}
	}()
	return &url.URL{Scheme: "https", Host: l.Addr().String()}, &got
}

func TestPinnedAuthority(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	good, _ := listen(t, ours.server(serverName))
	got, err := pinnedAuthority(t.Context(), good, Pin(ours.ca))
	if err != nil || !got.Equal(ours.ca) {
		t.Errorf("the right server: %v", err)
	}
	forged := theirs.server(serverName)
	forged.Certificate[1] = ours.ca.Raw
	bare := ours.server(serverName)
	bare.Certificate = bare.Certificate[:1]
	for what, pair := range map[string]tls.Certificate{
		"a node of this cluster":              ours.server("node-1"),
		"another cluster":                     theirs.server(serverName),
		"our authority shown by another":      forged,
		"a server that shows no authority":    bare,
		"an authority in place of a server's": {Certificate: [][]byte{ours.ca.Raw}, PrivateKey: ours.key, Leaf: ours.ca},
	} {
		server, said := listen(t, pair)
		if _, err := pinnedAuthority(t.Context(), server, Pin(ours.ca)); !errors.Is(err, ErrAuthority) || said.Load() != 0 {
			t.Errorf("%s: %v, %d bytes sent", what, err, said.Load())
		}
	}
}

func TestWrongClock(t *testing.T) {
	a := newAuthority(t)
	leaf := a.server(serverName).Leaf
	for _, at := range []time.Time{time.Now().Add(-30 * time.Minute), time.Now().AddDate(2, 0, 0)} {
		if _, err := verifyPinned([]*x509.Certificate{leaf, a.ca}, Pin(a.ca), at); err == nil || !strings.Contains(err.Error(), "set the clock") || errors.Is(err, ErrAuthority) || !isAnswer(err) {
			t.Errorf("%s: %v", at, err)
		}
	}
}

// approver answers requests: with a certificate of that life, or with a refusal.
func (a authority) approver(refuse string, life *atomic.Int64) kubernetes.Interface {
	a.Helper()
	client := fake.NewClientset()
	requests := client.CertificatesV1().CertificateSigningRequests()
	w, err := requests.Watch(a.Context(), metav1.ListOptions{})
	if err != nil {
		a.Fatal(err)
	}
	done := make(chan struct{})
	a.Cleanup(func() { w.Stop(); <-done })
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			csr, ok := e.Object.(*certificatesv1.CertificateSigningRequest)
			if !ok || len(csr.Status.Conditions) > 0 || len(csr.Status.Certificate) > 0 {
				continue
			}
			csr = csr.DeepCopy()
			if refuse != "" {
				csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Message: refuse}}
			} else {
				block, _ := pem.Decode(csr.Spec.Request)
				r, err := x509.ParseCertificateRequest(block.Bytes)
				if err != nil {
					a.Error(err)
					return
				}
				now := time.Now()
				cert := a.signFor(&x509.Certificate{
					Subject: r.Subject, DNSNames: r.DNSNames, IPAddresses: r.IPAddresses, NotBefore: now, NotAfter: now.Add(time.Duration(life.Load())),
				}, r.PublicKey)
				csr.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
			}
			if _, err := requests.UpdateStatus(a.Context(), csr, metav1.UpdateOptions{}); err != nil && a.Context().Err() == nil {
				a.Error(err)
			}
		}
	}()
	return client
}

func (a authority) identity(client kubernetes.Interface) *Identity {
	a.Helper()
	dir := a.TempDir()
	i := newIdentity(Config{
		Server: &url.URL{Scheme: "https", Host: "x"}, NodeName: "n", NodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.7")},
		Dir: dir, Log: slog.New(slog.DiscardHandler),
	})
	i.trustThese(authorities{a.ca})
	i.api = client
	return i
}

// A machine that does not fit the server does not join it, nor one with a token for servers; both are told at once.
func TestDoesNotJoin(t *testing.T) {
	client := fake.NewClientset()
	client.Discovery().(*discoveryfake.FakeDiscovery).FakedServerVersion = &version.Info{GitVersion: "v1.30.0"}
	i := newAuthority(t).identity(nil)
	i.cfg.Fits = func(server string) error { return errors.New("too old: " + server) }
	if err := i.fits(client); !errors.Is(err, ErrRefused) || !isAnswer(err) || !strings.Contains(err.Error(), "too old: v1.30.0") {
		t.Error(err)
	}
	i.cfg.Fits = func(string) error { return nil }
	if err := i.fits(client); err != nil {
		t.Error(err)
	}
	for group, want := range map[string]bool{api.ServerBootstrapGroup: true, api.BootstrapGroup: false} {
		client.PrependReactor("create", "selfsubjectreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, &authenticationv1.SelfSubjectReview{Status: authenticationv1.SelfSubjectReviewStatus{UserInfo: authenticationv1.UserInfo{Groups: []string{"x", group}}}}, nil
		})
		if got := isForServers(t.Context(), client); got != want {
			t.Errorf("a token of %s is for servers: %v", group, got)
		}
	}
}

// Certificates come, are renewed when two thirds of their life are over and not before, and what is served
// is the newest.
func TestRenewal(t *testing.T) {
	a := newAuthority(t)
	var life atomic.Int64
	life.Store(int64(90 * time.Minute))
	i := a.identity(a.approver("", &life))
	start := time.Now()
	next, err := i.renew(t.Context(), start)
	if err != nil {
		t.Fatal(err)
	}
	// Certificates count in whole seconds.
	if next < time.Hour-2*time.Second || next > time.Hour {
		t.Errorf("the next look is in %s", next)
	}
	first, err := i.Serving()
	if err != nil || !slices.Equal(first.Leaf.DNSNames, []string{"n"}) || len(first.Leaf.IPAddresses) != 1 || first.Leaf.Subject.CommonName != "system:node:n" {
		t.Fatalf("serving certificate %+v, %v", first.Leaf, err)
	}
	if _, err := i.renew(t.Context(), start.Add(59*time.Minute)); err != nil {
		t.Fatal(err)
	}
	if same, _ := i.Serving(); !same.Leaf.Equal(first.Leaf) {
		t.Error("renewed before two thirds of its life were over")
	}
	life.Store(int64(200 * time.Hour))
	if next, err = i.renew(t.Context(), start.Add(61*time.Minute)); err != nil || next != lookAgain {
		t.Errorf("next look in %s, %v", next, err)
	}
	renewed, _ := i.Serving()
	if renewed.Leaf.Equal(first.Leaf) || renewed.Leaf.NotAfter.Before(start.Add(199*time.Hour)) {
		t.Errorf("not renewed: until %s", renewed.Leaf.NotAfter)
	}
	client, err := i.load(clientKind)
	if err != nil || client == nil || client.Leaf.NotAfter.Before(start.Add(199*time.Hour)) {
		t.Errorf("client certificate: %+v, %v", client, err)
	}
	// Nothing but certificates is left, and nobody else may read them.
	entries, err := os.ReadDir(i.cfg.Dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("in the directory: %v, %v", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, %v", e.Name(), info.Mode(), err)
		}
	}
}

// A refusal is told as it is, and the next attempt does not repeat the refused request.
func TestRefusal(t *testing.T) {
	a := newAuthority(t)
	i := a.identity(a.approver("because", nil))
	for range 2 {
		err := obtain(t.Context(), i.api, i.cfg.Dir, clientKind, "n", nil)
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "because") {
			t.Fatal(err)
		}
	}
	list, err := i.api.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 2 {
		t.Errorf("%d requests, %v", len(list.Items), err)
	}
}

// A machine that stops while it waits asks for the same again.
func TestSameRequestAfterACrash(t *testing.T) {
	dir := t.TempDir()
	first, err := pendingKey(filepath.Join(dir, "client.key"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := pendingKey(filepath.Join(dir, "client.key"))
	if err != nil || !first.Equal(second) {
		t.Errorf("another key: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "client.key"), []byte("half a k"), 0o600); err != nil {
		t.Fatal(err)
	}
	if third, err := pendingKey(filepath.Join(dir, "client.key")); err != nil || third.Equal(first) {
		t.Errorf("damaged file: %v", err)
	}
}

// A machine goes over to another authority while it runs: it trusts what the cluster says, has both certificates made
// anew once another one signs, and tells how far it is.
func TestAnotherAuthority(t *testing.T) {
	before, after := newAuthority(t), newAuthority(t)
	var life atomic.Int64
	life.Store(int64(time.Hour))
	i := before.identity(before.approver("", &life))
	if _, err := i.renew(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	is := func(stage, wantTrusted, wantSigner string) {
		t.Helper()
		if trusted, signer := i.Authorities(); trusted != wantTrusted || signer != wantSigner {
			t.Errorf("%s: trusts %s, signed by %s; want %s and %s", stage, trusted, signer, wantTrusted, wantSigner)
		}
	}
	learn := func(all ...authority) {
		t.Helper()
		var list authorities
		for _, a := range all {
			list = append(list, a.ca)
		}
		if err := i.LearnAuthorities(string(list.pem())); err != nil {
			t.Fatal(err)
		}
		if kept, err := os.ReadFile(filepath.Join(i.cfg.Dir, "ca.crt")); err != nil || string(kept) != string(list.pem()) {
			t.Errorf("kept %q, %v", kept, err)
		}
		select {
		case <-i.wake:
		default:
			t.Error("nobody is woken")
		}
	}
	old, young := ShortPin(before.ca), ShortPin(after.ca)
	is("at first", old, old)
	learn(before, after)
	if _, err := i.renew(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	is("prepared", old+","+young, old)
	i.api = after.approver("", &life)
	learn(after, before)
	if _, err := i.renew(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	is("switched", young+","+old, young)
	serving, err := i.Serving()
	if err != nil || serving.Leaf.CheckSignatureFrom(after.ca) != nil {
		t.Errorf("the serving certificate is the old one, %v", err)
	}
	learn(after)
	is("finished", young, young)
	// A token of before does not disturb the machine, one of another cluster does.
	for _, c := range []struct {
		named *x509.Certificate
		fits  bool
	}{{before.ca, true}, {after.ca, true}, {newAuthority(t).ca, false}} {
		again := newIdentity(i.cfg)
		again.cfg.Token = Token{Authority: Pin(c.named), ID: "abc123", Secret: "0123456789abcdef"}.String()
		if err := again.trust(t.Context()); (err == nil) != c.fits || err != nil && !errors.Is(err, ErrAuthority) {
			t.Errorf("token of %s: %v", ShortPin(c.named), err)
		}
	}
	for _, bad := range []string{"", "x", string(authorities{serving.Leaf}.pem())} {
		if err := i.LearnAuthorities(bad); err == nil {
			t.Errorf("%.20q is a list of authorities", bad)
		}
	}
	is("after nonsense", young, young)
}

// Connections are made with what is trusted at that moment.
func TestTransportTrusts(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ours.server(serverName)}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	i := theirs.identity(nil)
	i.servers.first = server.Listener.Addr().String()
	i.servers.last = i.servers.first
	client := &http.Client{Transport: i.reaches}
	ask := func() error {
		response, err := client.Get("https://x/")
		if err != nil {
			return err
		}
		return response.Body.Close()
	}
	if err := ask(); !errors.Is(err, ErrAuthority) {
		t.Errorf("a server of another authority: %v", err)
	}
	i.trustThese(authorities{theirs.ca, ours.ca})
	if err := ask(); err != nil {
		t.Error(err)
	}
	if err := i.LearnAuthorities(string(authorities{theirs.ca}.pem())); err != nil {
		t.Fatal(err)
	}
	if err := ask(); !errors.Is(err, ErrAuthority) {
		t.Errorf("the connection to a server that is not trusted any more is used: %v", err)
	}
	server.Close()
	i.connections.CloseAll()
}

// A certificate that is not for this node, its addresses or its cluster is as good as none.
func TestCertificatesThatDoNotDo(t *testing.T) {
	a := newAuthority(t)
	var life atomic.Int64
	life.Store(int64(time.Hour))
	i := a.identity(a.approver("", &life))
	if _, err := i.renew(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Identity){
		"another name":    func(i *Identity) { i.cfg.NodeName = "m" },
		"another address": func(i *Identity) { i.cfg.NodeIPs = append(i.cfg.NodeIPs, netip.MustParseAddr("2001:db8::1")) },
		"another cluster": func(i *Identity) { i.trustThese(authorities{newAuthority(t).ca}) },
	} {
		changed := newIdentity(i.cfg)
		changed.trustThese(i.trusted())
		change(changed)
		if have, err := changed.load(servingKind); have != nil || err != nil {
			t.Errorf("%s: the old certificate is used, %v", what, err)
		}
	}
	if have, err := i.load(servingKind); have == nil || err != nil {
		t.Errorf("the right one is not used: %v", err)
	}
}
