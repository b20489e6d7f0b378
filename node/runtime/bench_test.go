// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// BenchmarkStart pairs, in each round: a container from Create to Running in a new pod, a second one in the same
// pod, and bare `runc run --detach` of the same root file system. It reports medians in milliseconds.
func BenchmarkStart(b *testing.B) {
	n, ctx := newNode(b), context.Background()
	bundle := runcBundle(b, n)
	var boxes, created, first, second, bare []time.Duration
	i := 0
	for b.Loop() {
		i++
		pod := fmt.Sprintf("bench-%d", i)
		t0 := time.Now()
		spec := n.spec(pod)
		t1 := time.Now()
		id, err := n.Create(ctx, spec)
		if err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		if err := n.Start(ctx, id); err != nil {
			b.Fatal(err)
		}
		t3 := time.Now()
		spec.Name, spec.LogPath = "second", spec.LogPath+".second"
		n.run(spec)
		t4 := time.Now()
		name := "skrt-bare-" + filepath.Base(n.dir) + fmt.Sprint(i)
		root := filepath.Join(n.dir, "runc")
		// No pipes: the container would hold them open.
		if err := exec.Command("runc", "--root", root, "run", "--detach", "--bundle", bundle, name).Run(); err != nil {
			b.Fatalf("runc: %v", err)
		}
		t5 := time.Now()
		if out, err := exec.Command("runc", "--root", root, "delete", "--force", name).CombinedOutput(); err != nil {
			b.Fatalf("runc delete: %v: %s", err, out)
		}
		boxes, created, first, second, bare = append(boxes, t1.Sub(t0)), append(created, t2.Sub(t1)), append(first, t3.Sub(t1)), append(second, t4.Sub(t3)), append(bare, t5.Sub(t4))
		all, err := n.ListPod(ctx, types.UID(pod))
		if err != nil {
			b.Fatal(err)
		}
		for _, c := range all {
			if err := n.Remove(ctx, c.ID); err != nil {
				b.Fatal(err)
			}
		}
		if err := n.sandboxes.Remove(ctx, types.UID(pod)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(median(boxes), "sandbox-ms")
	b.ReportMetric(median(created), "create-ms")
	b.ReportMetric(median(first), "first-ms")
	b.ReportMetric(median(second), "second-ms")
	b.ReportMetric(median(bare), "runc-ms")
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds()) / 1000
}

// runcBundle makes a bundle for bare runc with the test program.
func runcBundle(b *testing.B, n *node) string {
	b.Helper()
	dir := filepath.Join(n.dir, "bundle")
	for _, d := range []string{"rootfs/proc", "rootfs/dev", "rootfs/sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	program, err := os.ReadFile(filepath.Join(binDir, "prog"))
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs/prog"), program, 0o755); err != nil {
		b.Fatal(err)
	}
	image, err := n.images.find(n.image.ID)
	if err != nil {
		b.Fatal(err)
	}
	spec := n.spec("bundle")
	s, err := buildSpec(specInput{id: "bare-" + filepath.Base(n.dir), spec: spec, image: image.config, host: n.host})
	if err != nil {
		b.Fatal(err)
	}
	s.Process.Args = []string{"/prog", "sleep", "1h"}
	data, err := json.Marshal(s)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o644); err != nil {
		b.Fatal(err)
	}
	return dir
}

// BenchmarkOpen measures the start of a Runtime, embedded containerd included, in a directory with an image.
func BenchmarkOpen(b *testing.B) {
	n := newNode(b)
	if err := n.Runtime.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		n.open()
		if err := n.Runtime.Close(); err != nil {
			b.Fatal(err)
		}
	}
	if !strings.HasPrefix(n.image.ID, "sha256:") {
		b.Error(n.image.ID)
	}
}
