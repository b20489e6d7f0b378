// SPDX-License-Identifier: Apache-2.0

package static

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// maxFile bounds what is read of a file (kubelet: maxConfigLength).
	maxFile = 10 << 20
	// settle is how long a directory must be quiet before it is read: editors write in several steps.
	settle = 100 * time.Millisecond
	// rewatch is how long to wait before a directory that could not be watched is tried again.
	rewatch = 10 * time.Second
)

// Dir is a directory of static pods. Only one goroutine may use it.
type Dir struct {
	path, node string
	log        *slog.Logger
	files      map[string]*file
}

// file is what was last read of a file.
type file struct {
	pod     *corev1.Pod // nil: there never was a good one
	problem string      // what is wrong with the file now
	twin    string      // the file that has a pod of that name already
}

// NewDir is the directory at path, for the node of that name.
func NewDir(path, node string, log *slog.Logger) *Dir {
	return &Dir{path: path, node: node, log: log, files: map[string]*file{}}
}

// Read lists the pods of all files, ordered by the files' names. A file that is damaged gives what it gave before: pods
// are not ended by a slip of an editor. A directory that does not exist has no pods; one that cannot be read is an error.
func (d *Dir) Read() ([]*corev1.Pod, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("static pods: %w", err)
	}
	files := map[string]*file{}
	taken := map[types.NamespacedName]string{}
	var pods []*corev1.Pod
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		f := d.read(e.Name())
		if f == nil {
			continue
		}
		files[e.Name()] = f
		if f.pod == nil {
			continue
		}
		name := types.NamespacedName{Namespace: f.pod.Namespace, Name: f.pod.Name}
		if other, ok := taken[name]; ok {
			if f.twin != other {
				f.twin = other
				d.log.Error("static pod: another file has a pod of that name", "file", filepath.Join(d.path, e.Name()), "pod", name, "other", other)
			}
			continue
		}
		f.twin = ""
		taken[name] = e.Name()
		pods = append(pods, f.pod)
	}
	d.files = files
	return pods, nil
}

// read reads one file; nil if it is none, or gone by now.
func (d *Dir) read(name string) *file {
	path := filepath.Join(d.path, name)
	was := d.files[name]
	f := &file{}
	if was != nil {
		*f = *was
	}
	// Looked at before it is opened: opening a pipe waits for its other end.
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && !info.Mode().IsRegular() {
		return nil
	}
	var data []byte
	if err == nil {
		data, err = readFile(path)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var pod *corev1.Pod
	if err == nil {
		pod, err = decode(data, path, d.node)
	}
	if err != nil {
		d.complain(f, name, err.Error())
		return f
	}
	if f.pod == nil || f.pod.UID != pod.UID {
		f.pod = pod
	}
	f.problem = ""
	return f
}

// complain says once what is wrong with a file.
func (d *Dir) complain(f *file, name, problem string) {
	if f.problem != problem {
		f.problem = problem
		d.log.Error("static pod: the file is not used as it is", "file", filepath.Join(d.path, name), "error", problem)
	}
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it has more than %d bytes", maxFile)
	}
	return data, err
}

// Watch calls changed with the pods whenever something in the directory has changed, until ctx ends.
func (d *Dir) Watch(ctx context.Context, changed func([]*corev1.Pod)) {
	for {
		if err := d.watch(ctx, changed); err != nil && ctx.Err() == nil {
			d.log.Error("static pods: watch the directory; its pods stay as they are", "dir", d.path, "retry", rewatch, "error", err)
		}
		t := time.NewTimer(rewatch)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

func (d *Dir) watch(ctx context.Context, changed func([]*corev1.Pod)) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	if err := w.Add(d.path); err != nil {
		return err
	}
	// What came between the first look and the watch.
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	for {
		select {
		case e, ok := <-w.Events:
			if !ok {
				return errors.New("the watch has ended")
			}
			if e.Name == d.path && e.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("%s was taken away", d.path)
			}
			quiet.Reset(settle)
		case err, ok := <-w.Errors:
			if !ok {
				return errors.New("the watch has ended")
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return err
			}
			quiet.Reset(settle)
		case <-quiet.C:
			pods, err := d.Read()
			if err != nil {
				return err
			}
			changed(pods)
		case <-ctx.Done():
			return nil
		}
	}
}
