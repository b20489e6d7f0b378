// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// program compiles a small static program named web.
func program(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "main.go")
	if err := os.WriteFile(src, []byte("package main\nfunc main() { println(\"hello\") }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "web")
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

// contents lists an archive's file system: a line a path.
func contents(t *testing.T, archive string) (map[string]*tar.Header, string) {
	t.Helper()
	img, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Fatalf("not a valid image: %v", err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	fs := mutate.Extract(img)
	defer fs.Close()
	r := tar.NewReader(fs)
	files := map[string]*tar.Header{}
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, string(config)
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) {
			t.Errorf("%s has time %v", h.Name, h.ModTime)
		}
		files["/"+strings.TrimSuffix(h.Name, "/")] = h
	}
}

func TestSameInputMakesSameBytes(t *testing.T) {
	bin := program(t)
	dir := t.TempDir()
	extra := filepath.Join(dir, "motd")
	if err := os.WriteFile(extra, []byte("hi\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var archives [2][]byte
	for i := range archives {
		out := filepath.Join(dir, "hello.tar")
		if err := run([]string{"--tag", "skep.io/examples/hello:latest", "--output", out, "--port", "8080/tcp", bin, extra + ":/etc/motd"}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		archives[i] = b
		files, config := contents(t, out)
		if h := files["/web"]; h == nil || h.Mode != 0o755 {
			t.Errorf("/web: %+v", h)
		}
		if h := files["/etc/motd"]; h == nil || h.Mode != 0o644 {
			t.Errorf("/etc/motd: %+v", h)
		}
		if h := files["/tmp"]; h == nil || h.Mode != 0o1777 {
			t.Errorf("/tmp: %+v", h)
		}
		for _, want := range []string{`"Entrypoint":["/web"]`, `"User":"65532:65532"`, `"8080/tcp":{}`, `"created":"1970-01-01T00:00:00Z"`, `"os":"linux"`} {
			if !strings.Contains(config, want) {
				t.Errorf("config lacks %s:\n%s", want, config)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*.new")); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two runs with the same input wrote different archives")
	}
}

// The tests of several packages build their images in one directory at the same time.
func TestSeveralWriteTheSameArchive(t *testing.T) {
	bin, out := program(t), filepath.Join(t.TempDir(), "hello.tar")
	var all errgroup.Group
	for range 8 {
		all.Go(func() error { return run([]string{"--tag", "skep.io/examples/hello:latest", "--output", out, bin}) })
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	if files, _ := contents(t, out); files["/web"] == nil {
		t.Errorf("the archive lacks /web: %v", files)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(out), "*.new")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestBusyboxImage(t *testing.T) {
	const busybox = "/bin/busybox"
	if _, err := os.Stat(busybox); err != nil {
		t.Fatalf("install Debian's busybox-static: %v", err)
	}
	out := filepath.Join(t.TempDir(), "busybox.tar")
	if err := run([]string{"--tag", "skep.io/test/busybox:latest", "--output", out, "--busybox", busybox, "--link", "bin/shell=sh", "--dir", "/var/cache/"}); err != nil {
		t.Fatal(err)
	}
	files, config := contents(t, out)
	for _, applet := range []string{"/bin/sh", "/bin/ls", "/bin/wget", "/bin/nc", "/bin/nslookup"} {
		if h := files[applet]; h == nil || h.Typeflag != tar.TypeSymlink || h.Linkname != "busybox" {
			t.Errorf("%s: %+v", applet, h)
		}
	}
	if h := files["/bin/shell"]; h == nil || h.Typeflag != tar.TypeSymlink || h.Linkname != "sh" {
		t.Errorf("/bin/shell: %+v", h)
	}
	if h := files["/var/cache"]; h == nil || h.Typeflag != tar.TypeDir || h.Mode != 0o1777 {
		t.Errorf("/var/cache: %+v", h)
	}
	if !strings.Contains(config, `"Cmd":["sh"]`) {
		t.Errorf("config: %s", config)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "x.tar")
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	base := []string{"--tag", "skep.io/x:1", "--output", out}
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no tag":       {[]string{"--output", out, script}, "--tag and --output are required"},
		"nothing":      {base, "nothing to put into the image"},
		"not a binary": {append(base, script), "is not a Linux program"},
		"dynamic":      {append(base, "/bin/ls"), "is dynamically linked"},
		"missing":      {append(base, script+":/a", filepath.Join(dir, "none")+":/b"), "no such file"},
		"no place":     {append(base, script+":/a", script), "say where it goes"},
		"no target":    {append(base, "--link", "/a", script+":/b"), "PATH=TARGET is needed"},
		"bad tag":      {[]string{"--tag", "UPPER", "--output", out, script + ":/a"}, "--tag:"},
	} {
		t.Run(name, func(t *testing.T) {
			err := run(tc.args)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("an archive was written")
			}
		})
	}
}
