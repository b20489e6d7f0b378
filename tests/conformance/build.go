// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// build compiles the suite and what its images hold. Go's cache makes the second time short.
func build(ctx context.Context, dir, images string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}")
	if err != nil {
		return err
	}
	// The parent's, so that the suite is of the version that skep serves.
	version, err := output(ctx, root, "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	module := filepath.Join(root, "tests", "conformance", "suite")
	source, err := output(ctx, module, "go", "list", "-m", "-f", "{{.Version}} {{.Dir}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	suiteVersion, kubernetes, _ := strings.Cut(source, " ")
	if suiteVersion != version {
		return fmt.Errorf("skep serves Kubernetes %s and tests/conformance/suite/go.mod has %s: make them the same", version, suiteVersion)
	}
	stamp := "-s -w -X k8s.io/component-base/version.gitVersion=" + version
	for _, c := range []struct {
		dir  string
		argv []string
	}{
		{module, []string{"go", "test", "-c", "-vet=off", "-ldflags", stamp, "-o", dir + "/e2e.test", "k8s.io/kubernetes/test/e2e"}},
		{module, []string{
			"go", "build", "-ldflags", stamp, "-o", dir + "/",
			"github.com/onsi/ginkgo/v2/ginkgo", "k8s.io/kubernetes/cmd/kubectl", "k8s.io/kubernetes/test/images/agnhost",
		}},
		{root, []string{"go", "build", "-ldflags", "-s -w", "-o", dir + "/", "./examples/image", "./tests/conformance/pause"}},
	} {
		if err := do(ctx, c.dir, c.argv...); err != nil {
			return err
		}
	}
	return makeImages(ctx, root, dir, kubernetes, images)
}

func command(ctx context.Context, dir string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	return cmd
}

func do(ctx context.Context, dir string, argv ...string) error {
	if out, err := command(ctx, dir, argv...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}

func output(ctx context.Context, dir string, argv ...string) (string, error) {
	out, err := command(ctx, dir, argv...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
