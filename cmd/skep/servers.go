// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
	"skep.io/skep/node/join"
)

// serversOptions are the flags of a server that is one of several.
type serversOptions struct {
	clusterInit bool
	join        string
	token       string
	tokenFile   string
	etcd        store.External
}

func (o *serversOptions) addFlags(f *pflag.FlagSet) {
	f.BoolVar(&o.clusterInit, "cluster-init", false, "Let other servers join this one (port "+strconv.Itoa(api.DefaultPeerPort)+" of its address); needed once")
	f.StringVar(&o.join, "join", "", "Become another server of the cluster of this one: https://HOST:6443; needed once")
	f.StringVar(&o.token, "token", "", "What `skep token create --for-server` printed there; needed once")
	f.StringVar(&o.tokenFile, "token-file", "", "File that holds the token, so that it shows in no list of processes")
	f.StringSliceVar(&o.etcd.Endpoints, "etcd-servers", nil, "An etcd that others run, for this server alone: https://HOST:2379,... (default: one in this process)")
	f.StringVar(&o.etcd.CAFile, "etcd-cafile", "", "Authorities that signed that etcd's certificates (default: those that this host trusts)")
	f.StringVar(&o.etcd.CertFile, "etcd-certfile", "", "What this server shows to that etcd")
	f.StringVar(&o.etcd.KeyFile, "etcd-keyfile", "", "Key of --etcd-certfile")
}

// serversSettings are serversOptions once they have been checked.
type serversSettings struct {
	clusterInit bool
	join        *url.URL
	token       *join.Token
	etcd        *store.External // nil: in this process
}

func (o *serversOptions) complete(bad func(flag, format string, args ...any)) serversSettings {
	s := serversSettings{clusterInit: o.clusterInit}
	if len(o.etcd.Endpoints) > 0 {
		s.etcd = &o.etcd
		if o.clusterInit || o.join != "" {
			bad("etcd-servers", "give either this, for one server with an etcd elsewhere, or --cluster-init and --join, for several with their own")
		}
	}
	if err := o.etcd.Validate(); err != nil {
		bad("etcd-servers", "%w", err)
	}
	text := readToken(o.token, o.tokenFile, os.ReadFile, bad)
	if text != "" {
		if t, err := join.ParseToken(text); err == nil {
			s.token = &t
		}
	}
	if o.join == "" {
		return s
	}
	if o.clusterInit {
		bad("cluster-init", "give either this, on the first server, or --join, on the others")
	}
	var err error
	if s.join, err = serverURL(o.join); err != nil {
		bad("join", "%w", err)
	}
	return s
}

// readToken is what --token or --token-file say; it tells bad of what is no token.
func readToken(token, file string, readFile func(string) ([]byte, error), bad func(flag, format string, args ...any)) string {
	if file != "" {
		if token != "" {
			bad("token-file", "give either this or --token")
		}
		b, err := readFile(file)
		if err != nil {
			bad("token-file", "%w", err)
		}
		token = firstField(string(b))
	}
	if token != "" {
		if _, err := join.ParseToken(token); err != nil {
			bad("token", "%w", err)
		}
	}
	return token
}

// membership is what a server that is one of several remembers, in DATA-DIR/server/cluster.json.
type membership struct {
	URL     string            `json:"url"`               // where its member of the store listens
	Members map[string]string `json:"members,omitempty"` // when it joined
	// Settings are what it was told when it joined; nil if it is the first, whose flags say them.
	Settings map[string]string `json:"settings,omitempty"`
}

func membershipFile(dir string) string { return filepath.Join(dir, "cluster.json") }

// findMembership is nil for a server that is the only one. One that is to join does so here.
func findMembership(ctx context.Context, s serverSettings, log *slog.Logger) (*membership, error) {
	dir := filepath.Join(s.dataDir, "server")
	raw, err := os.ReadFile(membershipFile(dir))
	if err == nil {
		var m membership
		if err := json.Unmarshal(raw, &m); err != nil || m.URL == "" {
			return nil, fmt.Errorf("%s does not say who this server is: %w; restore it from a backup", membershipFile(dir), err)
		}
		return &m, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	at := "https://" + net.JoinHostPort(s.advertiseAddress.String(), strconv.Itoa(api.DefaultPeerPort))
	switch {
	case s.servers.join != nil:
		return joinServers(ctx, s, at, dir, log)
	case s.servers.clusterInit:
		m := membership{URL: at}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		return &m, m.write(dir)
	}
	return nil, nil
}

func (m membership) write(dir string) error {
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := pki.WriteFile(membershipFile(dir), raw); err != nil {
		return fmt.Errorf("keep who this server is: %w", err)
	}
	return nil
}

// joinServers gets the cluster's keys and a place in its store. The directory gets its name when all is in it.
func joinServers(ctx context.Context, s serverSettings, at, dir string, log *slog.Logger) (*membership, error) {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return nil, fmt.Errorf("%s holds a control plane of its own: a server joins with nothing; `skep reset` removes it", dir)
	}
	if s.servers.token == nil {
		return nil, errors.New("--join needs --token, which `skep token create --for-server` prints on a server")
	}
	log.Info("joining the cluster as a server", "server", s.servers.join.String(), "member", at)
	answer, err := join.Server(ctx, join.ServerConfig{
		Server: s.servers.join, Token: *s.servers.token, Request: join.ServerRequest{Name: s.nodeName, URL: at},
		UserAgent: "skep/" + skepVersion, Log: log.With("part", "join"),
	})
	if err != nil {
		return nil, err
	}
	building := filepath.Join(s.dataDir, ".joining")
	if err := os.RemoveAll(building); err != nil {
		return nil, err
	}
	keys := filepath.Join(building, "tls")
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return nil, err
	}
	for name, content := range answer.Keys {
		if filepath.Base(name) != name || !filepath.IsLocal(name) {
			return nil, fmt.Errorf("the server sent a key called %q", name)
		}
		if err := pki.WriteFile(filepath.Join(keys, name), content); err != nil {
			return nil, err
		}
	}
	m := membership{URL: at, Members: answer.Members, Settings: answer.Settings}
	if err := m.write(building); err != nil {
		return nil, err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return &m, os.Rename(building, dir)
}

// peerCertificate keeps the certificate of this server's member.
func (m membership) peerCertificate(a *pki.Authority, name string) (pki.Files, error) {
	u, err := url.Parse(m.URL)
	if err != nil {
		return pki.Files{}, err
	}
	return a.PeerFiles(name, []string{u.Hostname()})
}

// openStore opens the store, alone or as one of several.
func openStore(ctx context.Context, s serverSettings, m *membership, authority *pki.Authority, log *slog.Logger) (*store.Store, error) {
	cfg := store.Config{DataDir: filepath.Join(s.dataDir, "server"), LockWait: lockWait, Log: log.With("part", "store")}
	if s.servers.etcd != nil && m != nil {
		return nil, fmt.Errorf("--etcd-servers: %s says that this is one of several servers with a store of their own: `skep reset`, or without the flag", membershipFile(cfg.DataDir))
	}
	cfg.External = s.servers.etcd
	if m != nil {
		files, err := m.peerCertificate(authority, s.nodeName)
		if err != nil {
			return nil, err
		}
		cfg.Cluster = &store.Cluster{Name: s.nodeName, URL: m.URL, Initial: m.Members, CertFile: files.Cert, CAFile: authority.PeerCAFile()}
	}
	return store.Open(ctx, cfg)
}

// renewPeerEvery is how often the member's certificate is looked at; etcd reads it for each connection.
const renewPeerEvery = 10 * time.Minute

func (p *process) renewPeer(ctx context.Context) error {
	tick := time.NewTicker(renewPeerEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if _, err := p.member.peerCertificate(p.authority, p.settings.nodeName); err != nil {
			p.log.Error("renew the certificate for other servers", "error", err)
		}
	}
}

// joinHandler lets other servers in. Whoever gets here has a token for servers.
func joinHandler(etcd *store.Store, authority *pki.Authority, settings map[string]string, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "POST only", http.StatusMethodNotAllowed)
			return
		}
		var request join.ServerRequest
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxControlBody)).Decode(&request)
		var answer any
		if err == nil {
			answer, err = admitServer(r.Context(), request, etcd, authority, settings)
		}
		code := http.StatusOK
		switch {
		case errors.Is(err, store.ErrBusy) || errors.Is(err, context.DeadlineExceeded):
			code = http.StatusServiceUnavailable
		case err != nil:
			code = http.StatusUnprocessableEntity
		}
		if err != nil {
			log.Warn("a server was not let in", "name", request.Name, "member", request.URL, "error", err)
			answer = refusal{err.Error()}
		} else {
			log.Info("a server was let in", "name", request.Name, "member", request.URL)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(answer) // the other side has gone
	})
}

func admitServer(ctx context.Context, request join.ServerRequest, etcd *store.Store, authority *pki.Authority, settings map[string]string) (answer join.ServerAnswer, err error) {
	u, err := url.Parse(request.URL)
	if err != nil || request.Name == "" || u.Scheme != "https" || net.ParseIP(u.Hostname()) == nil || u.Port() == "" {
		return answer, fmt.Errorf("%q at %q is no server", request.Name, request.URL)
	}
	// Before the member is added: what fails here leaves nothing behind.
	files, err := authority.Lasting()
	if err != nil {
		return answer, err
	}
	answer = join.ServerAnswer{Keys: map[string][]byte{}, Settings: settings}
	for _, path := range files {
		if answer.Keys[filepath.Base(path)], err = os.ReadFile(path); err != nil {
			return answer, err
		}
	}
	answer.Members, err = etcd.Add(ctx, request.Name, request.URL)
	return answer, err
}
