// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Built is what a node needs: SKEP_BIN names a directory of binaries to use instead of building them.
type Built struct {
	Bin    string // skep and the shim
	Images string // archives of the images below
	Hello  string // a directory with the archive of HelloImage alone
}

// Images that Build makes: scripts call them busybox:1, hello:v1, hello:v2 and hello:v3, too. The
// hello images are the same program with another greeting each, for rolling updates; client:v1 only
// sleeps. Both have package tools as the program `client`: busybox's static wget crashes in glibc.
const (
	BusyboxImage = "docker.io/library/busybox:1"
	HelloImage   = "skep.io/examples/hello:latest"
)

// Build makes skep, the shim and the test images in dir, from the checkout that the calling test or
// command was built from. Who builds in the same directory at the same time waits: the tests of several
// packages share one.
func Build(ctx context.Context, dir string) (Built, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Built{}, err
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return Built{}, err
	}
	b := Built{Bin: os.Getenv("SKEP_BIN"), Images: filepath.Join(dir, "images"), Hello: filepath.Join(dir, "hello")}
	for _, sub := range []string{b.Images, b.Hello} {
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return Built{}, err
		}
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return Built{}, err
	}
	defer unlock()
	build := func(out string, packages ...string) error { return buildStamped(ctx, root, out, "", packages...) }
	if b.Bin == "" {
		b.Bin = filepath.Join(dir, "bin")
		if err := build(b.Bin+"/", "./cmd/..."); err != nil {
			return Built{}, err
		}
	} else if !filepath.IsAbs(b.Bin) {
		b.Bin = filepath.Join(root, b.Bin)
	}
	image, web, client := filepath.Join(dir, "image"), filepath.Join(dir, "web"), filepath.Join(dir, "client")
	for out, source := range map[string]string{
		image: "./examples/image", web: "./examples/hello/web", client: "./tests/tools/client",
	} {
		if err := build(out, source); err != nil {
			return Built{}, err
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return Built{}, fmt.Errorf("the test image needs a static busybox: apt-get install busybox-static: %w", err)
	}
	commands := [][]string{
		{image, "--tag", BusyboxImage, "--output", filepath.Join(b.Images, "busybox.tar"), "--busybox", busybox},
		{
			image, "--tag", "docker.io/library/client:v1", "--output", filepath.Join(b.Images, "client.tar"), "--busybox", busybox,
			"--user", "0:0", "--entrypoint", "sleep", "--cmd", "100000", client + ":/bin/client",
		},
	}
	commands = append(commands, []string{image, "--tag", HelloImage, "--output", filepath.Join(b.Hello, "hello.tar"), web})
	for _, tag := range []string{HelloImage, "docker.io/library/hello:v1", "docker.io/library/hello:v2", "docker.io/library/hello:v3"} {
		file := strings.NewReplacer("/", "-", ":", "-").Replace(tag) + ".tar"
		commands = append(commands, []string{
			image, "--tag", tag, "--output", filepath.Join(b.Images, file), "--busybox", busybox,
			"--env", "GREETING=" + strings.TrimPrefix(tag, "docker.io/library/"), web, client + ":/bin/client",
		})
	}
	for _, command := range commands {
		if err := run(ctx, root, command...); err != nil {
			return Built{}, err
		}
	}
	return b, nil
}

// lockDir waits until no other process builds in dir.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s to build in it: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// BuildVersion makes skep and the shim of the checkout once more in dir, as another version: one that says that it is
// version and, with kubernetes, that this is the version of Kubernetes that it is made of.
func BuildVersion(ctx context.Context, dir, version, kubernetes string) (bin string, err error) {
	if bin, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	stamps := " -X main.skepVersion=" + version
	if kubernetes != "" {
		stamps += " -X skep.io/skep/node.KubeletVersion=" + kubernetes
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	return bin, buildStamped(ctx, root, bin+"/", stamps, "./cmd/...")
}

func buildStamped(ctx context.Context, root, out, stamps string, packages ...string) error {
	return run(ctx, root, append([]string{"go", "build", "-ldflags", "-s -w" + stamps, "-o", out}, packages...)...)
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the module's directory: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

func run(ctx context.Context, dir string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// Need skips a test that this host cannot run: it records the fact in the file $SKEP_SKIPS. With
// CI=true it fails the test, because there a skip would hide a regression.
func Need(t testing.TB) {
	t.Helper()
	m, err := newMachine(fmt.Sprintf("probe-%d", os.Getpid()), setup{}, true)
	if err == nil {
		m.stop()
		err = removeCgroups(m.all, m.cgroup, settleLimit)
	}
	if err == nil {
		return
	}
	if path := os.Getenv("SKEP_SKIPS"); path != "" {
		f, openErr := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if openErr == nil {
			fmt.Fprintf(f, "%s: %s\n", t.Name(), strings.ReplaceAll(err.Error(), "\n", "; "))
			openErr = f.Close()
		}
		if openErr != nil {
			t.Fatal("record a skip: ", openErr)
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("cannot run here, and CI must not skip: ", err)
	}
	t.Skip("cannot run here: ", err)
}
