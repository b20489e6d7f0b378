// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/sandbox/isolate"
)

const testImage = "docker.io/skep/prog:latest"

// binDir holds the shim and the test program, built once for the whole run.
var binDir = os.Getenv("SKEP_TEST_BIN")

func TestMain(m *testing.M) {
	if os.Getenv(agentEnv) != "" {
		os.Exit(agent())
	}
	if binDir != "" {
		os.Exit(isolate.Run(m))
	}
	dir, err := os.MkdirTemp("", "skrt-bin")
	if err != nil {
		panic(err)
	}
	for out, pkg := range map[string]string{shimName: "skep.io/skep/cmd/containerd-shim-runc-v2", "prog": "./testdata/prog"} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, out), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build", pkg, err)
			os.Exit(2)
		}
	}
	os.Setenv("SKEP_TEST_BIN", dir)
	code := isolate.Run(m)
	os.RemoveAll(dir)
	os.Exit(code)
}

// progImage is a one-layer image with the test program and a user database.
func progImage(t testing.TB) v1.Image {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(binDir, "prog"))
	if err != nil {
		t.Fatal(err)
	}
	img := imageOf(t, executable("prog", string(program)),
		file("etc/passwd", "root:x:0:0:root:/root:/prog\nbee:x:1000:1001:Bee:/home/bee:/prog\n"),
		file("etc/group", "root:x:0:\nbee:x:1001:\nhive:x:1500:bee\n"),
		directory("proc"), directory("dev"), directory("sys"), directory("tmp"), directory("home/bee"))
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	config.Config.Entrypoint, config.Config.Cmd = []string{"/prog"}, []string{"wait"}
	config.Config.Env = []string{"PATH=/", "FROM_IMAGE=yes", "OVERRIDDEN=image"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// entry is one of a layer's archive.
type entry struct {
	tar.Header
	data string
}

func file(name, data string) entry {
	return entry{tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(data))}, data}
}

func executable(name, data string) entry {
	e := file(name, data)
	e.Mode = 0o755
	return e
}

func directory(name string) entry {
	return entry{Header: tar.Header{Name: name, Mode: 0o1777, Typeflag: tar.TypeDir}}
}

func link(name, to string) entry {
	return entry{Header: tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}}
}

func hardLink(name, to string) entry {
	return entry{Header: tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeLink}}
}

// imageOf is an image of one layer.
func imageOf(t testing.TB, entries ...entry) v1.Image {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// node is one runtime with sandboxes, in directories of its own.
type node struct {
	*Runtime
	t         testing.TB
	dir       string
	sandboxes *sandbox.Sandboxes
	image     Image
	disk      string // where a file system of its own is mounted, if one is
}

func testConfig(dir string) Config {
	return Config{
		DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), ShimPath: filepath.Join(binDir, shimName),
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

func testSandboxes(dir string) (*sandbox.Sandboxes, error) {
	return sandbox.New(sandbox.Config{
		RunDir: filepath.Join(dir, "run"), Log: slog.New(slog.DiscardHandler),
		PodCIDRs: func() []netip.Prefix {
			return []netip.Prefix{netip.MustParsePrefix("10.42.9.0/24"), netip.MustParsePrefix("fd73:6b65:7042:9::/64")}
		},
	})
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := emptyNode(t)
	n.open()
	imported, err := n.Images().ImportDir(context.Background(), filepath.Join(n.dir, "images"))
	if err != nil || len(imported) != 1 {
		t.Fatalf("import: %v, %v", imported, err)
	}
	n.image = imported[0]
	return n
}

// emptyNode is a directory with an image archive in it.
func emptyNode(t testing.TB) *node {
	t.Helper()
	// Unix socket paths are short: not t.TempDir.
	dir, err := os.MkdirTemp("", "skrt")
	if err != nil {
		t.Fatal(err)
	}
	// As /run is: whoever is root in a pod only has to pass.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir}
	t.Cleanup(func() { n.close() })
	images := filepath.Join(dir, "images")
	if err := os.Mkdir(images, 0o755); err != nil {
		t.Fatal(err)
	}
	writeArchive(t, filepath.Join(images, "prog.tar"), progImage(t), testImage)
	return n
}

func (n *node) open() {
	n.t.Helper()
	var err error
	if n.Runtime, err = New(context.Background(), testConfig(n.dir)); err != nil {
		n.t.Fatal(err)
	}
	if n.sandboxes, err = testSandboxes(n.dir); err != nil {
		n.t.Fatal(err)
	}
}

func writeArchive(t testing.TB, path string, img v1.Image, ref string) {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
}

// close removes all pods and checks that nothing is left of them.
func (n *node) close() {
	t, ctx := n.t, context.Background()
	if n.Runtime != nil {
		all, _ := n.List(ctx)
		for _, c := range all {
			if err := n.Remove(ctx, c.ID); err != nil {
				t.Error(err)
			}
		}
	}
	if n.sandboxes != nil {
		boxes, err := n.sandboxes.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, b := range boxes {
			if err := n.sandboxes.Remove(ctx, b.PodUID); err != nil {
				t.Error(err)
			}
		}
	}
	if n.Runtime != nil {
		if err := n.Runtime.Close(); err != nil {
			t.Error(err)
		}
	}
	n.checkClean()
	if err := Cleanup(ctx, filepath.Join(n.dir, "data"), filepath.Join(n.dir, "run")); err != nil {
		t.Error(err)
	}
	if err := sandbox.Cleanup(ctx, filepath.Join(n.dir, "run"), n.cgroupRoot()); err != nil {
		t.Error(err)
	}
	if n.disk != "" {
		if err := unix.Unmount(n.disk, 0); err != nil {
			t.Errorf("unmount %s: %v", n.disk, err)
		}
	}
	os.RemoveAll(n.dir)
}

// smallDisk gives the node so little room for its data.
func (n *node) smallDisk(mib int) {
	n.t.Helper()
	disk := filepath.Join(n.dir, "data")
	if err := os.Mkdir(disk, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		n.t.Fatal(err)
	}
	n.disk = disk
}

func (n *node) cgroupRoot() string { return "skep-test-" + filepath.Base(n.dir) }

// checkClean looks for shims, mounts, sockets and cgroups.
func (n *node) checkClean() {
	t := n.t
	eventually(t, "shims have ended", func() error {
		if left := processes(n.dir); len(left) > 0 {
			return fmt.Errorf("still there: %v", left)
		}
		return nil
	})
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.dir))
	mounts = slices.DeleteFunc(mounts, func(m *mountinfo.Info) bool { return m.Mountpoint == n.disk })
	if err != nil || len(mounts) != 0 {
		t.Errorf("mounts left: %v, %v", mounts, err)
	}
	for _, dir := range []string{"attach", "exec", "containerd/s", "ns", "sandboxes", "containerd/runc/skep", "containerd/io.containerd.runtime.v2.task/skep"} {
		if left, _ := os.ReadDir(filepath.Join(n.dir, "run", dir)); len(left) != 0 {
			t.Errorf("%s left: %v", dir, left)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(n.dir, "data", "containers")); len(left) != 0 {
		t.Errorf("status files left: %v", left)
	}
	all, err := cgroup.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		left, _ := filepath.Glob(filepath.Join(h.Path(n.cgroupRoot()), "*", "cgroup.procs"))
		if len(left) != 0 {
			t.Errorf("cgroups left: %v", left)
		}
	}
}

// processes lists those whose command line mentions dir.
func processes(dir string) []string {
	var found []string
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, l := range lines {
		data, err := os.ReadFile(l)
		text := strings.ReplaceAll(string(data), "\x00", " ")
		if err == nil && strings.Contains(text, dir) && l != fmt.Sprintf("/proc/%d/cmdline", os.Getpid()) && strings.Contains(text, shimName) {
			found = append(found, l+" "+text)
		}
	}
	return found
}

func (n *node) sandboxSpec(pod string) sandbox.Spec {
	return sandbox.Spec{PodUID: types.UID(pod), Namespace: "default", Name: pod, Hostname: pod, CgroupParent: n.cgroupRoot() + "/pod" + pod}
}

func (n *node) containerSpec(pod string, box *sandbox.Sandbox, args ...string) ContainerSpec {
	return ContainerSpec{
		PodUID: types.UID(pod), PodNamespace: "default", PodName: pod, Name: "main", ImageID: n.image.ID, Image: "skep/prog",
		Args: args, Sandbox: box, CgroupParent: n.cgroupRoot() + "/pod" + pod,
		LogPath: filepath.Join(n.dir, "logs", pod, "main", "0.log"), Annotations: map[string]string{"hash": "1234"},
	}
}

// spec is a container of the test program in a pod of its own name.
func (n *node) spec(pod string, args ...string) ContainerSpec {
	n.t.Helper()
	box, err := n.sandboxes.Create(context.Background(), n.sandboxSpec(pod))
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.sandboxes.Attached(context.Background(), box.PodUID); err != nil {
		n.t.Fatal(err)
	}
	return n.containerSpec(pod, box, args...)
}

func (n *node) run(spec ContainerSpec) string {
	n.t.Helper()
	id, err := n.Create(context.Background(), spec)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.Start(context.Background(), id); err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) container(id string) Container {
	n.t.Helper()
	all, err := n.List(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, c := range all {
		if c.ID == id {
			return c
		}
	}
	n.t.Fatalf("container %s is not listed", id)
	return Container{}
}

// exited waits for the end of a container.
func (n *node) exited(id string) Container {
	n.t.Helper()
	var c Container
	eventually(n.t, "container exits", func() error {
		if c = n.container(id); c.State != Exited {
			return fmt.Errorf("state %s", c.State)
		}
		return nil
	})
	return c
}

// log returns the texts of a container's log, by stream when given.
func readLog(t testing.TB, path, stream string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	var text strings.Builder
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(fields) != 4 {
			t.Fatalf("log line %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, fields[0]); err != nil {
			t.Fatal(err)
		}
		if stream != "" && fields[1] != stream {
			continue
		}
		text.WriteString(fields[3])
		if fields[2] == "F" {
			text.WriteByte('\n')
		}
	}
	return text.String()
}

func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func (n *node) logs(spec ContainerSpec, want string) {
	n.t.Helper()
	eventually(n.t, "log has "+want, func() error {
		if got := readLog(n.t, spec.LogPath, ""); !strings.Contains(got, want) {
			return fmt.Errorf("log is %q", got)
		}
		return nil
	})
}
