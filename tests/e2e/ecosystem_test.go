// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestEcosystem runs testdata/ecosystem: programs of others, from their Go modules, against a node. They are built from
// tests/ecosystem, a module of its own.
func TestEcosystem(t *testing.T) {
	b := built(t)
	source, err := filepath.Abs(filepath.Join("..", "ecosystem"))
	if err != nil {
		t.Fatal(err)
	}
	bin, err := filepath.Abs(filepath.Join("..", "..", ".build", "e2e", "ecosystem"))
	if err != nil {
		t.Fatal(err)
	}
	ecosystem(t, source, bin)
	ownScripts(t, b, "testdata/ecosystem", map[string]string{
		"ECOSYSTEM": bin, "CHART": filepath.Join(source, "chart"), "OPERATOR": filepath.Join(source, "operator"),
	})
}

// ecosystem builds the programs. Where their modules cannot be fetched the test is skipped, but not in CI.
func ecosystem(t *testing.T, source, bin string) {
	t.Helper()
	inModule := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(context.Background(), "go", args...)
		cmd.Dir = source
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
		return cmd.CombinedOutput()
	}
	if out, err := inModule("mod", "download"); err != nil {
		message := "the modules of tests/ecosystem cannot be fetched: " + string(out)
		if os.Getenv("CI") == "true" {
			t.Fatal(message)
		}
		t.Skip(message)
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := inModule("build", "-o", bin+"/", "./operator", "helm.sh/helm/v3/cmd/helm"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
