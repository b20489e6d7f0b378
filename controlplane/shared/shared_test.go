// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skep.io/skep/controlplane/store"
)

var key = bytes.Repeat([]byte{7}, 32)

func newClient(t *testing.T) *clientv3.Client {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.Client()
}

func thing(t *testing.T, client *clientv3.Client, server string) *Thing {
	t.Helper()
	made, err := New(client, "keys", server, key)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func read(t *testing.T, of *Thing) Version {
	t.Helper()
	v, err := of.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func put(t *testing.T, of *Thing, before Version, content string) Version {
	t.Helper()
	v, err := of.Put(t.Context(), before, []byte(content))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Of two that replace the same version one does, and the other is told.
func TestOneChangeAfterTheOther(t *testing.T) {
	client := newClient(t)
	a, b := thing(t, client, "a"), thing(t, client, "b")
	none := read(t, a)
	if none.Number != 0 {
		t.Fatalf("%+v", none)
	}
	first := put(t, a, none, "one")
	if _, err := b.Put(t.Context(), none, []byte("uno")); !errors.Is(err, ErrChanged) {
		t.Fatalf("%v", err)
	}
	seen := read(t, b)
	if seen.Number != 1 || string(seen.Content) != "one" {
		t.Fatalf("%+v", seen)
	}
	second := put(t, b, seen, "two")
	if _, err := a.Put(t.Context(), first, []byte("due")); !errors.Is(err, ErrChanged) {
		t.Fatalf("%v", err)
	}
	if third := put(t, b, second, "three"); third.Number != 3 { // what Put returns is as good as what Read does
		t.Fatalf("%+v", third)
	}
	if err := a.Forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v := read(t, b); v.Number != 0 || v.Content != nil {
		t.Fatalf("%+v", v)
	}
}

// What is stored is readable with the key, in its place, and unchanged; and with nothing less.
func TestSealed(t *testing.T) {
	client := newClient(t)
	a := thing(t, client, "a")
	put(t, a, read(t, a), "correct horse")
	raw, err := client.Get(t.Context(), root, clientv3.WithPrefix())
	if err != nil || len(raw.Kvs) != 1 || bytes.Contains(raw.Kvs[0].Value, []byte("horse")) {
		t.Fatalf("%s, %v", raw.Kvs, err)
	}
	stranger, err := New(client, "keys", "x", bytes.Repeat([]byte{8}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Read(t.Context()); !errors.Is(err, ErrSealed) {
		t.Errorf("another key: %v", err)
	}
	elsewhere, err := New(client, "other", "a", key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), elsewhere.contentKey(), string(raw.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	if _, err := elsewhere.Read(t.Context()); !errors.Is(err, ErrSealed) {
		t.Errorf("another place: %v", err)
	}
	sealed := a.sealer.seal([]byte("x"), "p")
	for i := range sealed {
		changed := slices.Clone(sealed)
		changed[i] ^= 1
		if _, err := a.sealer.open(changed, "p"); !errors.Is(err, ErrSealed) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for _, broken := range []string{"", "{", `{"number":0,"sealed":""}`, `{"number":1,"sealed":"AA=="}`} {
		if _, err := client.Put(t.Context(), a.contentKey(), broken); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Read(t.Context()); err == nil {
			t.Errorf("%q is read", broken)
		}
	}
}

// Whoever follows does as each version says that it sees, tries again where it could not, and is waited for. One that is
// no server any more is not.
func TestAllServersFollow(t *testing.T) {
	client := newClient(t)
	a := thing(t, client, "a")
	v := put(t, a, read(t, a), "one")
	var servers atomic.Pointer[[]string]
	servers.Store(&[]string{"a", "b", "gone"})
	members := func(context.Context) ([]string, error) { return *servers.Load(), nil }

	ctx, stop := context.WithCancel(t.Context())
	last := make(chan string, 16)
	ended := make(chan error, 2)
	for _, name := range []string{"a", "b"} {
		one, fails := thing(t, client, name), 1
		go func() {
			ended <- one.Follow(ctx, 0, func(_ context.Context, v Version) error {
				if fails--; fails >= 0 {
					return errors.New("the disk is full")
				}
				last <- name + " " + string(v.Content)
				return nil
			}, slog.New(slog.DiscardHandler))
		}()
	}
	// The two that there are first: then only one is waited for.
	if _, err := a.Await(ctx, v.Number, func(context.Context) ([]string, error) { return []string{"a", "b"}, nil }); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	waiting, err := a.Await(short, v.Number, members)
	cancel()
	if !errors.Is(err, context.DeadlineExceeded) || !slices.Equal(waiting, []string{"gone"}) {
		t.Fatalf("%v, %v", waiting, err)
	}
	servers.Store(&[]string{"a", "b"})
	if waiting, err := a.Await(ctx, v.Number, members); err != nil || len(waiting) > 0 {
		t.Fatalf("%v, %v", waiting, err)
	}
	v = put(t, a, v, "two")
	if waiting, err := a.Await(ctx, v.Number, members); err != nil || len(waiting) > 0 {
		t.Fatalf("%v, %v", waiting, err)
	}
	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	close(last)
	var got []string
	for s := range last {
		got = append(got, s)
	}
	slices.Sort(got)
	if !slices.Equal(got, []string{"a one", "a two", "b one", "b two"}) {
		t.Errorf("%v", got)
	}
}

// FuzzOpen: nothing that is read from the store makes a server panic, nor is taken for a content.
func FuzzOpen(f *testing.F) {
	s, err := newSealer(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(nil))
	f.Add(s.seal([]byte("x"), "elsewhere"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if content, err := s.open(raw, "p"); err == nil {
			t.Errorf("%q is opened as %q", raw, content)
		}
	})
}
