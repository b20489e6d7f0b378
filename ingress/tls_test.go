// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// tlsSecret makes a Secret with a fresh self-signed certificate for hosts.
func tlsSecret(t testing.TB, name string, hosts ...string) *corev1.Secret {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: hosts[0]}, DNSNames: hosts, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Type: corev1.SecretTypeTLS,
		Data: map[string][]byte{
			corev1.TLSCertKey:       pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
			corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		},
	}
}

func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }

// handshake returns whose certificate is served for a server name, and the protocol agreed on.
func (h *harness) handshake(serverName string, change func(*tls.Config)) (cn, protocol string, err error) {
	c := insecure()
	c.ServerName = serverName
	c.NextProtos = []string{"h2", "http/1.1"}
	if change != nil {
		change(c)
	}
	conn, err := tls.Dial("tcp", h.https, c)
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	s := conn.ConnectionState()
	return s.PeerCertificates[0].Subject.CommonName, s.NegotiatedProtocol, nil
}

func TestServerNameChoosesTheCertificate(t *testing.T) {
	h := start(t, nil,
		withTLS(ingress("a", rule{"a.example.com", "/", false, "app"}), "a", "a.example.com"),
		withTLS(ingress("w", rule{"*.example.com", "/", false, "app"}), "w", "*.example.com"),
		tlsSecret(t, "a", "a.example.com"), tlsSecret(t, "w", "*.example.com"), tlsSecret(t, "unrelated", "unrelated"))
	for name, want := range map[string]string{
		"a.example.com": "a.example.com", "b.example.com": "*.example.com", "c.b.example.com": "skep ingress fallback certificate", "": "skep ingress fallback certificate",
	} {
		if cn, protocol, err := h.handshake(name, nil); err != nil || cn != want || protocol != "h2" {
			t.Errorf("%q: %q %q %v, want %q", name, cn, protocol, err, want)
		}
	}
	if _, protocol, err := h.handshake("a.example.com", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }); err != nil || protocol != "http/1.1" {
		t.Errorf("http/1.1: %q %v", protocol, err)
	}
	if _, _, err := h.handshake("a.example.com", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS11 }); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
	// Least privilege: each look at Secrets names one.
	for _, action := range h.client.Actions() {
		if action.GetResource().Resource != "secrets" {
			continue
		}
		selector := ""
		switch a := action.(type) {
		case interface{ GetListOptions() metav1.ListOptions }:
			selector = a.GetListOptions().FieldSelector
		case interface{ GetWatchOptions() metav1.ListOptions }:
			selector = a.GetWatchOptions().FieldSelector
		}
		if selector != "metadata.name=a" && selector != "metadata.name=w" {
			t.Errorf("%s of Secrets with selector %q", action.GetVerb(), selector)
		}
	}
}

func TestCertificateIsReloaded(t *testing.T) {
	ctx := context.Background()
	h := start(t, nil, withTLS(ingress("a", rule{"a.com", "/", false, "app"}), "a", "a.com"))
	h.backends.set("app", app(t, named("app")))
	secrets := h.client.CoreV1().Secrets("default")
	is := func(want string) {
		t.Helper()
		eventually(t, "certificate "+want, func() bool {
			cn, _, err := h.handshake("a.com", nil)
			return err == nil && cn == want
		})
	}
	c := h.clientFor(insecure(), false)
	is("skep ingress fallback certificate")
	if resp, _ := get(t, c, "http://a.com/"); resp.StatusCode != 200 {
		t.Errorf("without a certificate there is no redirect: %d", resp.StatusCode)
	}
	event(t, h, "BadCertificate")
	if _, err := secrets.Create(ctx, tlsSecret(t, "a", "a.com"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("a.com")
	resp, _ := get(t, c, "http://a.com/x?y=1")
	if want := "https://a.com:" + h.https[strings.LastIndex(h.https, ":")+1:] + "/x?y=1"; resp.StatusCode != 308 || resp.Header.Get("Location") != want {
		t.Errorf("%d to %q, want %q", resp.StatusCode, resp.Header.Get("Location"), want)
	}
	renewed := tlsSecret(t, "a", "renewed", "a.com")
	if _, err := secrets.Update(ctx, renewed, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("renewed")
	broken := renewed.DeepCopy()
	broken.Data[corev1.TLSPrivateKeyKey] = []byte("junk")
	if _, err := secrets.Update(ctx, broken, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("skep ingress fallback certificate")
	if _, err := secrets.Update(ctx, renewed, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	is("renewed")
	if err := secrets.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	is("skep ingress fallback certificate")
}

// event waits for an event with a reason and returns how many there are.
func event(t *testing.T, h *harness, reason string) (n int) {
	t.Helper()
	eventually(t, "event "+reason, func() bool {
		list, err := h.client.CoreV1().Events("").List(context.Background(), metav1.ListOptions{})
		if err != nil {
			return false
		}
		n = 0
		for _, e := range list.Items {
			if e.Reason == reason && e.Source.Component == component {
				n += max(int(e.Count), 1)
			}
		}
		return n > 0
	})
	return n
}

func TestProblemsAreToldOnce(t *testing.T) {
	ctx := context.Background()
	wrongPort := service("app")
	wrongPort.Spec.Ports[0].Port = 81
	h := start(t, nil, ingress("i", rule{"a", "/", false, "missing"}, rule{"b", "/", false, "app"}), wrongPort)
	event(t, h, "ServiceNotFound")
	event(t, h, "PortNotFound")
	for i := range 5 {
		s := service("other")
		s.Name += string(rune('a' + i))
		if _, err := h.client.CoreV1().Services("default").Create(ctx, s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.client.CoreV1().Services("default").Create(ctx, service("missing"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Gone and back: that is news.
	eventually(t, "the Service to be seen", func() bool {
		_, err := h.server.services.Services("default").Get("missing")
		return err == nil
	})
	if n := event(t, h, "PortNotFound"); n != 1 {
		t.Errorf("%d events for one problem", n)
	}
}

func TestHTTP2Requests(t *testing.T) {
	h := start(t, nil, withTLS(ingress("a", rule{"a.com", "/", false, "app"}), "a", "a.com"), tlsSecret(t, "a", "a.com"))
	var seen *http.Request
	h.backends.set("app", app(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r.Clone(context.Background())
		_, _ = w.Write([]byte("two"))
	}))
	resp, body := get(t, h.clientFor(insecure(), true), "https://a.com/x")
	if resp.ProtoMajor != 2 || body != "two" || seen.ProtoMajor != 1 || seen.Host != "a.com" || seen.Header.Get("X-Forwarded-Proto") != "https" {
		t.Errorf("%s %q, backend saw %s %s %v", resp.Proto, body, seen.Proto, seen.Host, seen.Header)
	}
}
