// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

func TestLogLevels(t *testing.T) {
	var out bytes.Buffer
	log, err := newLogger(&out, "info", "text")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(klog.ClearLogger)
	for _, c := range []struct {
		name  string
		say   func()
		shown bool
	}{
		{"our information", func() { log.Info("one") }, true},
		{"our debugging", func() { log.Debug("two") }, false},
		{"upstream's information", func() { klog.Info("three") }, false},
		{"upstream's error", func() { klog.ErrorS(errors.New("broken"), "five") }, true},
		{"a watch that ends with the process", func() { klog.ErrorS(fmt.Errorf("get: %w", context.Canceled), "Failed to watch") }, false},
		{"success that upstream calls an error", func() {
			klog.Error("Found stale data, removed previous endpoints on kubernetes service, apiserver didn't exit successfully previously")
		}, false},
		{"an error that upstream mends itself", func() {
			klog.ErrorS(errors.New("the ClusterIP [IPv4]: 10.43.107.114 for Service hello/hello is not allocated; repairing"), "Unhandled Error")
		}, false},
	} {
		out.Reset()
		c.say()
		if shown := out.Len() > 0; shown != c.shown {
			t.Errorf("%s: shown %t (%q), want %t", c.name, shown, out.String(), c.shown)
		}
	}
	for _, bad := range [][2]string{{"loud", "text"}, {"info", "xml"}} {
		if _, err := newLogger(&out, bad[0], bad[1]); err == nil || !strings.Contains(err.Error(), "is not one of") {
			t.Errorf("level %q, format %q: error %v", bad[0], bad[1], err)
		}
	}
}

func TestLogFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "logs", "skep.log")
	out, err := logOutput(io.Discard, path, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.(io.Closer).Close() })
	log, err := newLogger(out, "info", "text")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(klog.ClearLogger)
	line := strings.Repeat("x", 100_000)
	for i := range 80 { // 8 MB into files of 1 MB
		log.Info(line, "i", i)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() == 0 || info.Size() > 1<<20 {
		t.Errorf("the current file: %v, error %v", info, err)
	}
	// What is too much is removed in the background.
	files := func() []os.DirEntry { all, _ := os.ReadDir(filepath.Dir(path)); return all }
	for deadline := time.Now().Add(time.Minute); len(files()) != 1+logFiles; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("files: %v, want the current one and %d more", files(), logFiles)
		}
	}

	if out, err := logOutput(io.Discard, "", 1); err != nil || out != io.Discard {
		t.Errorf("no file: %v, %v", out, err)
	}
	if _, err := logOutput(io.Discard, path, 0); err == nil || !strings.Contains(err.Error(), "--log-file-max-size") {
		t.Errorf("no size: %v", err)
	}
	if _, err := logOutput(io.Discard, filepath.Join(path, "below-a-file"), 1); err == nil || !strings.Contains(err.Error(), "--log-file:") {
		t.Errorf("a path that cannot be: %v", err)
	}
}
