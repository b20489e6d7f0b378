// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is the time of everything in an image: the same input makes the same bytes.
var epoch = time.Unix(0, 0).UTC()

// tree is the root file system of an image, by absolute path.
type tree map[string]entry

// entry is one file, directory (mode has os.ModeDir) or symbolic link (link is set).
type entry struct {
	mode os.FileMode
	data []byte
	link string
}

// newTree holds what programs expect everywhere: a place for temporary files, and names for users.
func newTree() tree {
	return tree{
		"/tmp":        {mode: os.ModeDir | os.ModeSticky | 0o777},
		"/etc/passwd": {mode: 0o644, data: []byte("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nnonroot:x:65532:65532:nonroot:/:/bin/false\n")},
		"/etc/group":  {mode: 0o644, data: []byte("root:x:0:\nnobody:x:65534:\nnonroot:x:65532:\n")},
	}
}

// addFile takes a file from the host. Of its mode only the executable bit counts.
func (t tree) addFile(src, dst string) error {
	data, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	info, err := os.Stat(src)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	t[path.Clean("/"+dst)] = entry{mode: mode, data: data}
	return nil
}

// addBinary takes a program, which has to be static: there is no loader and no library in the image.
func (t tree) addBinary(src, dst string) error {
	f, err := elf.Open(src)
	if err != nil {
		return fmt.Errorf("%s is not a Linux program: %w", src, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is dynamically linked and would not start in the image: build it with CGO_ENABLED=0", src)
		}
	}
	if err := t.addFile(src, dst); err != nil {
		return err
	}
	e := t[path.Clean("/"+dst)]
	e.mode = 0o755
	t[path.Clean("/"+dst)] = e
	return nil
}

// addBusybox takes a busybox, with a link for each program it holds.
func (t tree) addBusybox(src string) error {
	if err := t.addBinary(src, "/bin/busybox"); err != nil {
		return err
	}
	out, err := exec.Command(src, "--list").Output()
	if err != nil {
		return fmt.Errorf("asking %s for its programs: %w", src, err)
	}
	for name := range strings.FieldsSeq(string(out)) {
		if p := "/bin/" + path.Base(name); p != "/bin/busybox" {
			t[p] = entry{mode: 0o777, link: "busybox"}
		}
	}
	return nil
}

// addNames makes links, PATH=TARGET each, and directories that everybody may write in.
func (t tree) addNames(links, dirs []string) error {
	for _, l := range links {
		name, target, ok := strings.Cut(l, "=")
		if !ok || name == "" || target == "" {
			return fmt.Errorf("--link %s: PATH=TARGET is needed", l)
		}
		t[path.Clean("/"+name)] = entry{mode: 0o777, link: target}
	}
	for _, d := range dirs {
		t[path.Clean("/"+d)] = entry{mode: os.ModeDir | os.ModeSticky | 0o777}
	}
	return nil
}

// layer packs the tree, parents first.
func (t tree) layer() (v1.Layer, error) {
	all := maps.Clone(t)
	for p := range t {
		for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
			if _, ok := all[dir]; !ok {
				all[dir] = entry{mode: os.ModeDir | 0o755}
			}
		}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, p := range slices.Sorted(maps.Keys(all)) {
		e := all[p]
		h := &tar.Header{
			Name: strings.TrimPrefix(p, "/"), Mode: int64(e.mode.Perm()), ModTime: epoch,
			Typeflag: tar.TypeReg, Size: int64(len(e.data)), Format: tar.FormatPAX,
		}
		switch {
		case e.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
			if e.mode&os.ModeSticky != 0 {
				h.Mode |= 0o1000
			}
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("packing %s: %w", p, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("packing %s: %w", p, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithCompressionLevel(gzip.BestSpeed))
}
