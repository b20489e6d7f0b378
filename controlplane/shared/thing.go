// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ErrChanged says that another server has replaced the content meanwhile.
var ErrChanged = errors.New("another server has changed it at the same time")

// root of all keys in the store; the API's are under /registry.
const root = "/skep/shared/"

// Thing is what servers agree on.
type Thing struct {
	client *clientv3.Client
	name   string
	server string
	sealer sealer
}

// New is the thing of a name, for one server. key, of 32 bytes, is what only servers have; the client stays the caller's.
func New(client *clientv3.Client, name, server string, key []byte) (*Thing, error) {
	s, err := newSealer(key)
	if err != nil {
		return nil, fmt.Errorf("shared %s: %w", name, err)
	}
	return &Thing{client: client, name: name, server: server, sealer: s}, nil
}

func (t *Thing) contentKey() string    { return root + t.name + "/content" }
func (t *Thing) appliedPrefix() string { return root + t.name + "/applied/" }

// Version is a content and the number it has. The number 0 says that there is none yet.
type Version struct {
	Number  int64
	Content []byte

	revision int64 // of the store
}

type stored struct {
	Number int64  `json:"number"`
	Sealed []byte `json:"sealed"`
}

// Read is what the servers have agreed on last, wherever that was written.
func (t *Thing) Read(ctx context.Context) (Version, error) {
	answer, err := t.client.Get(ctx, t.contentKey())
	if err != nil {
		return Version{}, fmt.Errorf("read the servers' %s: %w", t.name, err)
	}
	v := Version{revision: answer.Header.Revision}
	if len(answer.Kvs) == 0 {
		return v, nil
	}
	var s stored
	if err := json.Unmarshal(answer.Kvs[0].Value, &s); err != nil {
		return v, fmt.Errorf("read the servers' %s: %w", t.name, err)
	}
	if s.Number < 1 {
		return v, fmt.Errorf("read the servers' %s: %d is not the number of a version", t.name, s.Number)
	}
	if v.Content, err = t.sealer.open(s.Sealed, t.contentKey()); err != nil {
		return v, fmt.Errorf("read the servers' %s: %w", t.name, err)
	}
	v.Number = s.Number
	return v, nil
}

// Put replaces the version that Read has returned. It returns the new one, or ErrChanged.
func (t *Thing) Put(ctx context.Context, before Version, content []byte) (Version, error) {
	raw, err := json.Marshal(stored{before.Number + 1, t.sealer.seal(content, t.contentKey())})
	if err != nil {
		return Version{}, err
	}
	// Unchanged since before was read; the first time it must not be there.
	same := clientv3.Compare(clientv3.ModRevision(t.contentKey()), "<", before.revision+1)
	if before.Number == 0 {
		same = clientv3.Compare(clientv3.ModRevision(t.contentKey()), "=", 0)
	}
	answer, err := t.client.Txn(ctx).If(same).Then(clientv3.OpPut(t.contentKey(), string(raw))).Commit()
	switch {
	case err != nil:
		return Version{}, fmt.Errorf("change the servers' %s: %w", t.name, err)
	case !answer.Succeeded:
		return Version{}, fmt.Errorf("change the servers' %s: %w", t.name, ErrChanged)
	}
	return Version{before.Number + 1, content, answer.Header.Revision}, nil
}

// Applied tells the others that this server does as a version says.
func (t *Thing) Applied(ctx context.Context, number int64) error {
	if _, err := t.client.Put(ctx, t.appliedPrefix()+t.server, strconv.FormatInt(number, 10)); err != nil {
		return fmt.Errorf("tell other servers which %s this one has: %w", t.name, err)
	}
	return nil
}

// Behind are those of servers that have not said that they do as a version says, or as a later one.
func (t *Thing) Behind(ctx context.Context, number int64, servers []string) ([]string, error) {
	answer, err := t.client.Get(ctx, t.appliedPrefix(), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("ask which %s servers have: %w", t.name, err)
	}
	applied := map[string]int64{}
	for _, kv := range answer.Kvs {
		n, err := strconv.ParseInt(string(kv.Value), 10, 64)
		if err == nil {
			applied[strings.TrimPrefix(string(kv.Key), t.appliedPrefix())] = n
		}
	}
	return behind(applied, number, servers), nil
}

func behind(applied map[string]int64, number int64, servers []string) []string {
	var out []string
	for _, s := range servers {
		if applied[s] < number {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

// lookAgain is how often Await looks whether a server is still one: etcd tells nobody when a member is removed.
const lookAgain = time.Second

// Await returns when all servers do as a version says, and otherwise, when ctx ends, those that do not.
func (t *Thing) Await(ctx context.Context, number int64, servers func(context.Context) ([]string, error)) (waiting []string, err error) {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	events := t.client.Watch(watching, t.appliedPrefix(), clientv3.WithPrefix())
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		all, err := servers(ctx)
		var now []string
		if err == nil {
			now, err = t.Behind(ctx, number, all)
		}
		switch {
		case ctx.Err() != nil:
			return waiting, ctx.Err()
		case err != nil || len(now) == 0:
			return now, err
		}
		waiting = now
		select {
		case _, ok := <-events:
			if !ok {
				events = nil // the ticker goes on
			}
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// retryAfter spaces attempts to do as the servers have agreed.
const retryAfter = time.Second

// Follow has this server do as each version says that comes after since, and tells the others, until ctx ends. apply is
// tried again until it succeeds: others wait for this server.
func (t *Thing) Follow(ctx context.Context, since int64, apply func(context.Context, Version) error, log *slog.Logger) error {
	for ctx.Err() == nil {
		v, err := t.Read(ctx)
		if err == nil && v.Number > since {
			if err = apply(ctx, v); err == nil {
				err = t.Applied(ctx, v.Number)
			}
			if err == nil {
				since = v.Number
			}
		}
		if err != nil {
			if ctx.Err() == nil {
				log.Error("do as the servers have agreed, trying again", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(retryAfter):
			}
			continue
		}
		t.change(ctx, v.revision+1)
	}
	return nil
}

// change returns when the content may have been replaced since a revision: also when the watch ends.
func (t *Thing) change(ctx context.Context, since int64) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for e := range t.client.Watch(ctx, t.contentKey(), clientv3.WithRev(since)) {
		if len(e.Events) > 0 || e.Err() != nil {
			return
		}
	}
}

// Forget removes all about it from the store: a server that is alone has nobody to agree with.
func (t *Thing) Forget(ctx context.Context) error {
	if _, err := t.client.Delete(ctx, root+t.name+"/", clientv3.WithPrefix()); err != nil {
		return fmt.Errorf("forget the servers' %s: %w", t.name, err)
	}
	return nil
}
