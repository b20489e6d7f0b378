// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
)

// LocalPaths are the directories of the volumes that the class local-path has made on this node. The control plane
// asks for them by name; nothing outside of the one directory can be named.
type LocalPaths struct{ dir string }

// NewLocalPaths keeps volumes below dir, which it makes when the first is asked for.
func NewLocalPaths(dir string) *LocalPaths { return &LocalPaths{dir} }

var localPathName = regexp.MustCompile(`^pvc-[0-9a-f-]+_[a-z0-9-]+_[a-z0-9.-]+$`)

// Make makes the directory of a volume, if it is not there. Whatever user a container runs as may write in it; the
// directory above keeps other users of the host out.
func (l *LocalPaths) Make(name string) error {
	if !localPathName.MatchString(name) {
		return fmt.Errorf("%q is no name of a volume", name)
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(l.dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(l.dir, name)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// It gets its name when it is complete: a crash in between leaves no volume that nobody may write in.
	unnamed := filepath.Join(l.dir, ".making-"+name)
	if err := os.Mkdir(unnamed, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Chmod(unnamed, 0o777); err != nil { // whatever the umask
		return err
	}
	if err := os.Rename(unnamed, path); err != nil {
		return err
	}
	return syncDir(l.dir)
}

// Remove deletes a volume with what is in it. One that is not there is no error.
func (l *LocalPaths) Remove(name string) error {
	if !localPathName.MatchString(name) {
		return fmt.Errorf("%q is no name of a volume", name)
	}
	if err := removeHere(filepath.Join(l.dir, name)); err != nil {
		return err
	}
	if err := syncDir(l.dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// syncDir has what was made or removed in a directory survive a loss of power.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ServeHTTP makes (PUT) and removes (DELETE) the directory that the path's last element names.
func (l *LocalPaths) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	var err error
	switch r.Method {
	case http.MethodPut:
		err = l.Make(name)
	case http.MethodDelete:
		err = l.Remove(name)
	default:
		http.Error(w, "PUT or DELETE", http.StatusMethodNotAllowed)
		return
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
