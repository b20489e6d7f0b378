// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// aRegistry serves what was pushed to it, over TLS with a certificate that nobody knows, and notes who asks.
type aRegistry struct {
	*httptest.Server
	asked       atomic.Int32
	credentials atomic.Int32 // requests that had any
	curious     atomic.Bool  // wants some of everybody
}

func newRegistry(t *testing.T) *aRegistry {
	t.Helper()
	r := &aRegistry{}
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	r.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.asked.Add(1)
		if q.Header.Get("Authorization") != "" {
			r.credentials.Add(1)
		} else if r.curious.Load() {
			w.Header().Set("WWW-Authenticate", `Basic realm="hive"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, q)
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *aRegistry) host() string { return strings.TrimPrefix(r.URL, "https://") }

func (r *aRegistry) push(t *testing.T, repository string, img v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(r.host() + "/" + repository)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(r.Client().Transport)); err != nil {
		t.Fatal(err)
	}
	r.asked.Store(0)
}

// ca writes the certificate to trust and returns its path.
func (r *aRegistry) ca(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// configure writes dir/REGISTRY/hosts.toml.
func configure(t *testing.T, dir, registry, hosts string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, registry), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), []byte(hosts), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRegistryConfiguration: a mirror with a certificate of its own is asked instead of a registry that cannot be
// reached, without the credentials for that one; and what is wrong in a file is said, with nobody asked.
func TestRegistryConfiguration(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	dir := t.TempDir()
	n.cfg.RegistryConfigDir = dir
	mirror := newRegistry(t)
	mirror.push(t, "team/prog:v1", progImage(t))
	const ref = "registry.example.invalid/team/prog:v1"
	auths := []Auth{{Username: "bee", Password: "honey"}}
	pull := func() error {
		_, err := n.Images().Pull(ctx, ref, auths)
		return err
	}

	configure(t, dir, "registry.example.invalid", fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.URL))
	if err := pull(); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate that nobody vouches for: %v", err)
	}

	for _, bad := range []struct{ file, want string }{
		{"[host.\n", "hosts.toml:1: "},
		{fmt.Sprintf("[host.%q]\n  skip_verfiy = true\n", mirror.URL), "skip_verfiy"},
		{"server = 5\n", "hosts.toml:1: "},
	} {
		configure(t, dir, "registry.example.invalid", bad.file)
		mirror.asked.Store(0)
		if err := pull(); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), bad.want) || !strings.Contains(err.Error(), filepath.Join(dir, "registry.example.invalid", "hosts.toml")) {
			t.Errorf("%q: %v", bad.file, err)
		}
		if mirror.asked.Load() != 0 {
			t.Errorf("%q: the mirror was asked", bad.file)
		}
	}

	configure(t, dir, "registry.example.invalid", fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = %q\n", mirror.URL, mirror.ca(t)))
	mirror.curious.Store(true)
	if err := pull(); !errors.Is(err, ErrPull) || mirror.asked.Load() == 0 || mirror.credentials.Load() != 0 {
		t.Errorf("a mirror that wants credentials was asked %d times and got them %d times: %v", mirror.asked.Load(), mirror.credentials.Load(), err)
	}
	mirror.curious.Store(false)
	if err := pull(); err != nil {
		t.Fatal(err)
	}
	if img, err := n.Images().Get(ctx, ref); err != nil || img.Size == 0 {
		t.Errorf("the image is kept under the registry's name: %+v, %v", img, err)
	}

	// All registries without a directory of their own, by their names.
	configure(t, dir, "_default", fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = %q\n", mirror.URL, mirror.ca(t)))
	if _, err := n.Images().Pull(ctx, "other.example.invalid/team/prog:v1", nil); err != nil {
		t.Errorf("by the mirror of all registries: %v", err)
	}
}

// TestRegistryCredentials: they go to the registry that they are for, which has a certificate of its own.
func TestRegistryCredentials(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	dir := t.TempDir()
	n.cfg.RegistryConfigDir = dir
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	private := &aRegistry{Server: httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); r.Header.Get("X-Test-Push") == "" && (!ok || user != "bee" || password != "honey") {
			w.Header().Set("WWW-Authenticate", `Basic realm="hive"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, r)
	}))}
	t.Cleanup(private.Close)
	ref, err := name.ParseReference(private.host() + "/team/prog:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, progImage(t), remote.WithTransport(pushTransport{private.Client().Transport})); err != nil {
		t.Fatal(err)
	}
	// The directory of a registry with a port, as containerd writes it.
	configure(t, dir, strings.Replace(private.host(), ":", "_", 1)+"_", fmt.Sprintf("server = %q\nca = %q\n", private.URL, private.ca(t)))
	if _, err := n.Images().Pull(ctx, ref.String(), nil); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "401") && !strings.Contains(err.Error(), "authorization failed") {
		t.Errorf("anonymous pull: %v", err)
	}
	if _, err := n.Images().Pull(ctx, ref.String(), []Auth{{Username: "bee", Password: "honey"}}); err != nil {
		t.Error(err)
	}
}

// TestHostileImages: images that lie about their bytes or reach out of their root hurt nobody, and the error says what
// was wrong; the node pulls the next one.
func TestHostileImages(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var swap atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !swap.Load() || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			store.ServeHTTP(w, r)
			return
		}
		// Every blob with its last byte changed.
		recorded := httptest.NewRecorder()
		store.ServeHTTP(recorded, r)
		body := recorded.Body.Bytes()
		if recorded.Code == http.StatusOK && len(body) > 0 {
			body = append(bytes.Clone(body[:len(body)-1]), body[len(body)-1]^0xff)
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.WriteHeader(recorded.Code)
		_, _ = w.Write(body)
	}))
	defer server.Close()
	host := strings.Replace(strings.TrimPrefix(server.URL, "http://"), "127.0.0.1", "localhost", 1)
	push := func(repository string, img v1.Image) string {
		t.Helper()
		ref, err := name.ParseReference(host + "/" + repository)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img); err != nil {
			t.Fatal(err)
		}
		return ref.String()
	}

	swapped := push("swapped:v1", imageOf(t, file("data", "one of a kind")))
	swap.Store(true)
	if _, err := n.Images().Pull(ctx, swapped, nil); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "unexpected commit digest") {
		t.Errorf("bytes that are not those of the digest: %v", err)
	}
	swap.Store(false)

	up := strings.Repeat("../", 12)
	for _, hostile := range []struct {
		name    string
		entries []entry
	}{
		{"a name with dots", []entry{file(up+outside[1:]+"/dots", "out")}},
		{"an absolute name", []entry{file(outside+"/absolute", "out")}},
		{"a link to a directory outside", []entry{link("door", outside), file("door/link", "out")}},
		{"a link with dots", []entry{link("door", up+outside[1:]), file("door/dotted-link", "out")}},
		{"a hard link to a file outside", []entry{hardLink("passwd", up+"etc/passwd")}},
	} {
		ref := push("hostile:"+strings.ReplaceAll(hostile.name, " ", "-"), imageOf(t, hostile.entries...))
		_, err := n.Images().Pull(ctx, ref, nil) // which may refuse it, or keep it inside
		t.Logf("%s: %v", hostile.name, err)
		if found, err := os.ReadDir(outside); err != nil || len(found) > 0 {
			t.Errorf("%s: %v, %v is outside", hostile.name, found, err)
		}
	}
	if _, err := n.Images().Pull(ctx, push("good:v1", imageOf(t, file("data", "fine"))), nil); err != nil {
		t.Errorf("the next image: %v", err)
	}
}
