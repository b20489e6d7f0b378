// SPDX-License-Identifier: Apache-2.0

package node

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	nodert "skep.io/skep/node/runtime"
)

func TestImagesToRemove(t *testing.T) {
	const mb = 1 << 20
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	list := []nodert.Image{
		{ID: "running", Size: 100 * mb, Tags: []string{"docker.io/library/running:latest"}},
		{ID: "named", Size: 100 * mb, Digest: "docker.io/library/named@sha256:1"},
		{ID: "pinned", Size: 100 * mb, Pinned: true},
		{ID: "young", Size: 100 * mb},
		{ID: "old", Size: 10 * mb},
		{ID: "older", Size: 10 * mb},
		{ID: "never", Size: 10 * mb},
	}
	pod := &corev1.Pod{}
	pod.Spec.Containers = []corev1.Container{{Image: "running"}}
	ended := &corev1.Pod{}
	ended.Status.Phase = corev1.PodSucceeded
	ended.Spec.Containers = []corev1.Container{{Image: "old"}}
	list[4].Tags = []string{"docker.io/library/old:latest"}
	used := usedImages(list, []nodert.Container{{ImageID: "docker.io/library/named@sha256:1"}, {Name: nodert.PauseName}}, []*corev1.Pod{pod, ended})
	if len(used) != 2 || !used["running"] || !used["named"] {
		t.Fatalf("in use: %v", used)
	}
	g := &imageCollector{policy: ImageGC{}.complete(), seen: map[string]imageUse{}}
	g.look(list, used, now.Add(-time.Hour))
	for id, ago := range map[string]time.Duration{"old": 10 * time.Minute, "older": 20 * time.Minute} {
		u := g.seen[id]
		u.used = now.Add(-ago)
		g.seen[id] = u
	}
	g.seen["young"] = imageUse{first: now.Add(-time.Minute)}
	g.look(list, used, now)
	for _, tt := range []struct {
		name  string
		bytes int64
		want  string
	}{
		{"nothing to free", 0, ""},
		{"the one that was never used goes first", 1, "never"},
		{"then the longest unused, until it is enough", 15 * mb, "never older"},
		{"never what is in use, pinned or young", 1 << 40, "never older old"},
	} {
		var got []string
		for _, i := range g.surplus(list, used, tt.bytes, now) {
			got = append(got, i.ID)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, got, tt.want)
		}
	}
	// What was in use a moment ago is young, too; what is gone is forgotten.
	g.look(list[:1], nil, now)
	if len(g.surplus(list[:1], nil, 1, now)) != 0 || len(g.seen) != 1 {
		t.Errorf("just used: %v", g.seen)
	}
}

func TestDiskExcess(t *testing.T) {
	for _, tt := range []struct {
		policy              ImageGC
		capacity, available int64
		want                int64
	}{
		{ImageGC{}, 1000, 500, 0},
		{ImageGC{}, 1000, 151, 0},
		{ImageGC{}, 1000, 150, 50},
		{ImageGC{}, 1000, 0, 200},
		{ImageGC{High: 50, Low: 40}, 1000, 500, 100},
		{ImageGC{High: 50, Low: 90}, 1000, 500, 0}, // a low mark above the high one is the high one
		{ImageGC{High: 100}, 1000, 0, 0},
		{ImageGC{}, 0, 0, 0},
	} {
		g := &imageCollector{policy: tt.policy.complete()}
		if got := g.excess(tt.capacity, tt.available); got != tt.want {
			t.Errorf("%+v with %d of %d: %d, want %d", tt.policy, tt.available, tt.capacity, got, tt.want)
		}
	}
}
