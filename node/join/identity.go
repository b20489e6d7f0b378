// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/connrotation"

	"skep.io/skep/api"
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
	// Fits, if set, says why this machine does not fit a server of a version; it then does not join.
	Fits func(serverVersion string) error
	Log  *slog.Logger
}

// Identity is a machine's membership.
type Identity struct {
	cfg         Config
	authorities atomic.Pointer[authorities]
	client      atomic.Pointer[tls.Certificate]
	serving     atomic.Pointer[tls.Certificate]
	servers     *servers
	connections *connrotation.Dialer // to the servers
	reaches     http.RoundTripper    // the API, as this node
	api         kubernetes.Interface
	wake        chan struct{} // Run is to look at certificates at once
	reported    [2]string     // Authorities, as the Node has them
}

func newIdentity(cfg Config) *Identity {
	i := &Identity{cfg: cfg, servers: newServers(cfg.Server.Host, serversPath(cfg.Dir)), wake: make(chan struct{}, 1)}
	i.connections = connrotation.NewDialer(i.servers.dial)
	i.reaches = i.transport(func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if have := i.client.Load(); have != nil {
			return have, nil
		}
		return &tls.Certificate{}, nil // crypto/tls: sends none
	})
	return i
}

// Join returns once the machine has both certificates, from its directory or from the cluster. It waits
// for a server that does not answer, and gives up when one says no.
func Join(ctx context.Context, cfg Config) (*Identity, error) {
	i := newIdentity(cfg)
	_, err := os.Stat(cfg.Dir)
	isNew := errors.Is(err, fs.ErrNotExist)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	err = i.trust(ctx)
	if err == nil {
		err = i.becomeNode(ctx)
	}
	if err != nil {
		err = fmt.Errorf("join the cluster at %s: %w", cfg.Server, err)
		if isNew && ctx.Err() == nil { // it was told no: the machine is as it was
			err = errors.Join(err, os.RemoveAll(cfg.Dir))
		}
		return nil, err
	}
	if i.api, err = kubernetes.NewForConfig(i.ClientConfig()); err != nil {
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
		all, err := parseAuthorities(data)
		if err != nil {
			return fmt.Errorf("%s: %w; `skep reset` makes this machine new, and it can join again", path, err)
		}
		if token != nil && !all.pinned(*token) && !slices.Contains(former(i.cfg.Dir), hex.EncodeToString(token.Authority[:])) {
			return fmt.Errorf("%w: this machine has joined a cluster with another certificate authority than the token's (%s): `skep reset` takes it out of that one", ErrAuthority, path)
		}
		i.trustThese(all)
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case token == nil:
		return errors.New("this machine has not joined a cluster yet: give it --token, which `skep token create` prints on a server")
	}
	var ca *x509.Certificate
	err = i.patiently(ctx, func() (err error) {
		ca, err = pinnedAuthority(ctx, i.cfg.Server, token.Authority)
		return err
	})
	if err != nil {
		return err
	}
	i.trustThese(authorities{ca})
	return writeFile(path, i.trusted().pem())
}

// becomeNode makes sure of a client certificate that is valid.
func (i *Identity) becomeNode(ctx context.Context) error {
	have, err := i.load(clientKind)
	if err != nil {
		return err
	}
	if have != nil && time.Now().Before(have.Leaf.NotAfter) {
		i.client.Store(have)
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
		// With the token: a server tells nobody else its version.
		err := i.fits(client)
		if err == nil {
			err = obtain(ctx, client, i.cfg.Dir, clientKind, i.cfg.NodeName, nil)
		}
		if err == nil {
			have, err := i.load(clientKind)
			i.client.Store(have)
			return err
		}
		if apierrors.IsForbidden(err) && isForServers(ctx, client) {
			return fmt.Errorf("%w: the token %s is one for servers: `skep token create` on a server, without --for-server, makes one for agents", ErrRefused, token.ID)
		}
		if apierrors.IsUnauthorized(err) {
			return fmt.Errorf("the server does not accept the token %s: it has expired or was revoked; `skep token create` on a server makes another: %w", token.ID, err)
		}
		return err
	})
}

// fits asks the server for its version, and this machine whether it fits.
func (i *Identity) fits(client kubernetes.Interface) error {
	if i.cfg.Fits == nil {
		return nil
	}
	server, err := client.Discovery().ServerVersion()
	if err != nil {
		return err
	}
	if err := i.cfg.Fits(server.GitVersion); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}

// isForServers says whether what a client shows is a token with which servers join. Who cannot ask does not know.
func isForServers(ctx context.Context, client kubernetes.Interface) bool {
	me, err := client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	return err == nil && slices.Contains(me.Status.UserInfo.Groups, api.ServerBootstrapGroup)
}

// ensureServing makes sure of a serving certificate.
func (i *Identity) ensureServing(ctx context.Context) error {
	have, err := i.load(servingKind)
	if err != nil {
		return err
	}
	if have == nil || time.Now().After(have.Leaf.NotAfter) {
		err = i.patiently(ctx, func() error {
			return obtain(ctx, i.api, i.cfg.Dir, servingKind, i.cfg.NodeName, i.cfg.NodeIPs)
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
	if why := lacks(pair.Leaf, k.template(i.cfg.NodeName, i.cfg.NodeIPs), i.trusted()); why != "" {
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
	if errors.Is(err, ErrAuthority) || errors.Is(err, ErrRefused) || errors.Is(err, ErrClock) || errors.As(err, new(*x509.CertificateInvalidError)) {
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
		Host: i.cfg.Server.String(), UserAgent: i.cfg.UserAgent, QPS: -1, Transport: i.transport(nil),
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
	}
}

// ClientConfig reaches the API as this node. A renewed certificate is taken up without a restart: connections are opened
// anew.
func (i *Identity) ClientConfig() *rest.Config {
	config := i.baseConfig()
	config.Transport = i.reaches
	return config
}

// Serving is the certificate of the node's own API, as of now.
func (i *Identity) Serving() (*tls.Certificate, error) { return i.serving.Load(), nil }

// ClientCA is who signs the certificates of those that may use the node's own API, as of now.
func (i *Identity) ClientCA() *x509.CertPool { return i.trusted().pool() }

// Run renews both certificates when two thirds of their life are over, or another CA signs than did, until ctx ends.
func (i *Identity) Run(ctx context.Context) error {
	delay := firstRetry
	for {
		next, err := i.renew(ctx, time.Now())
		unreported := false
		if err == nil {
			err = i.report(ctx)
			if unreported = apierrors.IsNotFound(err); unreported {
				err = nil // the Node is not made yet
			}
		}
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
		if unreported {
			next = time.Second
		}
		t := time.NewTimer(min(next, lookAgain))
		select {
		case <-t.C:
		case <-i.wake:
			t.Stop()
			delay = firstRetry
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// report tells on the Node whom this machine trusts, for whoever replaces an authority.
func (i *Identity) report(ctx context.Context) error {
	trusted, signer := i.Authorities()
	if now := [2]string{trusted, signer}; now != i.reported {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{
			api.TrustedAuthoritiesAnnotation: trusted, api.AuthorityAnnotation: signer,
		}}})
		if err != nil {
			return err
		}
		if _, err := i.api.CoreV1().Nodes().Patch(ctx, i.cfg.NodeName, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("tell which authorities this machine trusts: %w", err)
		}
		i.reported = now
	}
	return nil
}

// renew renews what is due and says after how long it is to be called again.
func (i *Identity) renew(ctx context.Context, now time.Time) (time.Duration, error) {
	next := lookAgain
	for _, k := range []kind{clientKind, servingKind} {
		have, err := i.load(k)
		if err != nil {
			return 0, err
		}
		signs := i.trusted()[:1]
		if have != nil && now.Before(renewAt(have.Leaf)) && signs.signed(have.Leaf) {
			next = min(next, renewAt(have.Leaf).Sub(now))
			continue
		}
		var addrs []netip.Addr
		if k == servingKind {
			addrs = i.cfg.NodeIPs
		}
		if err := obtain(ctx, i.api, i.cfg.Dir, k, i.cfg.NodeName, addrs); err != nil {
			return 0, err
		}
		if have, err = i.load(k); err != nil || have == nil {
			return 0, errors.Join(err, fmt.Errorf("the new %s certificate does not do", k.name))
		}
		if k == servingKind {
			i.serving.Store(have)
		} else {
			i.client.Store(have)
			i.connections.CloseAll()
		}
		if !signs.signed(have.Leaf) {
			return 0, fmt.Errorf("the new %s certificate is not of the authority that is to sign (%s)", k.name, signs)
		}
		i.cfg.Log.Info("certificate renewed", "certificate", k.name, "until", have.Leaf.NotAfter)
		next = min(next, max(renewAt(have.Leaf).Sub(now), time.Second))
	}
	return next, nil
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
