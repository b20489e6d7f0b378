// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"skep.io/skep/controlplane/pki"
)

// dataFormat is how this version lays out its data directory. It is raised by a change that an earlier version would not
// understand, or would undo.
const dataFormat = 1

// format is what DATA-DIR/format.json says. A directory without it is of format 1.
type format struct {
	Format  int    `json:"format"`
	Version string `json:"version"` // of the skep that wrote it
}

func formatFile(dataDir string) string { return filepath.Join(dataDir, "format.json") }

// checkFormat refuses a directory that a later version has written in another way. It changes nothing.
func checkFormat(dataDir string) error {
	file := formatFile(dataDir)
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var have format
	if err := json.Unmarshal(raw, &have); err != nil || have.Format < 1 {
		return fmt.Errorf("%s does not say which format %s has: remove it if this version of skep, or an earlier one, was the last to run here", file, dataDir)
	}
	if have.Format > dataFormat {
		return fmt.Errorf("%s was written by skep %s in format %d, and this is skep %s, which knows formats up to %d: start that version or a later one, "+
			"or `skep reset` and restore a snapshot of before (docs/recovery.md). Nothing was changed", dataDir, have.Version, have.Format, skepVersion, dataFormat)
	}
	return nil
}

// writeFormat says who uses a directory from now on.
func writeFormat(dataDir string) error {
	raw, err := json.Marshal(format{dataFormat, skepVersion})
	if err != nil {
		return err
	}
	if have, err := os.ReadFile(formatFile(dataDir)); err == nil && bytes.Equal(have, raw) {
		return nil
	}
	if err := pki.WriteFile(formatFile(dataDir), raw); err != nil {
		return fmt.Errorf("say who uses %s: %w", dataDir, err)
	}
	return nil
}
