// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// A directory of a later format is refused and left as it is; one of this format, of before there were formats, or a new
// one is taken.
func TestFormat(t *testing.T) {
	later := fmt.Sprintf(`{"format":%d,"version":"v99"}`, dataFormat+1)
	for content, says := range map[string]string{
		"":                              "",
		`{"format":1,"version":"v0"}`:   "",
		later:                           "written by skep v99",
		"{":                             "does not say which format",
		`{"format":0}`:                  "does not say which format",
		`{"format":-1,"version":"v99"}`: "does not say which format",
	} {
		dir := t.TempDir()
		if content != "" {
			if err := os.WriteFile(formatFile(dir), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := checkFormat(dir)
		if left, readErr := os.ReadFile(formatFile(dir)); content != "" && (readErr != nil || string(left) != content) {
			t.Errorf("%s was changed to %s, %v", content, left, readErr)
		}
		if says != "" {
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", content, err)
			}
			continue
		}
		if err := errors.Join(err, writeFormat(dir), checkFormat(dir)); err != nil {
			t.Errorf("%s: %v", content, err)
		}
	}
}
