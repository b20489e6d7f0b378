// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"strings"

	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/volumes"
)

// wanted is an image that must be here before a container starts: its own, or that of a volume which it mounts.
type wanted struct {
	ref       string
	policy    corev1.PullPolicy
	container string // whose own image it is; empty for a volume's
	volume    string // whose image it is; empty for a container's
}

// volumePrefix begins the key of a volume's image. Names of containers have no slash.
const volumePrefix = "volume/"

// wantedImage is the image behind a key: the name of a container, or the prefix and the name of a volume.
func wantedImage(pod *corev1.Pod, key string) wanted {
	if name, ok := strings.CutPrefix(key, volumePrefix); ok {
		for i := range pod.Spec.Volumes {
			if v := &pod.Spec.Volumes[i]; v.Name == name && v.Image != nil {
				return wanted{ref: v.Image.Reference, policy: v.Image.PullPolicy, volume: name}
			}
		}
		return wanted{volume: name}
	}
	c := specOf(pod, key)
	return wanted{ref: c.Image, policy: c.ImagePullPolicy, container: c.Name}
}

// imageKeys are the images that a container needs, by key, its own first.
func imageKeys(pod *corev1.Pod, c *corev1.Container) []string {
	keys := []string{c.Name}
	for i := range c.VolumeMounts {
		if v := volumes.Of(pod, c.VolumeMounts[i].Name); v != nil && v.Image != nil {
			keys = append(keys, volumePrefix+v.Name)
		}
	}
	return keys
}

// imagesHere reports whether all images are here that a container's attempt needs, and has those come that are not. A
// volume's is looked for once: the pod keeps what it found.
func (v *view) imagesHere(p *Plan, c *corev1.Container, attempt int) bool {
	all := true
	for _, key := range imageKeys(v.pod, c) {
		n := attempt
		if key != c.Name {
			n = 0
		}
		img := v.o.Images[key]
		if img.Ready && img.Attempt == n {
			continue
		}
		all = false
		if img.Failure == nil || img.Attempt != n || p.due(img.Failure, v.o.Now) {
			p.do(Action{Kind: EnsureImage, Container: key, Attempt: n})
		}
	}
	return all
}
