// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// TestImageVolume: an image is mounted with all its layers, read-only, once; another agent finds it, it outlives the
// image's name, and nothing is left of it.
func TestImageVolume(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	layers := func(img v1.Image) []v1.Layer {
		l, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	img, err := mutate.AppendLayers(imageOf(t, file("a/one", "1"), file("a/two", "2")), layers(imageOf(t, file("a/two", "two")))...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	writeArchive(t, filepath.Join(n.dir, "images", "files.tar"), img, "docker.io/skep/files:1")
	if _, err := n.Images().ImportDir(ctx, filepath.Join(n.dir, "images")); err != nil {
		t.Fatal(err)
	}
	files, err := n.Images().Get(ctx, "skep/files:1")
	if err != nil {
		t.Fatal(err)
	}
	// One of several layers and one of a single layer are mounted differently.
	at := map[string]string{"v": filepath.Join(n.dir, "volume"), "w": filepath.Join(n.dir, "single")}
	show := func() {
		t.Helper()
		for name, want := range map[string]string{at["v"] + "/a/one": "1", at["v"] + "/a/two": "two", at["w"] + "/etc/group": "root:x:0:\nbee:x:1001:\nhive:x:1500:bee\n"} {
			if data, err := os.ReadFile(name); err != nil || string(data) != want {
				t.Errorf("%s: %q, %v", name, data, err)
			}
		}
		for _, dir := range at {
			if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); err == nil {
				t.Errorf("%s can be written", dir)
			}
		}
	}
	mount := func() {
		t.Helper()
		for volume, id := range map[string]string{"v": files.ID, "w": n.image.ID} {
			for range 2 {
				if err := n.Images().Mount(ctx, id, "pod", volume, at[volume]); err != nil {
					t.Fatal(err)
				}
			}
		}
		show()
	}
	mount()
	if err := n.Runtime.Close(); err != nil {
		t.Fatal(err)
	}
	n.open()
	mount()
	if err := n.Images().Remove(ctx, files.ID); err != nil {
		t.Fatal(err)
	}
	show()
	for _, dir := range at {
		if err := unmounted(dir); err != nil {
			t.Error(err)
		}
	}
	// As after a reboot: the snapshots are there, what was mounted is not.
	if err := n.Images().Mount(ctx, files.ID, "pod", "v", at["v"]); !errors.Is(err, ErrImageNotFound) {
		t.Errorf("an image that was removed: %v", err)
	}
	if err := n.Images().Mount(ctx, n.image.ID, "pod", "w", at["w"]); err != nil {
		t.Error(err)
	}
	if err := unmounted(at["w"]); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := n.Images().Release(ctx, "pod"); err != nil {
			t.Error(err)
		}
	}
	sn := n.client.SnapshotService(n.snapshotter)
	if err := sn.Walk(n.in(ctx), func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			return fmt.Errorf("%s is left", i.Name)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
