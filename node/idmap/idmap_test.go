// SPDX-License-Identifier: Apache-2.0

package idmap

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"skep.io/skep/node/sandbox/isolate"
)

func TestMain(m *testing.M) { os.Exit(isolate.Run(m)) }

const first = 3 * Length

// open makes a user namespace that lives as long as the test.
func open(t *testing.T) *os.File {
	t.Helper()
	if err := Supported(); err != nil {
		t.Fatal(err) // Linux 6.3 can, and CI has a later one
	}
	var namespace *os.File
	err := With(first, 0, func(dir string) error {
		var err error
		namespace, err = os.Open(filepath.Join(dir, "user"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { namespace.Close() })
	return namespace
}

func owner(t *testing.T, path string) uint32 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Uid
}

// Whoever is 0 on disk is the first of the pod's ids for the host, in a directory and in a file; what is mounted below is
// there, unmapped.
func TestMount(t *testing.T) {
	namespace := open(t)
	dir := t.TempDir()
	source, target, below := filepath.Join(dir, "source"), filepath.Join(dir, "target"), filepath.Join(dir, "source", "below")
	for _, d := range []string{source, target, below} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(source, "file")
	one := filepath.Join(dir, "one")
	for _, f := range []string{file, one} {
		if err := os.WriteFile(f, []byte("honey"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range []string{target, one, below} {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", m, err)
			}
		}
	})
	if err := Mount(source, target, namespace, unix.MS_PRIVATE); err != nil {
		t.Fatal(err)
	}
	if err := Mount(file, one, namespace, unix.MS_PRIVATE); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{filepath.Join(target, "file"): first, one: first, file: 0, filepath.Join(target, "below"): 0} {
		if got := owner(t, path); got != want {
			t.Errorf("%s is of %d, want %d", path, got, want)
		}
	}
}

// A file system whose files have no owners to map is named.
func TestMountUnmappable(t *testing.T) {
	namespace := open(t)
	target := t.TempDir()
	err := Mount("/proc/self", target, namespace, unix.MS_PRIVATE)
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "/proc/self") || !strings.Contains(err.Error(), "files on proc") {
		t.Errorf("error %v", err)
	}
	if err := Mount(filepath.Join(target, "no-such"), target, namespace, unix.MS_PRIVATE); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// Nothing of the process that held the namespaces stays.
func TestWith(t *testing.T) {
	want := errors.New("no use")
	var dir string
	if err := With(first, unix.CLONE_NEWUTS, func(d string) error { dir = d; return want }); !errors.Is(err, want) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", dir, err)
	}
}
