// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

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
