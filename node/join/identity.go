// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	dialTimeout = 10 * time.Second
	// firstRetry and lastRetry space attempts to reach a server that does not answer.
	firstRetry, lastRetry = 250 * time.Millisecond, 10 * time.Second
	// lookAgain bounds how long a step of the clock stays unnoticed.
	lookAgain = time.Hour
)

// Config of an Identity.
type Config struct {
	Server    *url.URL // https
	Token     string   // may be empty once the machine has joined
	NodeName  string
	NodeIPs   []netip.Addr // for the serving certificate
	Dir       string       // keeps ca.crt, client.pem and serving.pem
	UserAgent string
	Log       *slog.Logger
}

// Identity is a machine's membership.
type Identity struct {
	cfg     Config
	ca      *x509.Certificate
	client  kubernetes.Interface
	serving atomic.Pointer[tls.Certificate]
}

// Join returns once the machine has both certificates, from its directory or from the cluster. It waits
// for a server that does not answer, and gives up when one says no.
func Join(ctx context.Context, cfg Config) (*Identity, error) {
	i := &Identity{cfg: cfg}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	if err := i.trust(ctx); err != nil {
		return nil, fmt.Errorf("join the cluster at %s: %w", cfg.Server, err)
	}
	if err := i.becomeNode(ctx); err != nil {
		return nil, fmt.Errorf("join the cluster at %s: %w", cfg.Server, err)
	}
	var err error
	if i.client, err = kubernetes.NewForConfig(i.ClientConfig()); err != nil {
		return nil, err
	}
	if err := i.ensureServing(ctx); err != nil {
		return nil, fmt.Errorf("join the cluster at %s: %w", cfg.Server, err)
	}
	return i, nil
}

// trust learns the CA: the one that this machine knows, which a token must agree with, or the one that
// the token names.
func (i *Identity) trust(ctx context.Context) error {
	var token *Token
	if i.cfg.Token != "" {
		t, err := ParseToken(i.cfg.Token)
		if err != nil {
			return err
		}
		token = &t
	}
	path := filepath.Join(i.cfg.Dir, "ca.crt")
	data, err := os.ReadFile(path)
	switch {
	case err == nil:
		if i.ca, err = parseCertificate(data); err != nil {
			return fmt.Errorf("%s: %w; `skep reset` makes this machine new, and it can join again", path, err)
		}
		if token != nil && Pin(i.ca) != token.Authority {
			return fmt.Errorf("%w: this machine has joined a cluster with another certificate authority than the token's (%s): `skep reset` takes it out of that one", ErrAuthority, path)
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case token == nil:
		return errors.New("this machine has not joined a cluster yet: give it --token, which `skep token create` prints on a server")
	}
	err = i.patiently(ctx, func() (err error) {
		i.ca, err = pinnedAuthority(ctx, i.cfg.Server, token.Authority)
		return err
	})
	if err != nil {
		return err
	}
	return writeFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.ca.Raw}))
}

// becomeNode makes sure of a client certificate that is valid.
func (i *Identity) becomeNode(ctx context.Context) error {
	have, err := i.load(clientKind)
	if err != nil {
		return err
	}
	if have != nil && time.Now().Before(have.Leaf.NotAfter) {
		return nil
	}
	if i.cfg.Token == "" {
		return fmt.Errorf("the client certificate in %s is missing, of another node or expired: give --token once more", i.cfg.Dir)
	}
	token, err := ParseToken(i.cfg.Token)
	if err != nil {
		return err
	}
	config := i.baseConfig()
	config.BearerToken = token.Bearer()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	anybody, err := kubernetes.NewForConfig(i.baseConfig())
	if err != nil {
		return err
	}
	i.cfg.Log.Info("joining the cluster", "server", i.cfg.Server.String(), "node", i.cfg.NodeName)
	return i.patiently(ctx, func() error {
		// A server that has only just started refuses tokens that it has not read yet.
		if err := anybody.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
			return err
		}
		err := obtain(ctx, client, i.cfg.Dir, clientKind, i.cfg.NodeName, nil)
		if apierrors.IsUnauthorized(err) {
			return fmt.Errorf("the server does not accept the token %s: it has expired or was revoked; `skep token create` on a server makes another: %w", token.ID, err)
		}
		return err
	})
}

// ensureServing makes sure of a serving certificate.
func (i *Identity) ensureServing(ctx context.Context) error {
	have, err := i.load(servingKind)
	if err != nil {
		return err
	}
	if have == nil || time.Now().After(have.Leaf.NotAfter) {
		err = i.patiently(ctx, func() error {
			return obtain(ctx, i.client, i.cfg.Dir, servingKind, i.cfg.NodeName, i.cfg.NodeIPs)
		})
		if err != nil {
			return err
		}
		if have, err = i.load(servingKind); err != nil {
			return err
		}
	}
	i.serving.Store(have)
	return nil
}

// load reads a certificate of this machine. One that does not do is none.
func (i *Identity) load(k kind) (*tls.Certificate, error) {
	data, err := os.ReadFile(filepath.Join(i.cfg.Dir, k.name+".pem"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, nil
	}
	if why := lacks(pair.Leaf, k.template(i.cfg.NodeName, i.cfg.NodeIPs), i.ca); why != "" {
		i.cfg.Log.Info("certificate is not used", "certificate", k.name, "why", why)
		return nil, nil
	}
	return &pair, nil
}

// patiently repeats what fails for want of an answer, and returns the first answer.
func (i *Identity) patiently(ctx context.Context, try func() error) error {
	for delay := firstRetry; ; delay = min(2*delay, lastRetry) {
		err := try()
		if err == nil || isAnswer(err) || ctx.Err() != nil {
			return err
		}
		i.cfg.Log.Warn("the server cannot be asked, trying again", "server", i.cfg.Server.String(), "in", delay, "error", err)
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// isAnswer tells a server's "no" from one that is not there or not ready.
func isAnswer(err error) bool {
	if errors.Is(err, ErrAuthority) || errors.Is(err, ErrRefused) || errors.As(err, new(*x509.CertificateInvalidError)) {
		return true
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	// What is forbidden may come to be allowed: a new server grants roles after it has begun to serve.
	code := status.Status().Code
	return code >= 400 && code < 500 && code != 403 && code != 429 && code != 409
}

func (i *Identity) baseConfig() *rest.Config {
	return &rest.Config{
		Host: i.cfg.Server.String(), UserAgent: i.cfg.UserAgent, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{
			ServerName: serverName, CAFile: filepath.Join(i.cfg.Dir, "ca.crt"),
		},
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
	}
}

// ClientConfig reaches the API as this node. A renewed certificate is taken up without a restart: client-go
// reads the file again, and opens its connections anew.
func (i *Identity) ClientConfig() *rest.Config {
	config := i.baseConfig()
	path := filepath.Join(i.cfg.Dir, clientKind.name+".pem")
	config.CertFile, config.KeyFile = path, path
	return config
}

// Serving is the certificate of the node's own API, as of now.
func (i *Identity) Serving() (*tls.Certificate, error) { return i.serving.Load(), nil }

// ClientCA is who signs the certificates of those that may use the node's own API.
func (i *Identity) ClientCA() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(i.ca)
	return pool
}

// Run renews both certificates when two thirds of their life are over, until ctx ends.
func (i *Identity) Run(ctx context.Context) error {
	delay := firstRetry
	for {
		next, err := i.renew(ctx, time.Now())
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			next = delay
			delay = min(2*delay, lookAgain)
			i.cfg.Log.Error("renew certificates, trying again", "in", next, "error", err)
		} else {
			delay = firstRetry
		}
		t := time.NewTimer(min(next, lookAgain))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// renew renews what is due and says after how long it is to be called again.
func (i *Identity) renew(ctx context.Context, now time.Time) (time.Duration, error) {
	next := lookAgain
	for _, k := range []kind{clientKind, servingKind} {
		have, err := i.load(k)
		if err != nil {
			return 0, err
		}
		if have != nil && now.Before(renewAt(have.Leaf)) {
			next = min(next, renewAt(have.Leaf).Sub(now))
			continue
		}
		var addrs []netip.Addr
		if k == servingKind {
			addrs = i.cfg.NodeIPs
		}
		if err := obtain(ctx, i.client, i.cfg.Dir, k, i.cfg.NodeName, addrs); err != nil {
			return 0, err
		}
		if have, err = i.load(k); err != nil || have == nil {
			return 0, errors.Join(err, fmt.Errorf("the new %s certificate does not do", k.name))
		}
		if k == servingKind {
			i.serving.Store(have)
		}
		i.cfg.Log.Info("certificate renewed", "certificate", k.name, "until", have.Leaf.NotAfter)
		next = min(next, max(renewAt(have.Leaf).Sub(now), time.Second))
	}
	return next, nil
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("this is not one certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// writeFile replaces path by data, mode 0600, so that a crash leaves the old content or the new one.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}
