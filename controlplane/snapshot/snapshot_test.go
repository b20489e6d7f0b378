// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"skep.io/skep/controlplane/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	quiet = slog.New(slog.DiscardHandler)
	noon  = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
)

// content is a store that has only bytes.
type content struct {
	data string
	err  error
}

func (c content) Snapshot(_ context.Context, w io.Writer) (int64, error) {
	if _, err := io.WriteString(w, c.data); err != nil {
		return 0, err
	}
	return 7, c.err
}

// keys makes the files that a cluster's authority has.
func keys(t *testing.T) func() ([]string, error) {
	t.Helper()
	dir := t.TempDir()
	var out []string
	for _, name := range []string{"ca.crt", "ca.key", "service-account.key"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("content of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
		out = append(out, path)
	}
	return func() ([]string, error) { return out, nil }
}

func newTaker(t *testing.T, s Source) *Taker {
	t.Helper()
	return &Taker{Dir: filepath.Join(t.TempDir(), "snapshots"), Store: s, Keys: keys(t), Node: "n1", Version: "v0"}
}

func openStore(t *testing.T, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWhatWasAcknowledgedComesBack(t *testing.T) {
	ctx, dataDir := t.Context(), t.TempDir()
	s := openStore(t, filepath.Join(dataDir, "server"))
	before, err := s.Client().Put(ctx, "kept", "1")
	if err != nil {
		t.Fatal(err)
	}
	taken, err := newTaker(t, s).Take(ctx, "", OnDemand, noon)
	if err != nil {
		t.Fatal(err)
	}
	if taken.Revision < before.Header.Revision {
		t.Errorf("revision %d, and %d was acknowledged before", taken.Revision, before.Header.Revision)
	}
	after, err := s.Client().Put(ctx, "lost", "1")
	if err != nil {
		t.Fatal(err)
	}
	to := Target{DataDir: dataDir, Now: noon, Log: quiet}
	if _, err := Restore(ctx, taken.Path, to); !errors.Is(err, ErrOccupied) {
		t.Fatalf("over another control plane: %v", err)
	}
	to.Replace = true
	if _, err := Restore(ctx, taken.Path, to); !errors.Is(err, store.ErrLocked) {
		t.Fatalf("under a running server: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	done, err := Restore(ctx, taken.Path, to)
	if err != nil {
		t.Fatal(err)
	}
	if got := files(t, dataDir); !slices.Equal(got, []string{"server", filepath.Base(done.Aside)}) {
		t.Errorf("the data directory has %q", got)
	}
	for _, name := range []string{"ca.crt", "ca.key", "service-account.key"} {
		path := filepath.Join(dataDir, "server", "tls", name)
		got, err := os.ReadFile(path)
		if err != nil || string(got) != "content of "+name {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	s = openStore(t, filepath.Join(dataDir, "server"))
	has := func(s *store.Store, key string) bool {
		r, err := s.Client().Get(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Kvs) == 1
	}
	if !has(s, "kept") || has(s, "lost") {
		t.Errorf("kept: %v, lost: %v", has(s, "kept"), has(s, "lost"))
	}
	// Who has seen a revision that was lost must not take the next one for it.
	next, err := s.Client().Put(ctx, "new", "1")
	if err != nil {
		t.Fatal(err)
	}
	if next.Header.Revision <= after.Header.Revision {
		t.Errorf("revision %d after %d", next.Header.Revision, after.Header.Revision)
	}
	if r := <-s.Client().Watch(ctx, "kept", startAt(after.Header.Revision)); r.CompactRevision == 0 {
		t.Errorf("a watch from a lost revision got %+v", r)
	}
	// What was there is kept, and works.
	old := filepath.Join(t.TempDir(), "server")
	if err := os.Rename(done.Aside, old); err != nil {
		t.Fatal(err)
	}
	if s := openStore(t, old); !has(s, "lost") {
		t.Error("what was replaced has lost something")
	}
}

func TestDamageIsFoundAndNothingChanges(t *testing.T) {
	s := openStore(t, t.TempDir())
	taken, err := newTaker(t, s).Take(t.Context(), "x", OnDemand, noon)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(taken.Path)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(at int) []byte {
		out := bytes.Clone(whole)
		out[at] ^= 0x10
		return out
	}
	damaged := map[string][]byte{
		"empty": nil, "nonsense": []byte("hello"), "cut in the middle": whole[:len(whole)/2],
		"cut at the end": whole[:len(whole)-1], "more behind": append(bytes.Clone(whole), "more"...), "first byte": flip(0), "last byte": flip(len(whole) - 1),
	}
	// Bytes 4 to 9 are gzip's time and system, which mean nothing.
	for i := range 50 {
		at := 10 + i*(len(whole)-11)/50
		damaged["byte "+string(rune('A'+i))] = flip(at)
	}
	for name, data := range damaged {
		t.Run(name, func(t *testing.T) {
			file, dataDir := filepath.Join(t.TempDir(), "f"), t.TempDir()
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Restore(t.Context(), file, Target{DataDir: dataDir, Now: noon, Log: quiet})
			if err == nil && bytes.Equal(unzip(t, data), unzip(t, whole)) {
				return // a flip that says the same in another way: one run of zeros is like another
			}
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("got %v", err)
			}
			if left := files(t, dataDir); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func unzip(t *testing.T, data []byte) []byte {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(zip)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// archive makes what a stranger might.
func archive(t *testing.T, m Manifest, entries ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	w := tar.NewWriter(zip)
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{manifestName}, entries...) {
		data := []byte("x")
		if name == manifestName {
			data = raw
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestStrangersArchives(t *testing.T) {
	const hashOfX = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
	file := func(name string) File { return File{Name: name, Size: 1, SHA256: hashOfX} }
	good := []File{file(databaseName), file("tls/ca.crt"), file("tls/ca.key")}
	for name, c := range map[string]struct {
		m       Manifest
		entries []string
		says    string
	}{
		"another format":  {Manifest{Format: 2, Version: "v9", Files: good}, nil, "use the version of skep that made it \\(v9\\)"},
		"no keys":         {Manifest{Format: 1, Files: good[:1]}, nil, "lacks"},
		"leads elsewhere": {Manifest{Format: 1, Files: append(slices.Clone(good), file("tls/../../x"))}, nil, "is none of a snapshot"},
		"absolute":        {Manifest{Format: 1, Files: append(slices.Clone(good), file("/etc/passwd"))}, nil, "is none of a snapshot"},
		"twice":           {Manifest{Format: 1, Files: append(slices.Clone(good), good[1])}, nil, "is none of a snapshot"},
		"huge key":        {Manifest{Format: 1, Files: append(slices.Clone(good), File{Name: "tls/x.key", Size: 1 << 40})}, nil, "is none of a snapshot"},
		"one missing":     {Manifest{Format: 1, Files: good}, []string{databaseName, "tls/ca.crt"}, "tls/ca.key"},
		"another order":   {Manifest{Format: 1, Files: good}, []string{databaseName, "tls/ca.key", "tls/ca.crt"}, "is to be"},
		"one more":        {Manifest{Format: 1, Files: good}, []string{databaseName, "tls/ca.crt", "tls/ca.key", "x"}, "more behind"},
	} {
		t.Run(name, func(t *testing.T) {
			m, r, err := readManifest(bytes.NewReader(archive(t, c.m, c.entries...)))
			if err == nil {
				err = r.extract(m, t.TempDir())
			}
			says := strings.NewReplacer(`\(`, "(", `\)`, ")").Replace(c.says)
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), says) {
				t.Errorf("got %v, want %q", err, says)
			}
		})
	}
}

func TestNameAppearsOnlyWhenComplete(t *testing.T) {
	taker := newTaker(t, content{"data", errors.New("the store went away")})
	if _, err := taker.Take(t.Context(), "x", OnDemand, noon); err == nil {
		t.Error("a snapshot of a store that fails is taken")
	}
	if left := files(t, taker.Dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	taker.Store = content{data: "data"}
	first, err := taker.Take(t.Context(), "x", OnDemand, noon)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(first.Path)
	if _, err := taker.Take(t.Context(), "x", OnDemand, noon.Add(time.Hour)); err == nil || !strings.Contains(err.Error(), "is there already") {
		t.Errorf("a second of that name: %v", err)
	}
	if after, _ := os.ReadFile(first.Path); !bytes.Equal(before, after) {
		t.Error("the first was changed")
	}
	for _, path := range []string{first.Path, taker.Dir} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	for _, name := range []string{"../x", "a/b", ".x", "-x", "a b", strings.Repeat("x", 129)} {
		if _, err := taker.Take(t.Context(), name, OnDemand, noon); err == nil {
			t.Errorf("%q names a snapshot", name)
		}
	}
}

func TestRetention(t *testing.T) {
	taker := newTaker(t, content{data: "data"})
	names := func() string {
		all, err := List(taker.Dir)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, s := range all {
			out = append(out, s.Name)
		}
		return strings.Join(out, " ")
	}
	if _, err := taker.Take(t.Context(), "mine", OnDemand, noon.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	other := &Taker{Dir: taker.Dir, Store: taker.Store, Keys: taker.Keys, Node: "n2"}
	if _, err := other.Take(t.Context(), "other", Scheduled, noon.Add(-time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(taker.Dir, "broken.tar.gz"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := taker.scheduled(t.Context(), 2, noon.Add(time.Duration(i)*time.Second), quiet); err != nil {
			t.Fatal(err)
		}
	}
	const want = "mine other scheduled-n1-1795694402 scheduled-n1-1795694403 broken"
	if got := names(); got != want {
		t.Errorf("kept %s, want %s", got, want)
	}
	// One that fails deletes nothing.
	taker.Store = content{err: errors.New("no")}
	if err := taker.scheduled(t.Context(), 1, noon.Add(time.Hour), quiet); err == nil || names() != want {
		t.Errorf("%v; kept %s", err, names())
	}
}

func TestScheduleTakesSnapshots(t *testing.T) {
	taker := newTaker(t, content{data: "data"})
	log, seen := newSignals("snapshot taken")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- taker.Run(ctx, always{}, 1, log) }()
	for range 2 {
		<-seen
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
