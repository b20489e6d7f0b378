// SPDX-License-Identifier: Apache-2.0

package crilog

import (
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// stampLayout is kubelet's.
const stampLayout = "20060102-150405"

// rotate renames the current file and starts a new one. The newest rotated file stays as text, so
// that a reader who follows finds its end; older ones are gzipped, and too old ones removed.
func (w *Writer) rotate() error {
	// Later than every other, even when rotations follow one another within a second: order is in the names.
	stamp := w.now().Truncate(time.Second)
	if files := Rotated(w.path); len(files) > 0 {
		newest := strings.TrimSuffix(strings.TrimPrefix(files[len(files)-1], w.path+"."), ".gz")
		if last, err := time.ParseInLocation(stampLayout, newest, stamp.Location()); err == nil && !stamp.After(last) {
			stamp = last.Add(time.Second)
		}
	}
	target := w.path + "." + stamp.Format(stampLayout)
	if err := os.Rename(w.path, target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	old := w.file
	if err := w.open(); err != nil {
		w.file = old
		return err
	}
	old.Close()
	// The previous background pass works on files that this one may touch.
	w.rotated.Wait()
	w.rotated.Add(1)
	go func() {
		defer w.rotated.Done()
		prune(w.path, w.limits.Files-1)
	}()
	return nil
}

// Rotated lists the rotated files of path, oldest first.
func Rotated(path string) []string {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil
	}
	var found []string
	prefix := filepath.Base(path) + "."
	for _, e := range entries {
		stamp, ok := strings.CutPrefix(e.Name(), prefix)
		if !ok {
			continue
		}
		if _, err := time.Parse(stampLayout, strings.TrimSuffix(stamp, ".gz")); err == nil {
			found = append(found, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	slices.SortFunc(found, func(a, b string) int {
		return strings.Compare(strings.TrimSuffix(a, ".gz"), strings.TrimSuffix(b, ".gz"))
	})
	return found
}

// prune keeps the newest n rotated files and compresses all but the newest.
func prune(path string, n int) {
	files := Rotated(path)
	for len(files) > n {
		os.Remove(files[0])
		files = files[1:]
	}
	for i, f := range files {
		if i < len(files)-1 && !strings.HasSuffix(f, ".gz") {
			// A file that cannot be compressed (disk full) stays as it is and is tried at the next rotation.
			_ = compress(f)
		}
	}
}

func compress(path string) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	tmp := path + ".tmp"
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	z := gzip.NewWriter(out)
	_, err = io.Copy(z, in)
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err = os.Rename(tmp, path+".gz"); err != nil {
		return err
	}
	return os.Remove(path)
}
