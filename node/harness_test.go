// SPDX-License-Identifier: Apache-2.0

package node

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/isolate"
	"skep.io/skep/node/volumes"
)

const (
	testImage = "skep.test/prog:v1"
	testNode  = "bee"
	nodeIP    = "192.0.2.7"
	shim      = "containerd-shim-runc-v2"
)

// binDir holds the shim and the test program, built once for the whole run.
var binDir = os.Getenv("SKEP_TEST_BIN")

func TestMain(m *testing.M) {
	klog.SetLogger(logr.Discard())
	if text := os.Getenv(agentProcessEnv); text != "" {
		if err := runAgentProcess(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if binDir != "" {
		os.Exit(isolate.Run(m))
	}
	dir, err := os.MkdirTemp("", "sknode-bin")
	if err != nil {
		panic(err)
	}
	for out, pkg := range map[string]string{shim: "skep.io/skep/cmd/containerd-shim-runc-v2", "prog": "./testdata/prog"} {
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

// testLog writes warnings, or with SKEP_TEST_DEBUG everything.
func testLog() *slog.Logger {
	level := slog.LevelWarn
	if os.Getenv("SKEP_TEST_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// cluster is an API server and the place for one node's agents, one after another.
type cluster struct {
	t       testing.TB
	dir     string
	admin   kubernetes.Interface
	asNode  kubernetes.Interface
	ca      *pki.Authority
	address string // of the API server

	agent *Agent
	stop  func()
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	// Unix socket paths are short: not t.TempDir.
	dir, err := os.MkdirTemp("", "skn")
	if err != nil {
		t.Fatal(err)
	}
	// The node's address, on loopback as this network namespace has nothing else: pods answer to it.
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrReplace(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(nodeIP), Mask: net.CIDRMask(32, 32)}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	log := testLog()
	ctx, cancel := context.WithCancel(context.Background())
	st, err := store.Open(ctx, store.Config{DataDir: filepath.Join(dir, "server"), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.Open(filepath.Join(dir, "pki"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := apiserver.New(ctx, apiserver.Config{
		Store: st, PKI: ca, Listener: l, AdvertiseAddress: net.IPv4(192, 0, 2, 1), Log: log,
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatal("api server:", err)
	}
	c := &cluster{t: t, dir: dir, ca: ca, address: "https://" + l.Addr().String(), admin: kubernetes.NewForConfigOrDie(s.ClientConfig("admin", "system:masters"))}
	cfg := s.ClientConfig("system:node:"+testNode, "system:nodes", "system:authenticated")
	cfg.QPS = -1
	c.asNode = kubernetes.NewForConfigOrDie(cfg)
	c.furnish()
	if err := os.Mkdir(filepath.Join(dir, "images"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeImage(t, filepath.Join(dir, "images", "prog.tar"))
	t.Cleanup(c.checkClean)
	return c
}

// furnish makes what controllers would make.
func (c *cluster) furnish() {
	c.t.Helper()
	ctx := context.Background()
	if _, err := c.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		c.t.Fatal(err)
	}
	if _, err := c.admin.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt"}, Data: map[string]string{"ca.crt": "none"}}
	if _, err := c.admin.CoreV1().ConfigMaps("default").Create(ctx, cm, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	c.until("kube-node-lease exists", func() bool {
		_, err := c.admin.CoreV1().Namespaces().Get(ctx, corev1.NamespaceNodeLease, metav1.GetOptions{})
		return err == nil
	})
}

// start runs an agent and waits until the node is Ready.
func (c *cluster) start() {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	a, err := New(ctx, Config{
		NodeName: testNode, NodeIPs: []netip.Addr{netip.MustParseAddr(nodeIP)}, Client: c.asNode,
		DataDir: filepath.Join(c.dir, "data"), RunDir: filepath.Join(c.dir, "run"), LogsDir: filepath.Join(c.dir, "logs"),
		ImagesDir: filepath.Join(c.dir, "images"), StaticPodDir: filepath.Join(c.dir, "manifests"), ClusterDNS: []netip.Addr{netip.MustParseAddr("10.43.0.10")},
		RuntimeConfig: runtime.Config{ShimPath: filepath.Join(binDir, shim)},
		Log:           testLog(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	c.agent = a
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			c.t.Error("agent:", err)
		}
	}
	c.t.Cleanup(c.stop)
	c.until("the node exists", func() bool {
		n, err := c.admin.CoreV1().Nodes().Get(ctx, testNode, metav1.GetOptions{})
		if err != nil {
			return false
		}
		if len(n.Spec.PodCIDRs) == 0 {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.42.7.0/24", []string{"10.42.7.0/24", "fd73:6b65:7042:7::/64"}
			_, err = c.admin.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{})
		}
		return err == nil
	})
	select {
	case <-a.Ready():
	case err := <-done:
		done <- err
		c.t.Fatal("agent ended:", err)
	case <-time.After(30 * time.Second):
		c.t.Fatal("the node is not ready after 30 s")
	}
}

// until waits for a condition, with a limit that no healthy machine reaches.
func (c *cluster) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	c.t.Fatalf("timed out waiting until %s", what)
}

func (c *cluster) create(p *corev1.Pod) *corev1.Pod {
	c.t.Helper()
	p, err := c.admin.CoreV1().Pods("default").Create(context.Background(), p, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

func (c *cluster) get(name string) *corev1.Pod {
	c.t.Helper()
	p, err := c.admin.CoreV1().Pods("default").Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// untilPod waits until a pod is as ok says, and returns it.
func (c *cluster) untilPod(name, what string, ok func(*corev1.Pod) bool) *corev1.Pod {
	c.t.Helper()
	var last *corev1.Pod
	defer func() {
		if c.t.Failed() && last != nil {
			c.t.Logf("pod %s: %+v", name, last.Status)
			c.t.Logf("events: %v", c.events(name))
		}
	}()
	c.until("pod "+name+" "+what, func() bool {
		last = c.get(name)
		return ok(last)
	})
	return last
}

func (c *cluster) delete(name string) {
	c.t.Helper()
	ctx := context.Background()
	if err := c.admin.CoreV1().Pods("default").Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		c.t.Fatal(err)
	}
	c.until("pod "+name+" is gone", func() bool {
		_, err := c.admin.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
}

// events of a pod, as "Reason message".
func (c *cluster) events(name string) []string {
	list, err := c.admin.CoreV1().Events("default").List(context.Background(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		c.t.Error(err)
		return nil
	}
	var out []string
	for _, e := range list.Items {
		out = append(out, e.Reason+" "+e.Message)
	}
	return out
}

// checkClean stops the agent, removes what it keeps on purpose and checks that nothing else is left.
func (c *cluster) checkClean() {
	t, ctx := c.t, context.Background()
	if c.stop != nil {
		c.stop()
	}
	for _, err := range []error{
		volumes.Cleanup(ctx, filepath.Join(c.dir, "data", "pods")),
		runtime.Cleanup(ctx, filepath.Join(c.dir, "data"), filepath.Join(c.dir, "run")),
		sandbox.Cleanup(ctx, filepath.Join(c.dir, "run"), ""),
	} {
		if err != nil {
			t.Error("cleanup:", err)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(c.dir))
	if err != nil {
		t.Error(err)
	}
	for _, m := range mounts {
		t.Error("mount left over:", m.Mountpoint)
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Error(err)
	}
	for _, l := range links {
		if l.Type() == "veth" {
			t.Error("link left over:", l.Attrs().Name)
		}
	}
}

// writeImage archives an image with the test program.
func writeImage(t testing.TB, path string) {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(binDir, "prog"))
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "prog", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(program); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"proc", "dev", "sys", "tmp", "etc"} {
		if err := w.WriteHeader(&tar.Header{Name: d, Mode: 0o755, Typeflag: tar.TypeDir}); err != nil {
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
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	config.Config.Entrypoint = []string{"/prog"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(testImage)
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
}
