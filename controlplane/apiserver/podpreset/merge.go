// SPDX-License-Identifier: Apache-2.0

package podpreset

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	api "skep.io/skep/api/podpreset"
)

// selecting are those that select a pod with such labels, by name: the order in which they are merged.
func selecting(presets []*api.PodPreset, of map[string]string) ([]*api.PodPreset, error) {
	var out []*api.PodPreset
	for _, p := range presets {
		s, err := metav1.LabelSelectorAsSelector(&p.Spec.Selector)
		if err != nil {
			return nil, fmt.Errorf("selector of PodPreset %s/%s: %w", p.Namespace, p.Name, err)
		}
		if s.Matches(labels.Set(of)) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *api.PodPreset) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// merge adds to the pod what the presets have. After an error, which names each conflict, the pod is as it was.
func merge(pod *corev1.Pod, presets []*api.PodPreset) error {
	out := pod.DeepCopy()
	var errs []error
	for _, p := range presets {
		spec := p.Spec
		by := func(err error) error {
			if err == nil {
				return nil
			}
			return fmt.Errorf("PodPreset %s: %w", p.Name, err)
		}
		var err error
		out.Spec.Volumes, err = join(out.Spec.Volumes, spec.Volumes, "volume", func(v *corev1.Volume) string { return v.Name })
		errs = append(errs, by(err))
		for _, list := range [][]corev1.Container{out.Spec.InitContainers, out.Spec.Containers} {
			for i := range list {
				errs = append(errs, by(mergeContainer(&list[i], &spec)))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	*pod = *out
	return nil
}

func mergeContainer(c *corev1.Container, spec *api.Spec) error {
	var errs [2]error
	c.Env, errs[0] = join(c.Env, spec.Env, "variable", func(e *corev1.EnvVar) string { return e.Name })
	for _, from := range spec.EnvFrom {
		if !slices.ContainsFunc(c.EnvFrom, func(have corev1.EnvFromSource) bool { return equality.Semantic.DeepEqual(have, from) }) {
			c.EnvFrom = append(c.EnvFrom, from)
		}
	}
	c.VolumeMounts, errs[1] = join(c.VolumeMounts, spec.VolumeMounts, "mount path", func(m *corev1.VolumeMount) string { return m.MountPath })
	if err := errors.Join(errs[:]...); err != nil {
		return fmt.Errorf("container %s: %w", c.Name, err)
	}
	return nil
}

// join adds what is new to what there is. What has the same key must be the same.
func join[T any](have, added []T, what string, key func(*T) string) ([]T, error) {
	out := slices.Clone(have)
	var errs []error
	for i := range added {
		at := slices.IndexFunc(out, func(h T) bool { return key(&h) == key(&added[i]) })
		switch {
		case at < 0:
			out = append(out, added[i])
		case !equality.Semantic.DeepEqual(out[at], added[i]):
			errs = append(errs, fmt.Errorf("%s %s is there already, and differs", what, key(&added[i])))
		}
	}
	return out, errors.Join(errs...)
}
