// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKubeconfigOfRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to look with another user's eyes")
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkReadable(file); err != nil {
		t.Errorf("root: %v", err)
	}
	if err := checkReadable(file + ".none"); err != nil {
		t.Errorf("no such file: %v", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(65534); err != nil {
		t.Fatal(err)
	}
	err := checkReadable(file)
	if back := unix.Setfsuid(0); back != nil {
		t.Fatal(back)
	}
	if err == nil || !strings.Contains(err.Error(), "use sudo") || !strings.Contains(err.Error(), file) {
		t.Errorf("another user: %v", err)
	}
}
