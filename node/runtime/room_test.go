// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

func TestShort(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		left, size int64
		want       bool
	}{
		{0, gib, true}, {gib/20 - 1, gib, true}, {gib / 20, gib, false}, // of a small disk, a twentieth
		{roomLeft - 1, 1000 * gib, true}, {roomLeft, 1000 * gib, false}, // of a large one, so much
	} {
		if err := short("/data", c.left, c.size); (err != nil) != c.want {
			t.Errorf("%d of %d left: %v", c.left, c.size, err)
		}
	}
}

// TestLayerBomb: a layer that unpacks to more than the disk has is refused with the reason, gives back what it took, and
// what runs and what comes next do not notice.
func TestLayerBomb(t *testing.T) {
	n, ctx := emptyNode(t), context.Background()
	const disk = 128 << 20
	n.smallDisk(disk >> 20)
	n.open()
	imported, err := n.Images().ImportDir(ctx, filepath.Join(n.dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	n.image = imported[0]
	n.run(n.spec("bystander", "wait"))

	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	push := func(repository string, img v1.Image) string {
		t.Helper()
		ref, err := name.ParseReference(strings.Replace(strings.TrimPrefix(server.URL, "http://"), "127.0.0.1", "localhost", 1) + "/" + repository)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img); err != nil {
			t.Fatal(err)
		}
		return ref.String()
	}
	bomb := push("bomb:v1", imageOf(t, file("zeros", strings.Repeat("\x00", disk+disk/4))))
	_, err = n.Images().Pull(ctx, bomb, []Auth{{}, {Username: "bee", Password: "honey"}})
	t.Log(err)
	if !errors.Is(err, ErrPull) || !strings.Contains(err.Error(), "it does not fit") {
		t.Fatalf("the bomb: %v", err)
	}
	if n := strings.Count(err.Error(), "it does not fit"); n != 1 {
		t.Errorf("it was fetched with each of two credentials, %d times", n)
	}
	eventually(t, "the room that it took is free again", func() error {
		var fs unix.Statfs_t
		if err := unix.Statfs(n.disk, &fs); err != nil {
			return err
		}
		if free := int64(fs.Bavail) * fs.Bsize; free < disk/2 {
			return fmt.Errorf("%d bytes are free", free)
		}
		return nil
	})
	if _, err := n.Images().Get(ctx, bomb); err == nil {
		t.Error("the bomb is kept as an image")
	}
	if _, err := n.Images().Pull(ctx, push("small:v1", imageOf(t, file("data", "fine"))), nil); err != nil {
		t.Errorf("the next image: %v", err)
	}
	all, err := n.List(ctx)
	if err != nil || len(all) != 1 || all[0].State != Running {
		t.Errorf("the bystander: %+v, %v", all, err)
	}
}
