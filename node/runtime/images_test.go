// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"skep.io/skep/node/sandbox"
)

func TestNormalize(t *testing.T) {
	for in, want := range map[string]string{
		"busybox":                   "docker.io/library/busybox:latest",
		"skep/prog:1":               "docker.io/skep/prog:1",
		"localhost:5000/a/b":        "localhost:5000/a/b:latest",
		"ghcr.io/a/b@" + someDigest: "ghcr.io/a/b@" + someDigest,
		someDigest:                  someDigest,
	} {
		if got, err := Normalize(in); err != nil || got != want {
			t.Errorf("Normalize(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, bad := range []string{"", "UPPER", "a b", "x:y:z"} {
		if got, err := Normalize(bad); err == nil {
			t.Errorf("Normalize(%q) = %q", bad, got)
		}
	}
}

const someDigest = "sha256:4e52d776ccd505b00b726b9b03c0b4670349243d751e4df2cb790e1b53f06a84"

// TestPull pulls from a registry on loopback that wants a password, and runs the image.
func TestPull(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	store := registry.New(registry.Logger(log.New(os.Stderr, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); r.Header.Get("X-Test-Push") == "" && (!ok || user != "bee" || password != "honey") {
			w.Header().Set("WWW-Authenticate", `Basic realm="hive"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, r)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	host = strings.Replace(host, "127.0.0.1", "localhost", 1)
	ref, err := name.ParseReference(host + "/team/prog:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, progImage(t), remote.WithTransport(pushTransport{http.DefaultTransport})); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Images().Pull(ctx, ref.String(), nil); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "authorization failed") {
		t.Errorf("anonymous pull: %v", err)
	}
	if _, err := n.Images().Pull(ctx, host+"/team/none:v1", []Auth{{Username: "bee", Password: "honey"}}); !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "not found") {
		t.Errorf("pull of nothing: %v", err)
	}
	img, err := n.Images().Pull(ctx, ref.String(), []Auth{{Username: "bee", Password: "wrong"}, {Username: "bee", Password: "honey"}})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(img.Digest, host+"/team/prog@sha256:") && !strings.HasPrefix(img.Digest, "docker.io/skep/prog@sha256:") {
		t.Errorf("image %+v", img)
	}
	got, err := n.Images().Get(ctx, ref.String())
	if err != nil || got.ID != img.ID || got.Size == 0 {
		t.Errorf("Get: %+v, %v", got, err)
	}
	n.image = img
	spec := n.spec("pulled", "args", "it", "runs")
	n.exited(n.run(spec))
	n.logs(spec, "it|runs\n")
}

type pushTransport struct{ http.RoundTripper }

func (p pushTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Test-Push", "yes")
	return p.RoundTripper.RoundTrip(r)
}

// TestImages: a second import does nothing, a changed archive is imported, a bad one is named, and a removed image is gone.
func TestImages(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	dir := filepath.Join(n.dir, "images")
	before, err := os.Stat(filepath.Join(n.dir, "data", "imported.json"))
	if err != nil {
		t.Fatal(err)
	}
	if imgs, err := n.Images().ImportDir(ctx, dir); err != nil || len(imgs) != 1 || imgs[0].ID != n.image.ID {
		t.Errorf("second import: %v, %v", imgs, err)
	}
	if after, err := os.Stat(filepath.Join(n.dir, "data", "imported.json")); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("the unchanged archive was imported again: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bad.tar"), []byte("no archive"), 0o644); err != nil {
		t.Fatal(err)
	}
	imgs, err := n.Images().ImportDir(ctx, dir)
	if err == nil || !strings.Contains(err.Error(), "bad.tar") || len(imgs) != 1 {
		t.Errorf("with a bad archive: %v, %v", imgs, err)
	}
	if imgs, err := n.Images().ImportDir(ctx, filepath.Join(dir, "none")); err != nil || len(imgs) != 0 {
		t.Errorf("no directory: %v, %v", imgs, err)
	}
	all, err := n.Images().List(ctx)
	if err != nil || len(all) != 1 || all[0].Tags[0] != testImage || !all[0].Pinned {
		t.Errorf("List: %+v, %v", all, err)
	}
	for _, ref := range []string{"skep/prog", testImage, n.image.ID} {
		if img, err := n.Images().Get(ctx, ref); err != nil || img.ID != n.image.ID {
			t.Errorf("Get(%q): %+v, %v", ref, img, err)
		}
	}
	if err := n.Images().Remove(ctx, n.image.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Images().Get(ctx, "skep/prog"); !errors.Is(err, ErrImageNotFound) {
		t.Errorf("removed: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "bad.tar")); err != nil {
		t.Fatal(err)
	}
	if imgs, err := n.Images().ImportDir(ctx, dir); err != nil || len(imgs) != 1 {
		t.Errorf("import after removal: %v, %v", imgs, err)
	}
}

// TestReset: Cleanup takes running containers away without a Runtime. What is left of them, newNode's clean-up finds.
func TestReset(t *testing.T) {
	n, ctx := emptyNode(t), context.Background()
	n.killedAgent()
	data, run := filepath.Join(n.dir, "data"), filepath.Join(n.dir, "run")
	for range 2 {
		if err := Cleanup(ctx, data, run); err != nil {
			t.Fatal(err)
		}
		if err := sandbox.Cleanup(ctx, run, n.cgroupRoot()); err != nil {
			t.Fatal(err)
		}
	}
	if left := processes(n.dir); len(left) != 0 {
		t.Errorf("shims left: %v", left)
	}
}
