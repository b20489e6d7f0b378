// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/platforms"
)

// imported remembers an archive, so that an unchanged one costs a stat at the next start.
type imported struct {
	Size    int64
	ModTime time.Time
	SHA256  string
	Images  []string // references it named
}

func (r *Runtime) importsPath() string { return filepath.Join(r.cfg.DataDir, "imported.json") }

func (r *Runtime) readImports() map[string]imported {
	known := map[string]imported{}
	if data, err := os.ReadFile(r.importsPath()); err == nil {
		// Without it archives are read once more, which changes nothing.
		_ = json.Unmarshal(data, &known)
	}
	return known
}

// ImportDir imports the archives (*.tar, *.tar.gz, *.tgz; OCI or docker) that lie in dir, less those whose
// content it has imported before and whose images are still there. One bad archive does not stop the others: the error
// names each, and the images that could be had are returned with it.
func (s ImageStore) ImportDir(ctx context.Context, dir string) ([]Image, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	known := s.r.readImports()
	var all []Image
	var errs []error
	changed := false
	for _, e := range entries {
		name := e.Name()
		if !strings.HasSuffix(name, ".tar") && !strings.HasSuffix(name, ".tar.gz") && !strings.HasSuffix(name, ".tgz") {
			continue
		}
		path := filepath.Join(dir, name)
		done, fresh, err := s.importFile(ctx, path, known)
		if err != nil {
			errs = append(errs, fmt.Errorf("import %s: %w", path, err))
			continue
		}
		if fresh {
			changed = true
		}
		for _, ref := range done.Images {
			if i := s.r.images.byName(ref); i != nil {
				all = append(all, i.public())
			}
		}
	}
	s.r.images.pin(known)
	if changed {
		data, err := json.Marshal(known)
		if err == nil {
			tmp := s.r.importsPath() + ".tmp"
			if err = os.WriteFile(tmp, data, 0o600); err == nil {
				err = os.Rename(tmp, s.r.importsPath())
			}
		}
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

// importFile imports one archive unless known says that it was; it updates known.
func (s ImageStore) importFile(ctx context.Context, path string, known map[string]imported) (done imported, fresh bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return imported{}, false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return imported{}, false, err
	}
	before, ok := known[path]
	present := ok && s.present(before.Images)
	if present && before.Size == st.Size() && before.ModTime.Equal(st.ModTime()) {
		return before, false, nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return imported{}, false, err
	}
	done = imported{Size: st.Size(), ModTime: st.ModTime(), SHA256: hex.EncodeToString(sum.Sum(nil))}
	if present && before.SHA256 == done.SHA256 {
		done.Images = before.Images
		known[path] = done
		return done, true, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return imported{}, false, err
	}
	if done.Images, err = s.Import(ctx, f); err != nil {
		return imported{}, false, err
	}
	known[path] = done
	return done, true, nil
}

func (s ImageStore) present(refs []string) bool {
	for _, ref := range refs {
		if s.r.images.byName(ref) == nil {
			return false
		}
	}
	return len(refs) > 0
}

// Import reads one archive, unpacks its images, and returns the references that it named.
func (s ImageStore) Import(ctx context.Context, archiveReader io.Reader) ([]string, error) {
	r, ctx := s.r, s.r.in(ctx)
	ctx, release, err := r.client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = release(context.WithoutCancel(ctx)) }()
	all, err := r.client.Import(ctx, archiveReader,
		client.WithImageRefTranslator(archive.FilterRefPrefix("")), client.WithImportPlatform(platforms.Default()))
	if err != nil {
		return nil, err
	}
	var refs []string
	for _, i := range all {
		if err := client.NewImage(r.client, i).Unpack(ctx, r.snapshotter); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", i.Name, err)
		}
		if _, err := r.addImage(ctx, i); err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name, err)
		}
		refs = append(refs, i.Name)
	}
	if len(refs) == 0 {
		return nil, errors.New("the archive names no image: save it with a tag")
	}
	return refs, nil
}
