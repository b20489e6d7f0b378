// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"skep.io/skep/controlplane/encryption"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/shared"
	"skep.io/skep/controlplane/store"
)

// agreement is what this server has agreed on with the others of its cluster: the authority, of which it takes a step
// at its start, and the keys of Secrets, which it follows while it runs.
type agreement struct {
	authority, secrets         *shared.Thing
	authorityNumber, keyNumber int64 // what this server does since its start
	keysFile                   encryption.File
	ownKeys                    bool // the keys are skep's own
}

// agree has the files of this server say what the servers have agreed on. The first server says what that is. One that is
// alone, with a store of one that was not, takes what that says, and is free then. The authority that is returned
// is the one to use; agreement is nil for a server that is alone.
func agree(ctx context.Context, s serverSettings, m *membership, a *pki.Authority, etcd *store.Store, log *slog.Logger) (*agreement, *pki.Authority, error) {
	if m == nil && !a.HasPeers() {
		return nil, a, nil
	}
	key, err := a.ServersKey("what servers share in their store")
	if err != nil {
		return nil, nil, err
	}
	g := &agreement{keysFile: keysOfSecrets(s.dataDir)}
	g.ownKeys = s.access.EncryptionConfig == "" || s.access.EncryptionConfig == string(g.keysFile)
	if g.authority, err = shared.New(etcd.Client(), "authority", s.nodeName, key); err != nil {
		return nil, nil, err
	}
	if g.secrets, err = shared.New(etcd.Client(), "secrets", s.nodeName, key); err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(s.dataDir, "server", "tls")
	changed, err := g.takeAuthority(ctx, dir, m != nil)
	if err != nil {
		return nil, nil, err
	}
	if changed {
		log.Info("this server takes the step that the servers have agreed on", "authority", dir)
		if a, err = pki.Open(dir); err != nil {
			return nil, nil, err
		}
	}
	if g.ownKeys {
		if err := g.takeKeys(ctx, m != nil); err != nil {
			return nil, nil, err
		}
	}
	if m == nil {
		return nil, a, errors.Join(g.authority.Forget(ctx), g.secrets.Forget(ctx))
	}
	return g, a, nil
}

// settled is what thing says, or, if it says nothing yet, what this server has said then.
func settled(ctx context.Context, thing *shared.Thing, first func() ([]byte, error), several bool) (shared.Version, error) {
	for {
		v, err := thing.Read(ctx)
		if err != nil || v.Number > 0 || !several {
			return v, err
		}
		content, err := first()
		if err != nil {
			return v, err
		}
		if v, err = thing.Put(ctx, v, content); !errors.Is(err, shared.ErrChanged) {
			return v, err
		}
	}
}

func (g *agreement) takeAuthority(ctx context.Context, dir string, several bool) (changed bool, err error) {
	v, err := settled(ctx, g.authority, func() ([]byte, error) {
		now, err := pki.ReadChange(dir)
		if err != nil {
			return nil, err
		}
		return json.Marshal(now)
	}, several)
	if err != nil || v.Number == 0 {
		return false, err
	}
	c, err := changeOf(v)
	if err != nil {
		return false, err
	}
	g.authorityNumber = v.Number
	return c.Adopt(dir)
}

func changeOf(v shared.Version) (c pki.Change, err error) {
	if err := json.Unmarshal(v.Content, &c); err != nil {
		return c, fmt.Errorf("read the servers' authority: %w", err)
	}
	return c, nil
}

func (g *agreement) takeKeys(ctx context.Context, several bool) error {
	v, err := settled(ctx, g.secrets, func() ([]byte, error) {
		raw, err := os.ReadFile(string(g.keysFile))
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return raw, err
	}, several)
	if err != nil {
		return err
	}
	g.keyNumber = v.Number
	return g.writeKeys(v)
}

func (g *agreement) writeKeys(v shared.Version) error {
	if len(v.Content) == 0 {
		return nil // Secrets never were encrypted
	}
	if have, err := os.ReadFile(string(g.keysFile)); err == nil && bytes.Equal(have, v.Content) {
		return nil
	}
	if err := pki.WriteFile(string(g.keysFile), v.Content); err != nil {
		return fmt.Errorf("keys of Secrets: %w", err)
	}
	return nil
}

// keepAgreed tells the other servers that this one does as they have agreed, and follows changes of the keys.
func (p *process) keepAgreed(ctx context.Context) error {
	g, log := p.agreed, p.log.With("part", "servers")
	select {
	case <-p.server.Ready():
	case <-ctx.Done():
		return nil
	}
	for {
		err := g.authority.Applied(ctx, g.authorityNumber)
		if err == nil && g.ownKeys {
			err = g.secrets.Applied(ctx, g.keyNumber)
		}
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("tell other servers what this one has, trying again", "error", err)
		select {
		case <-time.After(leaseRetry):
		case <-ctx.Done():
			return nil
		}
	}
	if !g.ownKeys {
		<-ctx.Done()
		return nil
	}
	return g.secrets.Follow(ctx, g.keyNumber, func(_ context.Context, v shared.Version) error {
		if err := g.writeKeys(v); err != nil {
			return err
		}
		return p.server.ReloadEncryption()
	}, log)
}

// serverNames are the members of the store; one that joins at the moment has no name yet.
func serverNames(etcd *store.Store) func(context.Context) ([]string, error) {
	return func(ctx context.Context) ([]string, error) {
		all, err := etcd.Members(ctx)
		var names []string
		for _, m := range all {
			names = append(names, m.Name)
		}
		return names, err
	}
}

// takeLimit is how long servers may take to read other keys.
const takeLimit = 20 * time.Second

// clusterKeys are the keys of Secrets of all servers.
type clusterKeys struct {
	thing   *shared.Thing
	servers func(context.Context) ([]string, error)
	now     shared.Version
}

func (g *agreement) keys(etcd *store.Store) encryption.Keys {
	return &clusterKeys{thing: g.secrets, servers: serverNames(etcd)}
}

// Read implements encryption.Keys. It is refused while a server has not taken the keys before.
func (k *clusterKeys) Read(ctx context.Context) (r encryption.Ring, err error) {
	if k.now, err = k.thing.Read(ctx); err != nil {
		return r, err
	}
	if err := k.await(ctx); err != nil {
		return r, err
	}
	return encryption.Parse(k.now.Content)
}

// Put implements encryption.Keys.
func (k *clusterKeys) Put(ctx context.Context, r encryption.Ring) error {
	content, err := r.Marshal()
	if err != nil {
		return err
	}
	if k.now, err = k.thing.Put(ctx, k.now, content); err != nil {
		return err
	}
	return k.await(ctx)
}

func (k *clusterKeys) await(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, takeLimit)
	defer cancel()
	waiting, err := k.thing.Await(limited, k.now.Number, k.servers)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("these servers have not taken the keys: %s. Start them, or remove those that are gone for good (`skep member remove`)", strings.Join(waiting, ", "))
	}
	return err
}

// authorityAnswer is what a server says of the authority. Keys are not in it.
type authorityAnswer struct {
	Change  pki.Change `json:"change"`
	Servers []string   `json:"servers"`
	Behind  []string   `json:"behind"` // have not taken the last step
}

// authorityOrders are what `skep ca` asks of one of several servers.
func (p *process) authorityOrders(etcd *store.Store, orders *http.ServeMux) {
	servers := serverNames(etcd)
	look := func(ctx context.Context) (v shared.Version, c pki.Change, answer authorityAnswer, err error) {
		if v, err = p.agreed.authority.Read(ctx); err == nil {
			c, err = changeOf(v)
		}
		if err == nil {
			answer.Servers, err = servers(ctx)
		}
		if err == nil {
			answer.Behind, err = p.agreed.authority.Behind(ctx, v.Number, answer.Servers)
		}
		answer.Change = c.WithoutKeys()
		return v, c, answer, err
	}
	orders.HandleFunc("POST /authority/status", control(func(ctx context.Context, _ string) (authorityAnswer, error) {
		_, _, answer, err := look(ctx)
		return answer, err
	}))
	orders.HandleFunc("POST /authority/step", control(func(ctx context.Context, to pki.Stage) (bool, error) {
		v, c, answer, err := look(ctx)
		if err != nil {
			return false, err
		}
		// Not even by force: what one signs another would not take.
		if len(answer.Behind) > 0 {
			return false, fmt.Errorf("these servers have not taken the step before: %s. Restart them, or remove those that are gone for good (`skep member remove`)", strings.Join(answer.Behind, ", "))
		}
		if c, err = c.Step(to); err != nil {
			return false, err
		}
		content, err := json.Marshal(c)
		if err != nil {
			return false, err
		}
		if _, err := p.agreed.authority.Put(ctx, v, content); err != nil {
			return false, err
		}
		p.log.Info("the authority takes a step, at the next start of each server", "authority", string(to))
		return true, nil
	}))
}
