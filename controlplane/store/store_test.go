// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// holdEnv makes the test binary a process that holds the data directory it names.
const holdEnv = "SKEP_TEST_HOLD_STORE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdEnv); dir != "" {
		hold(dir)
		return
	}
	if os.Getenv(leakyEnv) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// leakyEnv is set in a child that may leave goroutines behind.
const leakyEnv = "SKEP_TEST_LEAKY"

// inChild runs the test in a process of its own: etcd's goroutines that met a failure end with
// their locks held, and those that wait for them never end.
func inChild(t *testing.T) (parent bool) {
	t.Helper()
	if os.Getenv(leakyEnv) != "" {
		return false
	}
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), leakyEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	return true
}

func hold(dir string) {
	s, err := Open(context.Background(), Config{DataDir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent goes away
	_ = s.Close()
}

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func put(t *testing.T, s *Store, key, value string) {
	t.Helper()
	if _, err := s.Client().Put(t.Context(), key, value); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s *Store, key string) string {
	t.Helper()
	r, err := s.Client().Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func TestResumesWhatItStored(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "a", "1")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	s = open(t, dir)
	if v := get(t, s, "a"); v != "1" {
		t.Errorf("a is %q after a restart", v)
	}
	fi, err := os.Stat(filepath.Join(dir, "etcd"))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o700 {
		t.Errorf("etcd directory has mode %o", fi.Mode().Perm())
	}
}

func TestWatchSeesWrites(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := s.Client().Watch(clientv3.WithRequireLeader(ctx), "k", clientv3.WithPrefix())
	put(t, s, "k1", "v")
	select {
	case r := <-w:
		if len(r.Events) != 1 || string(r.Events[0].Kv.Key) != "k1" {
			t.Errorf("watch got %+v", r.Events)
		}
	case <-time.After(time.Minute):
		t.Fatal("no event")
	}
}

func TestNothingListens(t *testing.T) {
	before := listeners(t)
	open(t, t.TempDir())
	if after := listeners(t); after != before {
		t.Errorf("%d sockets listen, %d before", after, before)
	}
}

// listeners counts this process's listening TCP sockets.
func listeners(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		var num int
		_, _ = fmt.Sscan(fd.Name(), &num)
		if v, err := unix.GetsockoptInt(num, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && v == 1 {
			n++
		}
	}
	return n
}

func TestLockedByThisProcess(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	if _, err := Open(t.Context(), Config{DataDir: dir}); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v", err)
	}
}

func TestLockedByAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdEnv+"="+dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := stdout.Read(buf); err != nil || string(buf) != "held\n" {
		t.Fatalf("holder said %q, %v", buf, err)
	}
	_, err = Open(t.Context(), Config{DataDir: dir})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", cmd.Process.Pid)) {
		t.Errorf("Open: %v", err)
	}

	// With a wait, the end of the other process is enough.
	go stdin.Close()
	s, err := Open(t.Context(), Config{DataDir: dir, LockWait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("holder: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestKilledProcessLeavesNoLockAndLosesNothing(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdEnv+"="+dir)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	put(t, open(t, dir), "a", "1")
}

// snapshotTree reads every file below dir.
func snapshotTree(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(p)
		out[p] = data
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCorruptDataIsRefusedAndLeftAlone(t *testing.T) {
	glob := func(t *testing.T, dir, pattern string) string {
		m, err := filepath.Glob(filepath.Join(dir, "etcd/member", pattern))
		if err != nil || len(m) == 0 {
			t.Fatalf("%s: %v, %v", pattern, m, err)
		}
		return m[0]
	}
	overwrite := func(t *testing.T, path string, off int64, n int) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, n), off); err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]func(t *testing.T, dir string){
		"database is garbage":   func(t *testing.T, dir string) { overwrite(t, glob(t, dir, "snap/db"), 0, 16<<10) },
		"database is cut short": func(t *testing.T, dir string) { truncate(t, glob(t, dir, "snap/db"), 9000) },
		"database is gone":      func(t *testing.T, dir string) { remove(t, glob(t, dir, "snap/db")) },
		"log is gone":           func(t *testing.T, dir string) { remove(t, filepath.Dir(glob(t, dir, "wal/*.wal"))) },
		"log is garbage":        func(t *testing.T, dir string) { overwrite(t, glob(t, dir, "wal/*.wal"), 64, 2048) },
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			for i := range 50 {
				put(t, s, fmt.Sprint("key", i), strings.Repeat("v", 100))
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			whole := snapshotTree(t, filepath.Join(dir, "etcd/member"))
			damage(t, dir)
			before := snapshotTree(t, filepath.Join(dir, "etcd/member"))
			_, err := Open(t.Context(), Config{DataDir: dir})
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("Open: %v", err)
			}
			t.Log(err)
			after := snapshotTree(t, filepath.Join(dir, "etcd/member"))
			for p, data := range before {
				// bolt writes its free list when it opens a database that is whole.
				if !bytes.Equal(after[p], data) && (name != "log is garbage" || filepath.Base(p) != "db") {
					t.Errorf("%s was changed", p)
				}
			}

			// With the damage undone, everything is there.
			for p, data := range whole {
				if bytes.Equal(before[p], data) {
					continue
				}
				if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s = open(t, dir)
			for i := range 50 {
				if get(t, s, fmt.Sprint("key", i)) == "" {
					t.Fatalf("key%d is lost", i)
				}
			}
		})
	}
}

// What a later etcd has written is refused, whichever of its two places says so, and left alone.
func TestDataOfALaterVersionIsRefusedAndLeftAlone(t *testing.T) {
	for bucket, key := range map[string]string{"meta": "storageVersion", "cluster": "clusterVersion"} {
		t.Run(key, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			put(t, s, "a", "b")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			write := func(value string) (before string) {
				t.Helper()
				db, err := bolt.Open(filepath.Join(dir, "etcd/member/snap/db"), 0o600, nil)
				if err != nil {
					t.Fatal(err)
				}
				err = db.Update(func(tx *bolt.Tx) error {
					b := tx.Bucket([]byte(bucket))
					before = string(b.Get([]byte(key)))
					if value == "" {
						return b.Delete([]byte(key))
					}
					return b.Put([]byte(key), []byte(value))
				})
				if err := errors.Join(err, db.Close()); err != nil {
					t.Fatal(err)
				}
				return before
			}
			was := write("3.99.0")
			before := snapshotTree(t, dir)
			if _, err := Open(t.Context(), Config{DataDir: dir}); !errors.Is(err, ErrTooNew) || !strings.Contains(err.Error(), "3.99.0") {
				t.Fatalf("%v", err)
			}
			if after := snapshotTree(t, dir); !reflect.DeepEqual(before, after) {
				t.Error("it was changed")
			}
			write(was)
			if s := open(t, dir); get(t, s, "a") != "b" {
				t.Error("what was there is lost")
			}
		})
	}
}

func truncate(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// tmpfs mounts a file system of size bytes.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("skep-store-test", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount tmpfs (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDiskAtStart(t *testing.T) {
	_, err := Open(t.Context(), Config{DataDir: tmpfs(t, "32m")})
	if !errors.Is(err, ErrNoSpace) {
		t.Fatalf("Open: %v", err)
	}
}

// A disk that fills up while the store runs ends the store, not the process, and what was
// acknowledged before is there when there is room again.
func TestFullDiskWhileRunning(t *testing.T) {
	if inChild(t) {
		return
	}
	dir := tmpfs(t, "224m")
	s := open(t, dir)
	put(t, s, "before", "1")
	filler := filepath.Join(dir, "filler")
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filler, make([]byte, int64(st.Bavail)*st.Bsize), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		select {
		case <-s.Failed():
			cancel()
		case <-ctx.Done():
		}
	}()
	value, acknowledged := strings.Repeat("v", 1<<20), 0
	for ctx.Err() == nil {
		if _, err := s.Client().Put(ctx, "filling", value); err == nil {
			acknowledged++
		}
	}
	select {
	case <-s.Failed():
	case <-time.After(time.Minute):
		t.Fatalf("store still works after %d MiB", acknowledged)
	}
	if err := s.Err(); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Err: %v", err)
	}
	if err := s.Close(); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Close: %v", err)
	}
	t.Logf("after %d MiB: %v", acknowledged, s.Err())

	// The failed store's goroutines still have files open, as they would until the process ends;
	// a copy stands for the next process.
	remove(t, filler)
	again := t.TempDir()
	if err := os.CopyFS(again, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	s = open(t, again)
	if v := get(t, s, "before"); v != "1" {
		t.Errorf("before is %q", v)
	}
}

func TestDefragmentGivesSpaceBack(t *testing.T) {
	s := open(t, t.TempDir())
	value := strings.Repeat("v", 1<<20)
	var rev int64
	for range 20 {
		r, err := s.Client().Put(t.Context(), "k", value)
		if err != nil {
			t.Fatal(err)
		}
		rev = r.Header.Revision
	}
	if _, err := s.Client().Compact(t.Context(), rev, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	before, err := s.usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if err := s.defragIfWorth(t.Context(), log, func(usage) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if u, _ := s.usage(t.Context()); u.size != before.size {
		t.Errorf("defragmented although not worth it: %d to %d", before.size, u.size)
	}
	if err := s.defragIfWorth(t.Context(), log, func(usage) bool { return true }); err != nil {
		t.Fatal(err)
	}
	after, err := s.usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.size > before.size/2 {
		t.Errorf("%d bytes before, %d after", before.size, after.size)
	}
	if get(t, s, "k") != value {
		t.Error("value is lost")
	}
}

// A log longer than what etcd keeps in memory is replayed while the member campaigns.
func TestRestartWithALongLog(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for i := range 350 {
		put(t, s, fmt.Sprint("k", i), "v")
	}
	for range 10 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, dir)
		if get(t, s, "k349") != "v" {
			t.Fatal("lost")
		}
	}
}
