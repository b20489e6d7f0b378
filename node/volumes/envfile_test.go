// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

func TestEnvFile(t *testing.T) {
	b := newBench(t)
	p := podWith(
		corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		corev1.Volume{Name: "other", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}},
	)
	if _, err := b.Mount(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	root := b.path(p.UID, &p.Spec.Volumes[0])
	secret := filepath.Join(t.TempDir(), "secret")
	for path, content := range map[string]string{
		secret:                         "A='of the host'\n",
		filepath.Join(root, "env"):     "# comment\nA='one'\nB='two\nlines' # and more\nEMPTY=\nC='3'\n",
		filepath.Join(root, "good"):    "A='one'\nB='two\nlines' # and more\n",
		filepath.Join(root, "dir/env"): "A='deep'\n",
		filepath.Join(root, "large"):   "A='one'\n" + strings.Repeat("#\n", maxEnvFile/2),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"out": secret, "up": "../../../../secret", "in": "dir/env"} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "pipe"), 0o666); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ volume, path, key, want, err string }{
		{"v", "env", "A", "one", ""},
		{"v", "good", "B", "two\nlines", ""},
		{"v", "good", "C", "", ""},
		{"v", "/dir/env", "A", "deep", ""},
		{"v", "in", "A", "deep", ""},
		{"v", "env", "C", "", "couldn't parse env file"}, // a value without quotes comes before it
		{"v", "none", "A", "", "no such file"},
		{"v", "dir", "A", "", "not a regular file"},
		{"v", "pipe", "A", "", "not a regular file"},
		{"v", "out", "A", "", "cross-device"},
		{"v", "up", "A", "", "cross-device"},
		{"v", "../x", "A", "", "within the volume"},
		{"v", "large", "A", "", "more than"},
		{"other", "etc/hosts", "A", "", "no volume"},
		{"gone", "env", "A", "", "no volume"},
	} {
		got, err := b.EnvFile(p, c.volume, c.path, c.key)
		if got != c.want || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s of %s: %q, %v", c.key, c.path, got, err)
		}
		if c.path == "none" && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing file: %v", err)
		}
	}
}
