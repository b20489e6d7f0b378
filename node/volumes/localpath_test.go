// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLocalPathMakeAfterACrash: what a crash left before the directory was complete does not stay so.
func TestLocalPathMakeAfterACrash(t *testing.T) {
	dir := t.TempDir()
	const name = "pvc-1_default_data"
	if err := os.Mkdir(filepath.Join(dir, ".making-"+name), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := NewLocalPaths(dir).Make(name); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(filepath.Join(dir, name))
	if err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("%v, %v", info, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
