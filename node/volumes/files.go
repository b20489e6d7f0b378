// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	"k8s.io/kubernetes/pkg/fieldpath"
	volumeutil "k8s.io/kubernetes/pkg/volume/util"
)

// payload is what a volume shows: path in the volume -> file.
type payload map[string]volumeutil.FileProjection

// add merges more files in; sources that come later win.
func (p payload) add(more payload) {
	for k, f := range more {
		p[k] = f
	}
}

// files collects what a volume of a kind that shows objects must show now.
func (v *Volumes) files(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (payload, time.Time, error) {
	switch {
	case vol.ConfigMap != nil:
		s := vol.ConfigMap
		p, err := v.configMap(ctx, pod, s.Name, s.Items, s.DefaultMode, s.Optional)
		return p, time.Time{}, err
	case vol.Secret != nil:
		s := vol.Secret
		p, err := v.secret(ctx, pod, s.SecretName, s.Items, s.DefaultMode, s.Optional)
		return p, time.Time{}, err
	case vol.DownwardAPI != nil:
		p, err := v.downward(pod, vol.DownwardAPI.Items, vol.DownwardAPI.DefaultMode)
		return p, time.Time{}, err
	default:
		return v.projected(ctx, pod, vol)
	}
}

// projected collects all sources at the same time: a token request is a call to the API server.
func (v *Volumes) projected(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (payload, time.Time, error) {
	sources := vol.Projected.Sources
	parts := make([]payload, len(sources))
	errs := make([]error, len(sources))
	dues := make([]time.Time, len(sources))
	mode := vol.Projected.DefaultMode
	var wg sync.WaitGroup
	for i := range sources {
		wg.Go(func() {
			switch s := &sources[i]; {
			case s.ConfigMap != nil:
				parts[i], errs[i] = v.configMap(ctx, pod, s.ConfigMap.Name, s.ConfigMap.Items, mode, s.ConfigMap.Optional)
			case s.Secret != nil:
				parts[i], errs[i] = v.secret(ctx, pod, s.Secret.Name, s.Secret.Items, mode, s.Secret.Optional)
			case s.DownwardAPI != nil:
				parts[i], errs[i] = v.downward(pod, s.DownwardAPI.Items, mode)
			case s.ServiceAccountToken != nil:
				parts[i], dues[i], errs[i] = v.token(ctx, pod, vol.Name, s.ServiceAccountToken, mode)
			default:
				errs[i] = ErrUnsupported
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		// One line, as it becomes one event.
		return nil, time.Time{}, errors.New(strings.ReplaceAll(err.Error(), "\n", ", "))
	}
	all := payload{}
	var due time.Time
	for i := range parts {
		all.add(parts[i])
		if d := dues[i]; !d.IsZero() && (due.IsZero() || d.Before(due)) {
			due = d
		}
	}
	return all, due, nil
}

func (v *Volumes) configMap(ctx context.Context, pod *corev1.Pod, name string, items []corev1.KeyToPath, mode *int32, optional *bool) (payload, error) {
	opt := optional != nil && *optional
	cm, err := v.cfg.Objects.ConfigMap(ctx, pod.Namespace, name)
	if err != nil {
		if opt && apierrors.IsNotFound(err) {
			return payload{}, nil
		}
		return nil, err
	}
	data := map[string][]byte{}
	for k, s := range cm.Data {
		data[k] = []byte(s)
	}
	for k, b := range cm.BinaryData {
		data[k] = b
	}
	return pick(data, items, mode, opt, "configmap", pod.Namespace+"/"+name)
}

func (v *Volumes) secret(ctx context.Context, pod *corev1.Pod, name string, items []corev1.KeyToPath, mode *int32, optional *bool) (payload, error) {
	opt := optional != nil && *optional
	s, err := v.cfg.Objects.Secret(ctx, pod.Namespace, name)
	if err != nil {
		if opt && apierrors.IsNotFound(err) {
			return payload{}, nil
		}
		return nil, err
	}
	return pick(s.Data, items, mode, opt, "secret", pod.Namespace+"/"+name)
}

// defaultMode is what the API server fills in where a volume names none.
func defaultMode(mode *int32) int32 {
	if mode != nil {
		return *mode
	}
	return corev1.ConfigMapVolumeSourceDefaultMode
}

// pick takes the items out of data, or all of it if there are none.
func pick(data map[string][]byte, items []corev1.KeyToPath, mode *int32, optional bool, kind, name string) (payload, error) {
	out := payload{}
	if len(items) == 0 {
		for k, b := range data {
			out[k] = volumeutil.FileProjection{Data: b, Mode: defaultMode(mode)}
		}
		return out, nil
	}
	for _, i := range items {
		b, ok := data[i.Key]
		if !ok {
			if optional {
				continue
			}
			return nil, fmt.Errorf("%s references non-existent %s key: %s", name, kind, i.Key)
		}
		m := mode
		if i.Mode != nil {
			m = i.Mode
		}
		out[i.Path] = volumeutil.FileProjection{Data: b, Mode: defaultMode(m)}
	}
	return out, nil
}

func (v *Volumes) downward(pod *corev1.Pod, items []corev1.DownwardAPIVolumeFile, mode *int32) (payload, error) {
	out := payload{}
	for _, i := range items {
		m := mode
		if i.Mode != nil {
			m = i.Mode
		}
		var value string
		var err error
		switch {
		case i.FieldRef != nil:
			value, err = fieldpath.ExtractFieldPathAsString(pod, i.FieldRef.FieldPath)
		case i.ResourceFieldRef != nil:
			value, err = resource.ExtractResourceValueByContainerNameAndNodeAllocatable(i.ResourceFieldRef, pod, i.ResourceFieldRef.ContainerName, v.cfg.Allocatable)
		default:
			err = fmt.Errorf("item %s has no source", i.Path)
		}
		if err != nil {
			return nil, err
		}
		out[path.Clean(i.Path)] = volumeutil.FileProjection{Data: []byte(value), Mode: defaultMode(m)}
	}
	return out, nil
}

// writeFiles shows the payload in dir, all at once, with the group's permissions set before anyone sees it.
func writeFiles(dir string, vol *corev1.Volume, files payload, group *int64, _ *slog.Logger) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if vol.ConfigMap == nil {
		// Secrets, tokens and what is beside them stay off the disk.
		if err := tmpfs(dir, 0); err != nil {
			return err
		}
	}
	// Containers of any user walk through it (kubelet: perm 0777 of the wrapped emptyDir).
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	w, err := volumeutil.NewAtomicWriter(dir, vol.Name)
	if err != nil {
		return err
	}
	perms := func(string) error { return nil }
	if group != nil {
		if err := own(dir, *group); err != nil {
			return err
		}
		perms = func(sub string) error {
			return filepath.WalkDir(filepath.Join(dir, sub), func(p string, _ fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				return own(p, *group)
			})
		}
	}
	return w.Write(files, perms)
}

// own gives a file or directory of a read-only volume to the pod's group (kubelet: volume_linux.go, roMask and execMask).
func own(p string, group int64) error {
	st, err := os.Lstat(p)
	if err != nil {
		return err
	}
	if err := os.Lchown(p, -1, int(group)); err != nil {
		return err
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		return nil
	}
	mode := st.Mode() | 0o440
	if st.IsDir() {
		mode |= fs.ModeSetgid | 0o110
	}
	return os.Chmod(p, mode)
}
