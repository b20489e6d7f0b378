// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	nodert "skep.io/skep/node/runtime"
)

// ImageGC says when images that nobody uses are removed. The zero value is kubelet's defaults.
type ImageGC struct {
	High   int           // percent of the disk in use at which images go; 0: 85; 100: never
	Low    int           // percent at which that is enough; 0: 80
	MinAge time.Duration // what was used, or came, less long ago stays; 0: 2 min, negative: no limit
}

func (g ImageGC) complete() ImageGC {
	g.High, g.Low = cmp.Or(g.High, 85), cmp.Or(g.Low, 80)
	g.MinAge = max(cmp.Or(g.MinAge, 2*time.Minute), 0)
	g.Low = min(g.Low, g.High)
	return g
}

// imageUse is what is remembered of an image: when it was first seen, and last seen in use.
type imageUse struct{ first, used time.Time }

// imageCollector removes images that nobody uses when the disk fills up.
type imageCollector struct {
	policy ImageGC
	seen   map[string]imageUse // by image id
}

// look notes which images are in use now, and forgets those that are gone.
func (g *imageCollector) look(list []nodert.Image, inUse map[string]bool, now time.Time) {
	seen := make(map[string]imageUse, len(list))
	for _, i := range list {
		u, ok := g.seen[i.ID]
		if !ok {
			u.first = now
		}
		if inUse[i.ID] {
			u.used = now
		}
		seen[i.ID] = u
	}
	g.seen = seen
}

// surplus names the images to remove until that many bytes are free: those that were used the longest time ago first.
// What is in use, what came from this host's own archives, and what is young stays.
func (g *imageCollector) surplus(list []nodert.Image, inUse map[string]bool, bytes int64, now time.Time) []nodert.Image {
	var may []nodert.Image
	for _, i := range list {
		u := g.seen[i.ID]
		if !inUse[i.ID] && !i.Pinned && now.Sub(u.first) >= g.policy.MinAge && now.Sub(u.used) >= g.policy.MinAge {
			may = append(may, i)
		}
	}
	slices.SortStableFunc(may, func(a, b nodert.Image) int {
		x, y := g.seen[a.ID], g.seen[b.ID]
		return cmp.Or(x.used.Compare(y.used), x.first.Compare(y.first), cmp.Compare(a.ID, b.ID))
	})
	for n, i := range may {
		if bytes <= 0 {
			return may[:n]
		}
		bytes -= i.Size
	}
	return may
}

// excess is how many bytes must go from a disk of that capacity; 0 while it is not too full.
func (g *imageCollector) excess(capacity, available int64) int64 {
	if capacity <= 0 || g.policy.High >= 100 || available > capacity/100*int64(100-g.policy.High) {
		return 0
	}
	return max(capacity/100*int64(100-g.policy.Low)-available, 0)
}

// usedImages are the ids of images that containers were made of, or that pods which have not ended name.
func usedImages(list []nodert.Image, containers []nodert.Container, pods []*corev1.Pod) map[string]bool {
	names := map[string]bool{}
	add := func(image string) {
		names[image] = true
		if full, err := nodert.Normalize(image); err == nil {
			names[full] = true
		}
	}
	for _, c := range containers {
		add(c.Image)
		names[c.ImageID] = true
	}
	for _, p := range pods {
		if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		for i := range p.Spec.InitContainers {
			add(p.Spec.InitContainers[i].Image)
		}
		for i := range p.Spec.Containers {
			add(p.Spec.Containers[i].Image)
		}
		for i := range p.Spec.EphemeralContainers {
			add(p.Spec.EphemeralContainers[i].Image)
		}
		for i := range p.Spec.Volumes {
			if v := p.Spec.Volumes[i].Image; v != nil {
				add(v.Reference)
			}
		}
	}
	delete(names, "") // the container that holds a PID namespace has no image
	used := map[string]bool{}
	for _, i := range list {
		if names[i.ID] || names[i.Digest] || slices.ContainsFunc(i.Tags, func(t string) bool { return names[t] }) {
			used[i.ID] = true
		}
	}
	return used
}

// collectImages looks at the images, and removes some if the disk is too full. What cannot be helped becomes an event.
// With all it removes what it may, whatever the thresholds say: pods would have to go instead.
func (l *statusLoop) collectImages(ctx context.Context, capacity, available int64, all bool) error {
	set := l.a.Pods()
	if set == nil {
		return nil // it is not known yet what is in use
	}
	store := l.a.runtime.Images()
	list, err := store.List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	containers, err := l.a.runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	now := time.Now()
	used := usedImages(list, containers, set.Pods())
	l.images.look(list, used, now)
	excess := l.images.excess(capacity, available)
	if all {
		excess = capacity
	}
	if excess == 0 {
		return nil
	}
	var errs []error
	freed := int64(0)
	for _, i := range l.images.surplus(list, used, excess, now) {
		if err := store.Remove(ctx, i.ID); err != nil {
			errs = append(errs, err)
			continue
		}
		freed += i.Size
		l.a.log.Info("image removed, as the disk is filling up and nobody uses it", "image", cmp.Or(i.Digest, i.ID), "bytes", i.Size)
	}
	if freed > 0 {
		l.changed()
	} else if !l.full {
		l.recorder.Eventf(l.ref(), corev1.EventTypeWarning, "FreeDiskSpaceFailed",
			"Failed to garbage collect required amount of images. Attempted to free %d bytes, but only found 0 bytes eligible to free.", excess)
	}
	l.full = freed == 0
	return errors.Join(errs...)
}
