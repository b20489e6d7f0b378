// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// List describes the snapshots in dir, the oldest first; those that cannot be read come last, with why.
// Only the manifests are read: a file that is listed may still be damaged behind it.
func List(dir string) ([]Taken, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []Taken
	for _, e := range entries {
		name, isSnapshot := strings.CutSuffix(e.Name(), extension)
		if !isSnapshot || CheckName(name) != nil {
			continue
		}
		taken := Taken{Name: name, Path: filepath.Join(dir, e.Name())}
		taken.Manifest, taken.Size, taken.Err = describe(taken.Path)
		if errors.Is(taken.Err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		out = append(out, taken)
	}
	slices.SortFunc(out, func(a, b Taken) int {
		if (a.Err == nil) != (b.Err == nil) {
			if a.Err == nil {
				return -1
			}
			return 1
		}
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

func describe(path string) (Manifest, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return Manifest{}, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Manifest{}, 0, err
	}
	m, _, err := readManifest(f)
	return m, info.Size(), err
}

// Find returns the path of the snapshot that somebody named: a file, or a name in dir.
func Find(dir, named string) (string, error) {
	if strings.ContainsRune(named, filepath.Separator) {
		return named, nil
	}
	path := filepath.Join(dir, strings.TrimSuffix(named, extension)+extension)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("there is no snapshot %s in %s (`skep snapshot list` shows those there are; a path to a file serves, too): %w", named, dir, err)
	}
	return path, nil
}

// expired are those of the scheduled snapshots of a node that are more than the newest keep. What was
// asked for by somebody, or cannot be read, stays.
func expired(all []Taken, node string, keep int) []Taken {
	var own []Taken
	for _, s := range all {
		if s.Err == nil && s.Cause == Scheduled && s.Node == node {
			own = append(own, s)
		}
	}
	slices.SortStableFunc(own, func(a, b Taken) int { return b.Created.Compare(a.Created) })
	return own[min(keep, len(own)):]
}
