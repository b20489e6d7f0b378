// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/kms/pkg/service"

	"skep.io/skep/controlplane/encryption"
)

const password = "correct horse battery staple"

// raw is what the store has for a key below /registry.
func (s *testServer) raw(t *testing.T, key string) []byte {
	t.Helper()
	got, err := s.store.Client().Get(t.Context(), "/registry/"+key)
	if err != nil || len(got.Kvs) != 1 {
		t.Fatalf("%s: %v, %v", key, got, err)
	}
	return got.Kvs[0].Value
}

func (s *testServer) secret(t *testing.T, name string) {
	t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string][]byte{"password": []byte(password)}}
	if _, err := s.client.CoreV1().Secrets("default").Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (s *testServer) readable(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		got, err := s.client.CoreV1().Secrets("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || string(got.Data["password"]) != password {
			t.Errorf("Secret %s: %v", name, err)
		}
	}
}

// Secrets from before encryption are readable, new ones are not readable in the store, a rotation encrypts all of them
// with a new key, the server then starts without the old one, and without encryption all are decrypted again.
func TestEncryptionAndItsRotation(t *testing.T) {
	dir := t.TempDir()
	file := encryption.File(filepath.Join(dir, "encryption.key"))
	started := func(on bool) (*testServer, encryption.Rotator) {
		t.Helper()
		path, err := file.Prepare(on)
		if err != nil {
			t.Fatal(err)
		}
		s := start(t, dir, func(c *Config) {
			c.Access = NewAccess()
			c.Access.EncryptionConfig = path
		})
		return s, rotator(s, file)
	}
	wrapped := func(s *testServer, name, prefix string) {
		t.Helper()
		value := s.raw(t, "secrets/default/"+name)
		if bytes.Contains(value, []byte(password)) != (prefix == "") || !bytes.HasPrefix(value, []byte(prefix)) {
			t.Errorf("Secret %s is stored as %.40q", name, value)
		}
	}

	s, _ := started(false)
	s.secret(t, "before")
	wrapped(s, "before", "")
	if err := s.ReloadEncryption(); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("reload without encryption: %v", err)
	}
	s.stop()

	s, rotator := started(true)
	if info, err := os.Stat(string(file)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file of keys: %v, %v", info, err)
	}
	s.secret(t, "after")
	s.readable(t, "before", "after")
	wrapped(s, "before", "")
	wrapped(s, "after", "k8s:enc:secretbox:v1:key-1:")

	// More than a page of them, and one that changes all the time.
	for i := range rewritePage + 10 {
		s.secret(t, fmt.Sprint("many-", i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	changing := make(chan error, 1)
	go func() {
		secrets := s.client.CoreV1().Secrets("default")
		for i := 0; ; i++ {
			patch := fmt.Sprintf(`{"metadata":{"annotations":{"i":"%d"}}}`, i)
			if _, err := secrets.Patch(ctx, "after", "application/merge-patch+json", []byte(patch), metav1.PatchOptions{}); err != nil {
				if ctx.Err() != nil {
					err = nil
				}
				changing <- err
				return
			}
		}
	}()
	report, err := rotator.Rotate(t.Context())
	cancel()
	if err := errors.Join(err, <-changing); err != nil {
		t.Fatal(err)
	}
	if report.Active.String() != "secretbox key-2" || report.Others() != 0 || len(report.Counts) != 1 || report.Counts[0].Secrets < rewritePage+12 {
		t.Errorf("report %+v", report)
	}
	wrapped(s, "before", "k8s:enc:secretbox:v1:key-2:")
	wrapped(s, "after", "k8s:enc:secretbox:v1:key-2:")
	if keys, err := os.ReadFile(string(file)); err != nil || strings.Contains(string(keys), "key-1") {
		t.Errorf("the old key is still there: %v", err)
	}
	s.readable(t, "before", "after", "many-0")
	s.stop()

	s, _ = started(true)
	s.readable(t, "before", "after", "many-0")
	s.stop()

	s, rotator = started(false)
	s.readable(t, "before", "after", "many-0")
	if report, err = rotator.Rotate(t.Context()); err != nil || report.Active != encryption.Plain || report.Others() != 0 {
		t.Errorf("%+v, %v", report, err)
	}
	wrapped(s, "before", "")
	s.readable(t, "before", "after")
}

// rotator rotates the keys in file of a server that is alone.
func rotator(s *testServer, file encryption.File) encryption.Rotator {
	return encryption.Rotator{Keys: encryption.OneServer{File: file, Reload: s.ReloadEncryption}, Rewrite: s.Rewrite, KV: s.store.Client()}
}

// A rotation that is cut off leaves everything readable, also after a restart, and the next one finishes it.
func TestEncryptionRotationCutOff(t *testing.T) {
	dir := t.TempDir()
	file := encryption.File(filepath.Join(dir, "encryption.key"))
	run := func(c *Config) {
		path, err := file.Prepare(true)
		if err != nil {
			t.Fatal(err)
		}
		c.Access = NewAccess()
		c.Access.EncryptionConfig = path
	}
	s := start(t, dir, run)
	s.secret(t, "a")
	failing := rotator(s, file)
	failing.Rewrite = func(context.Context) (int, error) { return 0, errors.New("no") }
	if _, err := failing.Rotate(t.Context()); err == nil || !strings.Contains(err.Error(), "run it again") {
		t.Fatalf("a rotation that cannot write: %v", err)
	}
	s.secret(t, "b")
	s.readable(t, "a", "b")
	s.stop()
	s = start(t, dir, run)
	s.readable(t, "a", "b")
	report, err := rotator(s, file).Rotate(t.Context())
	if err != nil || report.Active.Key != "key-3" || len(report.Counts) != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	s.readable(t, "a", "b")
}

// plugin is a KMS that "encrypts" by turning every bit.
type plugin struct {
	key    atomic.Value
	uses   atomic.Int32
	sealed atomic.Bool // it says that it is not well
}

func turned(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = ^b[i]
	}
	return out
}

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	if p.sealed.Load() {
		return &service.StatusResponse{Version: "v2", Healthz: "sealed", KeyID: p.key.Load().(string)}, nil
	}
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.key.Load().(string)}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	p.uses.Add(1)
	return &service.EncryptResponse{Ciphertext: turned(data), KeyID: p.key.Load().(string)}, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	return turned(req.Ciphertext), nil
}

// A KMS plugin wraps the keys (KMS v2), AES-GCM encrypts another resource; what is written follows the file when it is
// read again; and a KMS that is gone makes the server unready.
func TestEncryptionByKMSAndAESGCM(t *testing.T) {
	dir := t.TempDir()
	p := &plugin{}
	p.key.Store("first")
	socket := "@skep-test-kms-" + filepath.Base(dir)
	kms := service.NewGRPCService(socket, 10*time.Second, p)
	served := make(chan error, 1)
	go func() { served <- kms.ListenAndServe() }()
	t.Cleanup(func() {
		kms.Shutdown()
		if err := <-served; err != nil {
			t.Errorf("KMS: %v", err)
		}
	})
	file := filepath.Join(dir, "encryption.yaml")
	write := func(first, second string) {
		t.Helper()
		config := fmt.Sprintf(`
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v2, name: vault, endpoint: 'unix:///%s', timeout: 10s}
- resources: [configmaps]
  providers:
  - aesgcm: {keys: [{name: %s, secret: %s}, {name: %s, secret: %s}]}
  - identity: {}
`, socket, first, aesKey(first), second, aesKey(second))
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("one", "two")
	s := start(t, filepath.Join(dir, "data"), func(c *Config) {
		c.Access = NewAccess()
		c.Access.EncryptionConfig = file
	})
	s.secret(t, "a")
	if value := s.raw(t, "secrets/default/a"); !bytes.HasPrefix(value, []byte("k8s:enc:kms:v2:vault:")) || bytes.Contains(value, []byte(password)) || p.uses.Load() == 0 {
		t.Errorf("stored as %.40q, after %d uses of the KMS", value, p.uses.Load())
	}
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"k": password}}
	if _, err := s.client.CoreV1().ConfigMaps("default").Create(t.Context(), cm, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if value := s.raw(t, "configmaps/default/c"); !bytes.HasPrefix(value, []byte("k8s:enc:aesgcm:v1:one:")) {
		t.Errorf("stored as %.40q", value)
	}

	write("two", "one")
	if err := s.ReloadEncryption(); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Rewrite(t.Context()); err != nil || n < 2 {
		t.Errorf("%d objects are written again: %v", n, err)
	}
	all, err := s.store.Client().Get(t.Context(), "/registry/configmaps/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, item := range all.Kvs {
		if !bytes.HasPrefix(item.Value, []byte("k8s:enc:aesgcm:v1:two:")) {
			t.Errorf("%s is stored as %.40q", item.Key, item.Value)
		}
	}
	s.readable(t, "a")

	// A file that makes no sense changes nothing.
	if err := os.WriteFile(file, []byte("kind: Nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.ReloadEncryption(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("reload of nonsense: %v", err)
	}
	s.secret(t, "b")
	s.readable(t, "a", "b")
	s.whileSealed(t, p)
}

// While the KMS is not well the server says that it is not ready, and why; what it knows stays readable, and what is
// not encrypted is written as ever.
func (s *testServer) whileSealed(t *testing.T, p *plugin) {
	t.Helper()
	ready := func(want bool) {
		t.Helper()
		err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, generous, true, func(ctx context.Context) (bool, error) {
			answer, err := s.client.CoreV1().RESTClient().Get().AbsPath("/readyz").Param("verbose", "").DoRaw(ctx)
			return (err == nil) == want && (want || strings.Contains(string(answer), "[-]kms-providers")), nil
		})
		if err != nil {
			t.Errorf("readyz, ready %t: %v", want, err)
		}
	}
	p.sealed.Store(true)
	ready(false)
	s.readable(t, "a", "b")
	if _, err := s.client.CoreV1().ServiceAccounts("default").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "meanwhile"}}, metav1.CreateOptions{}); err != nil {
		t.Errorf("what is not encrypted: %v", err)
	}
	p.sealed.Store(false)
	ready(true)
	s.secret(t, "after")
	s.readable(t, "a", "after")
}

func aesKey(name string) string {
	return map[string]string{"one": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", "two": "YWJjZGVmZ2hpamtsbW5vcGFiY2RlZmdoaWprbG1ub3A="}[name]
}
