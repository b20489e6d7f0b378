// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

func TestLocalPaths(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "storage")
	l := NewLocalPaths(dir)
	const name = "pvc-1-2_shop_data.x"
	if err := l.Remove(name); err != nil {
		t.Errorf("remove what was never there: %v", err)
	}
	for range 2 {
		if err := l.Make(name); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, name): 0o777} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v %v", path, st.Mode(), err)
		}
	}
	for range 2 {
		if err := l.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	outside := filepath.Join(filepath.Dir(dir), "outside")
	if err := os.Mkdir(outside, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", ".", "..", "../outside", "pvc-1_a_../../outside", "/etc", "pvc-1_a_b/c", "storage"} {
		if l.Make(bad) == nil || l.Remove(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
}

// TestGiveTo: all below the volume is the group's, nothing outside of it, and OnRootMismatch spares the walk.
func TestGiveTo(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("files can be given to a group by root only")
	}
	above := t.TempDir()
	dir, outside := filepath.Join(above, "volume"), filepath.Join(above, "outside")
	sub, file := filepath.Join(dir, "sub"), filepath.Join(dir, "sub", "file")
	if err := os.MkdirAll(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, outside} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	check := func(path string, gid uint32, mode uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Gid != gid || st.Mode&0o7777 != mode {
			t.Errorf("%s: group %d mode %o, want %d %o (%v)", path, st.Gid, st.Mode&0o7777, gid, mode, err)
		}
	}
	if err := giveTo(dir, 2000, nil); err != nil {
		t.Fatal(err)
	}
	check(sub, 2000, 0o2770)
	check(file, 2000, 0o660)
	check(outside, 0, 0o600)

	if err := os.Chown(file, 0, 0); err != nil {
		t.Fatal(err)
	}
	policy := corev1.FSGroupChangeOnRootMismatch
	if err := giveTo(dir, 2000, &policy); err != nil {
		t.Fatal(err)
	}
	check(file, 0, 0o660)
	if err := giveTo(dir, 3000, &policy); err != nil {
		t.Fatal(err)
	}
	check(file, 3000, 0o660)
}
