// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/runtime/crilog"
)

// authority issues certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key = issue(t, nil, "ca", nil)
	return a
}

func issue(t *testing.T, by *authority, cn string, orgs []string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn, Organization: orgs},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	} else {
		template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) pair(t *testing.T, cn string, orgs ...string) (certPEM, keyPEM []byte) {
	t.Helper()
	cert, key := issue(t, a, cn, orgs)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// fakeNode is pods, containers and sessions in memory.
type fakeNode struct {
	mu         sync.Mutex
	pod        *corev1.Pod
	containers []runtime.Container
	sizes      []runtime.Size
}

func (f *fakeNode) Pod(namespace, name string) (*corev1.Pod, bool) {
	if f.pod.Namespace == namespace && f.pod.Name == name {
		return f.pod, true
	}
	return nil, false
}

func (f *fakeNode) Pods() []*corev1.Pod { return []*corev1.Pod{f.pod} }

func (f *fakeNode) ListPod(_ context.Context, uid types.UID) ([]runtime.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if uid != f.pod.UID {
		return nil, nil
	}
	return append([]runtime.Container(nil), f.containers...), nil
}

func (f *fakeNode) Exec(_ context.Context, id string, command []string, s runtime.Streams) (int, error) {
	if command[0] == "fail" {
		return 0, errors.New("executable file not found in $PATH")
	}
	fmt.Fprintf(s.Out, "%s runs %s\n", id, strings.Join(command, " "))
	if s.Resize != nil {
		size := <-s.Resize
		f.mu.Lock()
		f.sizes = append(f.sizes, size)
		f.mu.Unlock()
	}
	if s.In != nil {
		if _, err := io.Copy(s.Out, s.In); err != nil {
			return 0, err
		}
	}
	if s.Err != nil {
		fmt.Fprintln(s.Err, "to stderr")
	}
	return len(command) - 1, nil
}

func (f *fakeNode) Attach(_ context.Context, id string, s runtime.Streams) error {
	_, err := fmt.Fprintln(s.Out, "attached to", id)
	return err
}

func (f *fakeNode) PortForward(_ context.Context, uid types.UID, port uint16, stream io.ReadWriteCloser) error {
	defer stream.Close()
	if port == 81 {
		return errors.New("connection refused")
	}
	line, err := bufio.NewReader(stream).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stream, "%s port %d: %s", uid, port, line)
	return err
}

type testServer struct {
	server *Server
	t      *testing.T
	node   *fakeNode
	ca     *authority
	url    string
	log    string
}

func newServer(t *testing.T, change func(*Config)) *testServer {
	t.Helper()
	s := &testServer{t: t, ca: newAuthority(t), log: filepath.Join(t.TempDir(), "0.log")}
	s.node = &fakeNode{
		pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-1"},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main"}, {Name: "slow"}}},
			Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
				{Name: "slow", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}},
			}},
		},
		containers: []runtime.Container{{ID: "id-1", Name: "main", PodUID: "uid-1", PodName: "web", State: runtime.Running, LogPath: s.log}},
	}
	cert, key := s.ca.pair(t, "system:node:n1")
	serving, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(s.ca.cert)
	cfg := Config{NodeName: "n1", Sessions: s.node, Containers: s.node, Pods: s.node, ServingCert: serving, ClientCA: func() *x509.CertPool { return pool }, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	server, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	s.server = server
	s.url = "https://" + l.Addr().String()
	return s
}

func (s *testServer) client(cn string, orgs ...string) *rest.Config {
	c := &rest.Config{Host: s.url, TLSClientConfig: rest.TLSClientConfig{
		CAData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.cert.Raw}),
	}}
	if cn != "" {
		c.CertData, c.KeyData = s.ca.pair(s.t, cn, orgs...)
	}
	return c
}

func (s *testServer) get(c *rest.Config, path string) (int, string) {
	s.t.Helper()
	transport, err := rest.TransportFor(c)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Get(s.url + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(body))
}

func TestWhoMay(t *testing.T) {
	s := newServer(t, func(c *Config) {
		c.Authorize = func(_ context.Context, user string, _ []string, verb, sub string) (bool, error) {
			return user == "scraper" && verb == "get" && sub == "stats", nil
		}
		c.Authenticate = func(_ context.Context, token string) (string, []string, error) {
			if token == "good" {
				return "scraper", nil, nil
			}
			return "", nil, errors.New("bad token")
		}
	})
	token := func(tok string) *rest.Config { c := s.client(""); c.BearerToken = tok; return c }
	for _, c := range []struct {
		who  string
		cfg  *rest.Config
		path string
		want int
	}{
		{"stranger", s.client(""), "/pods", 401},
		{"stranger", s.client(""), "/healthz", 200},
		{"API server", s.client("kube-apiserver-kubelet-client"), "/pods", 200},
		{"master", s.client("admin", "system:masters"), "/stats/summary", 200},
		{"node", s.client("system:node:n2", "system:nodes"), "/pods", 403},
		{"scraper", s.client("scraper"), "/stats/summary", 200},
		{"scraper", s.client("scraper"), "/pods", 403},
		{"token", token("good"), "/stats/summary", 200},
		{"bad token", token("bad"), "/stats/summary", 401},
		{"master", s.client("admin", "system:masters"), "/nothing", 404},
		{"master", s.client("admin", "system:masters"), "/metrics/resource", 200},
	} {
		if got, body := s.get(c.cfg, c.path); got != c.want {
			t.Errorf("%s %s: %d %s, want %d", c.who, c.path, got, body, c.want)
		}
	}
	// A certificate of another authority does not even get through the handshake.
	other := newAuthority(t)
	cfg := s.client("")
	cfg.CertData, cfg.KeyData = other.pair(t, "admin", "system:masters")
	transport, err := rest.TransportFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := (&http.Client{Transport: transport}).Get(s.url + "/pods"); err == nil {
		resp.Body.Close()
		t.Errorf("foreign certificate: status %d", resp.StatusCode)
	}
}

func TestExecAttach(t *testing.T) {
	s := newServer(t, nil)
	cfg := s.client("kube-apiserver-kubelet-client")
	run := func(path string, o remotecommand.StreamOptions) error {
		u, err := url.Parse(s.url + path)
		if err != nil {
			t.Fatal(err)
		}
		e, err := remotecommand.NewSPDYExecutor(cfg, http.MethodPost, u)
		if err != nil {
			t.Fatal(err)
		}
		return e.StreamWithContext(context.Background(), o)
	}
	var out, errs bytes.Buffer
	err := run("/exec/ns/web/main?command=sh&input=1&output=1&error=1", remotecommand.StreamOptions{Stdin: strings.NewReader("typed"), Stdout: &out, Stderr: &errs})
	if err != nil || out.String() != "id-1 runs sh\ntyped" || errs.String() != "to stderr\n" {
		t.Errorf("exec: %v, %q %q", err, out.String(), errs.String())
	}
	out.Reset()
	err = run("/exec/ns/web/main?command=a&command=b&command=c&output=1", remotecommand.StreamOptions{Stdout: &out})
	var code utilexec.CodeExitError
	if !errors.As(err, &code) || code.Code != 2 {
		t.Errorf("exit code: %v", err)
	}
	err = run("/exec/ns/web/main?command=fail&output=1", remotecommand.StreamOptions{Stdout: &out})
	if err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("failing: %v", err)
	}
	out.Reset()
	sizes := make(sizeQueue, 1)
	sizes <- remotecommand.TerminalSize{Width: 80, Height: 25}
	close(sizes)
	err = run("/exec/ns/web/main?command=top&output=1&tty=1", remotecommand.StreamOptions{Stdout: &out, Tty: true, TerminalSizeQueue: sizes})
	if err != nil || len(s.node.sizes) != 1 || s.node.sizes[0] != (runtime.Size{Width: 80, Height: 25}) {
		t.Errorf("terminal: %v, %v", err, s.node.sizes)
	}
	out.Reset()
	if err = run("/attach/ns/web/main?output=1", remotecommand.StreamOptions{Stdout: &out}); err != nil || out.String() != "attached to id-1\n" {
		t.Errorf("attach: %v, %q", err, out.String())
	}
	for path, want := range map[string]string{
		"/exec/ns/nobody/main?command=a&output=1": "does not exist",
		"/exec/ns/web/other?command=a&output=1":   `container "other" not found in pod "web"`,
		"/exec/ns/web/slow?command=a&output=1":    "container not found",
		"/exec/ns/web/main?output=1":              "at least 1 command",
	} {
		if err := run(path, remotecommand.StreamOptions{Stdout: &out}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
}

type sizeQueue chan remotecommand.TerminalSize

func (q sizeQueue) Next() *remotecommand.TerminalSize {
	size, ok := <-q
	if !ok {
		return nil
	}
	return &size
}

func TestPortForward(t *testing.T) {
	s := newServer(t, nil)
	transport, upgrader, err := spdy.RoundTripperFor(s.client("kube-apiserver-kubelet-client"))
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(s.url + "/portForward/ns/web")
	if err != nil {
		t.Fatal(err)
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	f, err := portforward.NewOnAddresses(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u),
		[]string{"127.0.0.1"}, []string{"0:80"}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	<-ready
	ports, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "hello %d\n", i)
		got, err := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if err != nil || got != fmt.Sprintf("uid-1 port 80: hello %d\n", i) {
			t.Errorf("got %q, %v", got, err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestLogs(t *testing.T) {
	s := newServer(t, nil)
	w, err := crilog.Open(s.log, crilog.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	out, errs := w.Stream("stdout"), w.Stream("stderr")
	for i := range 5 {
		fmt.Fprintf(out, "out %d\n", i)
	}
	fmt.Fprintln(errs, "problem")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := s.client("kube-apiserver-kubelet-client")
	for _, c := range []struct {
		path string
		code int
		want string
	}{
		{"/containerLogs/ns/web/main", 200, "out 0\nout 1\nout 2\nout 3\nout 4\nproblem"},
		{"/containerLogs/ns/web/main?tailLines=2", 200, "out 4\nproblem"},
		{"/containerLogs/ns/web/main?limitBytes=5", 200, "out 0"},
		{"/containerLogs/ns/web/main?stream=Stderr", 200, "problem"},
		{"/containerLogs/ns/web/main?sinceTime=2100-01-01T00:00:00Z", 200, ""},
		{"/containerLogs/ns/web/main?tailLines=-1", 422, `invalid tailLines "-1"`},
		{"/containerLogs/ns/web/main?previous=true", 400, `previous terminated container "main" in pod "web" not found`},
		{"/containerLogs/ns/web/slow", 400, `container "slow" in pod "web" is waiting to start: trying and failing to pull image`},
		{"/containerLogs/ns/web/none", 404, `container "none" not found in pod "web"`},
		{"/containerLogs/ns/none/main", 404, `pod "none" does not exist`},
	} {
		if code, body := s.get(cfg, c.path); code != c.code || body != c.want {
			t.Errorf("%s: %d %q", c.path, code, body)
		}
	}
}

// TestFollow follows a log across rotations to the container's end.
func TestFollow(t *testing.T) {
	s := newServer(t, nil)
	w, err := crilog.Open(s.log, crilog.Limits{Size: 2000, Files: 3})
	if err != nil {
		t.Fatal(err)
	}
	out := w.Stream("stdout")
	fmt.Fprintln(out, "line 0")
	transport, err := rest.TransportFor(s.client("kube-apiserver-kubelet-client"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Get(s.url + "/containerLogs/ns/web/main?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for i := 1; i < 200 && lines.Scan(); i++ {
		if want := fmt.Sprintf("line %d", i-1); lines.Text() != want {
			t.Fatalf("got %q, want %q", lines.Text(), want)
		}
		// The next line only after this one was seen, as the reader may skip a file that is rotated away unread.
		fmt.Fprintf(out, "line %d\n", i)
	}
	s.node.mu.Lock()
	s.node.containers[0].State = runtime.Exited
	s.node.mu.Unlock()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !lines.Scan() || lines.Text() != "line 199" {
		t.Errorf("last line %q", lines.Text())
	}
	if lines.Scan() {
		t.Errorf("after the end: %q", lines.Text())
	}
	if n := len(crilog.Rotated(s.log)); n != 2 {
		t.Errorf("%d rotated files", n)
	}
}

func TestMain(m *testing.M) {
	// A SPDY connection that was closed waits some seconds for its peer's goodbye.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown"), goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

func FuzzLogOptions(f *testing.F) {
	f.Add("follow=true&tailLines=3&sinceSeconds=5&stream=Stdout&limitBytes=1")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		o, err := parseLogOptions(q)
		if err == nil && o.TailLines != nil && *o.TailLines < 0 {
			t.Errorf("negative tail from %q", query)
		}
	})
}
