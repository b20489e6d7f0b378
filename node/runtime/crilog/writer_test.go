// SPDX-License-Identifier: Apache-2.0

package crilog

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// text puts records together again.
func text(t interface {
	Fatalf(string, ...any)
	Helper()
}, data []byte, stream string,
) string {
	t.Helper()
	var b strings.Builder
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || (f[2] != "F" && f[2] != "P") || len(f[3]) > MaxLine {
			t.Fatalf("record %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatalf("record %q: %v", line, err)
		}
		if f[1] != stream {
			continue
		}
		b.WriteString(f[3])
		if f[2] == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// TestNothingIsLost: whatever is written in whatever pieces comes out again.
func TestNothingIsLost(t *testing.T) {
	dir := t.TempDir()
	i := 0
	rapid.Check(t, func(t *rapid.T) {
		i++
		path := filepath.Join(dir, fmt.Sprint(i), "0.log")
		w, err := Open(path, Limits{})
		if err != nil {
			t.Fatalf("%v", err)
		}
		s := w.Stream("stdout")
		var want bytes.Buffer
		for range rapid.IntRange(1, 8).Draw(t, "pieces") {
			piece := rapid.SliceOfN(rapid.SampledFrom([]byte("ab\n")), 0, 50).Draw(t, "piece")
			piece = bytes.Repeat(piece, rapid.SampledFrom([]int{1, 1, 1, 700}).Draw(t, "times"))
			want.Write(piece)
			if n, err := s.Write(piece); err != nil || n != len(piece) {
				t.Fatalf("%d, %v", n, err)
			}
		}
		if err := s.Flush(); err != nil {
			t.Fatalf("%v", err)
		}
		w.Close()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatalf("%v", err)
		}
		if got := text(t, data, "stdout"); got != want.String() {
			t.Fatalf("wrote %d bytes, read %d", want.Len(), len(got))
		}
	})
}

// TestRotate: files are named as kubelet names them, the newest is text, older ones are gzipped, the oldest go.
func TestRotate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	w, err := Open(path, Limits{Size: 1000, Files: 4})
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream("stderr")
	for i := range 200 {
		if _, err := fmt.Fprintf(s, "line %d\n", i); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	files := Rotated(path)
	if len(files) != 3 {
		t.Fatalf("rotated files: %v", files)
	}
	var all bytes.Buffer
	for i, f := range append(files, path) {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if zipped := strings.HasSuffix(f, ".gz"); zipped != (i < len(files)-1) {
			t.Errorf("%d: %s", i, f)
		} else if zipped {
			z, err := gzip.NewReader(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			if data, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		}
		all.Write(data)
	}
	lines := strings.Split(strings.TrimSpace(text(t, all.Bytes(), "stderr")), "\n")
	for i, line := range lines {
		if want := fmt.Sprintf("line %d", 200-len(lines)+i); line != want {
			t.Fatalf("got %q, want %q", line, want)
		}
	}
	if len(lines) < 40 {
		t.Errorf("only %d lines are kept", len(lines))
	}
}

// TestDiskFull: a write that fails leaves no half record, and later ones go on.
func TestDiskFull(t *testing.T) {
	w, err := Open(filepath.Join(t.TempDir(), "0.log"), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	good := w.file
	w.file = full
	s := w.Stream("stdout")
	if n, err := s.Write([]byte("lost\n")); err == nil || n != 5 {
		t.Errorf("full disk: %d, %v", n, err)
	}
	w.file = good
	full.Close()
	if _, err := s.Write([]byte("kept\n")); err != nil {
		t.Error(err)
	}
	w.Close()
	data, err := os.ReadFile(w.path)
	if err != nil || text(t, data, "stdout") != "kept\n" {
		t.Errorf("file has %q, %v", data, err)
	}
}

func BenchmarkWrite(b *testing.B) {
	w, err := Open(filepath.Join(b.TempDir(), "0.log"), Limits{Size: 10 << 20, Files: 2})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	s := w.Stream("stdout")
	data := bytes.Repeat([]byte("a line of some hundred characters, as programs write them when they have something to say to us\n"), 300)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := s.Write(data); err != nil {
			b.Fatal(err)
		}
	}
}
