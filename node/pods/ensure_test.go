// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// imageVolume is a volume of an image that containers can mount.
func imageVolume(name, ref string, policy corev1.PullPolicy) podOpt {
	return func(p *corev1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			Image: &corev1.ImageVolumeSource{Reference: ref, PullPolicy: policy},
		}})
	}
}

func mounting(volume string) func(*corev1.Container) {
	return func(c *corev1.Container) {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: volume, MountPath: "/" + volume})
	}
}

func TestImageVolumesComeFirst(t *testing.T) {
	p := pod(imageVolume("v", "files", corev1.PullIfNotPresent), imageVolume("idle", "files", ""), main("c", mounting("v")), main("d"))
	for name, c := range map[string]struct {
		seen *Observed
		want []string
	}{
		"with the container's own":      {seen(), []string{"image c#0", "image d#0", "image volume/v#0"}},
		"it waits for both":             {seen(image("c", 0), image("d", 0)), []string{"image volume/v#0", "start d#0"}},
		"it starts":                     {seen(image("c", 0), running("d", 0), image("volume/v", 0)), []string{"start c#0"}},
		"the pod keeps what it found":   {seen(exited("c", 0, 1), image("c", 1), running("d", 0), image("volume/v", 0)), []string{"start c#1 next 10s"}},
		"one that failed is backed off": {seen(image("c", 0), running("d", 0), func(o *Observed) { o.Images["volume/v"] = ImageState{Failure: &Failure{RetryAt: now.Add(1)}} }), nil},
	} {
		var got []string
		for _, a := range plan(p, c.seen).Actions {
			got = append(got, short(a))
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// A container whose volume's image does not come says so, and nothing is mounted; others of the pod run.
func TestWorkerImageVolumes(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	b.create(pod(named("p"), imageVolume("v", "files", corev1.PullIfNotPresent), imageVolume("w", "missing", corev1.PullNever),
		main("c", mounting("v")), main("d", mounting("v"), mounting("w"))))
	b.until("one waits and the other runs", func() bool {
		s := b.get("p").Status.ContainerStatuses
		return len(s) == 2 && s[0].Ready && s[1].State.Waiting != nil && s[1].State.Waiting.Reason == "ErrImageNeverPull"
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(h.steps, []string{"image sha256:1 at v"}) {
		t.Errorf("mounted: %q", h.steps)
	}
	told := ""
	for len(b.events.Events) > 0 {
		told += <-b.events.Events + "\n"
	}
	if !strings.Contains(told, `Warning ErrImageNeverPull Container image "missing" is not present with pull policy of Never`) {
		t.Errorf("events:\n%s", told)
	}
}
