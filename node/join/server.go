// SPDX-License-Identifier: Apache-2.0

package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"time"

	"skep.io/skep/api"
)

// ServerRequest is how a machine asks to become a server of the cluster.
type ServerRequest struct {
	Name string `json:"name"` // of its node
	URL  string `json:"url"`  // where its part of the store listens
}

// ServerAnswer is what it gets: everything that the servers share.
type ServerAnswer struct {
	Keys     map[string][]byte `json:"keys"`     // content by file name: authorities, and the key of service accounts
	Members  map[string]string `json:"members"`  // of the store: URL by name, its own among them
	Settings map[string]string `json:"settings"` // what all nodes agree on
}

// ServerConfig of Server.
type ServerConfig struct {
	Server    *url.URL // https
	Token     Token
	Request   ServerRequest
	UserAgent string
	Log       *slog.Logger
}

const (
	// serverJoinLimit bounds one attempt: the cluster may first have to find its members connected.
	serverJoinLimit = time.Minute
	maxServerAnswer = 4 << 20
)

// Server asks a server of the cluster to let this machine in as another one. The token is sent to nobody but a
// holder of a certificate of the authority that it names. Server waits for one that does not answer, and gives up
// when one says no.
func Server(ctx context.Context, cfg ServerConfig) (ServerAnswer, error) {
	var answer ServerAnswer
	i := &Identity{cfg: Config{Server: cfg.Server, Log: cfg.Log}}
	var ca *x509.Certificate
	err := i.patiently(ctx, func() (err error) {
		ca, err = pinnedAuthority(ctx, cfg.Server, cfg.Token.Authority)
		return err
	})
	if err == nil {
		err = i.patiently(ctx, func() (err error) {
			answer, err = askServer(ctx, cfg, ca)
			return err
		})
	}
	if err != nil {
		return answer, fmt.Errorf("join the cluster at %s as a server: %w", cfg.Server, err)
	}
	return answer, nil
}

func askServer(ctx context.Context, cfg ServerConfig, ca *x509.Certificate) (answer ServerAnswer, err error) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: authorities{ca}.pool(), ServerName: serverName}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, serverJoinLimit)
	defer cancel()
	ask := func(method, path string, body []byte) (int, []byte, error) {
		r, err := http.NewRequestWithContext(ctx, method, cfg.Server.String()+path, bytes.NewReader(body))
		if err != nil {
			return 0, nil, err
		}
		r.Header.Set("User-Agent", cfg.UserAgent)
		if body != nil {
			r.Header.Set("Authorization", "Bearer "+cfg.Token.Bearer())
		}
		response, err := (&http.Client{Transport: transport}).Do(r)
		if err != nil {
			return 0, nil, err
		}
		defer response.Body.Close()
		raw, err := io.ReadAll(io.LimitReader(response.Body, maxServerAnswer))
		return response.StatusCode, raw, err
	}
	// A server that has only just started refuses tokens that it has not read yet.
	if code, raw, err := ask(http.MethodGet, "/readyz", nil); err != nil || code != http.StatusOK {
		return answer, errors.Join(err, fmt.Errorf("it is not ready (%d %.100s)", code, raw))
	}
	body, err := json.Marshal(cfg.Request)
	if err != nil {
		return answer, err
	}
	code, raw, err := ask(http.MethodPost, api.JoinPath, body)
	if err != nil {
		return answer, err
	}
	return readServerAnswer(code, raw, cfg.Token.ID)
}

// readServerAnswer tells a no, which is ErrRefused, from an answer that may become another one.
func readServerAnswer(code int, raw []byte, id string) (answer ServerAnswer, err error) {
	var says struct{ Error string }
	_ = json.Unmarshal(raw, &says) // what is no JSON says nothing
	switch code {
	case http.StatusOK:
		return answer, json.Unmarshal(raw, &answer)
	case http.StatusUnauthorized:
		return answer, fmt.Errorf("%w: it does not accept the token %s, which has expired or was revoked: `skep token create --for-server` on a server makes another", ErrRefused, id)
	case http.StatusForbidden:
		return answer, fmt.Errorf("%w: the token %s is one for agents: `skep token create --for-server` on a server makes one for servers", ErrRefused, id)
	case http.StatusNotFound:
		return answer, fmt.Errorf("%w: it knows of no other servers; is it of another version?", ErrRefused)
	case http.StatusUnprocessableEntity:
		return answer, fmt.Errorf("%w: %s", ErrRefused, says.Error)
	}
	return answer, fmt.Errorf("it answers %d %s", code, says.Error)
}
