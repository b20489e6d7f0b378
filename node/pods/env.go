// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	"k8s.io/kubernetes/pkg/fieldpath"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

// errConfig marks what the pod's author must mend: status says CreateContainerConfigError.
var errConfig = errors.New("CreateContainerConfigError")

// lookup is what variables may come from.
type lookup struct {
	configMap   func(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error)
	secret      func(ctx context.Context, namespace, name string) (*corev1.Secret, error)
	envFile     func(volume, path, key string) (string, error)
	services    func(namespace string) ([]*corev1.Service, error)
	allocatable corev1.ResourceList
	podIPs      []string
	hostIPs     []string
}

// variables are the environment of a container, each name once, in the order in which they were first set.
type variables struct {
	order []string
	value map[string]string
}

func (e *variables) set(name, value string) {
	if _, ok := e.value[name]; !ok {
		e.order = append(e.order, name)
	}
	e.value[name] = value
}

func (e *variables) list() []string {
	out := make([]string, 0, len(e.order))
	for _, n := range e.order {
		out = append(out, n+"="+e.value[n])
	}
	return out
}

// environment builds a container's variables: services, then envFrom, then env, later ones winning.
func environment(ctx context.Context, pod *corev1.Pod, c *corev1.Container, l lookup) (*variables, error) {
	env := &variables{value: map[string]string{}}
	services, err := serviceVariables(pod, l)
	if err != nil {
		return nil, err
	}
	for _, s := range services {
		env.set(s.Name, s.Value)
	}
	for i := range c.EnvFrom {
		if err := envFrom(ctx, pod, &c.EnvFrom[i], l, env); err != nil {
			return nil, err
		}
	}
	mapping := expansion.MappingFuncFor(env.value)
	for i := range c.Env {
		e := &c.Env[i]
		if e.ValueFrom == nil {
			env.set(e.Name, expansion.Expand(e.Value, mapping))
			continue
		}
		value, ok, err := valueFrom(ctx, pod, c, e.ValueFrom, l)
		if err != nil {
			return nil, err
		}
		if ok {
			env.set(e.Name, value)
		}
	}
	return env, nil
}

// serviceVariables are those of the pod's namespace, if it wants them, and always those of the API server.
func serviceVariables(pod *corev1.Pod, l lookup) ([]corev1.EnvVar, error) {
	if l.services == nil {
		return nil, nil
	}
	pick := map[string]*corev1.Service{}
	add := func(namespace string, want func(*corev1.Service) bool) error {
		list, err := l.services(namespace)
		if err != nil {
			return fmt.Errorf("list services of namespace %s for the environment of pod %s/%s: %w", namespace, pod.Namespace, pod.Name, err)
		}
		for _, s := range list {
			if s.Spec.ClusterIP != "" && s.Spec.ClusterIP != corev1.ClusterIPNone && len(s.Spec.Ports) > 0 && want(s) {
				pick[s.Name] = s
			}
		}
		return nil
	}
	if err := add(corev1.NamespaceDefault, func(s *corev1.Service) bool { return s.Name == "kubernetes" }); err != nil {
		return nil, err
	}
	if pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks {
		if err := add(pod.Namespace, func(*corev1.Service) bool { return true }); err != nil {
			return nil, err
		}
	}
	list := make([]*corev1.Service, 0, len(pick))
	for _, s := range pick {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *corev1.Service) int { return cmp.Compare(a.Name, b.Name) })
	return envvars.FromServices(list), nil
}

func envFrom(ctx context.Context, pod *corev1.Pod, from *corev1.EnvFromSource, l lookup, env *variables) error {
	data := map[string]string{}
	switch {
	case from.ConfigMapRef != nil:
		cm, err := l.configMap(ctx, pod.Namespace, from.ConfigMapRef.Name)
		if err != nil {
			return missing(err, from.ConfigMapRef.Optional)
		}
		data = cm.Data
	case from.SecretRef != nil:
		s, err := l.secret(ctx, pod.Namespace, from.SecretRef.Name)
		if err != nil {
			return missing(err, from.SecretRef.Optional)
		}
		for k, v := range s.Data {
			data[k] = string(v)
		}
	}
	keys := make([]string, 0, len(data))
	for k := range data {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		env.set(from.Prefix+k, data[k])
	}
	return nil
}

func missing(err error, optional *bool) error {
	if optional != nil && *optional && apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("%w: %w", errConfig, err)
}

func valueFrom(ctx context.Context, pod *corev1.Pod, c *corev1.Container, from *corev1.EnvVarSource, l lookup) (value string, ok bool, err error) {
	switch {
	case from.FieldRef != nil:
		value, err := fieldValue(pod, from.FieldRef.FieldPath, l)
		if err != nil {
			return "", false, fmt.Errorf("%w: %w", errConfig, err)
		}
		return value, true, nil
	case from.ResourceFieldRef != nil:
		value, err := resourceValue(pod, c, from.ResourceFieldRef, l.allocatable)
		if err != nil {
			return "", false, fmt.Errorf("%w: %w", errConfig, err)
		}
		return value, true, nil
	case from.ConfigMapKeyRef != nil:
		r := from.ConfigMapKeyRef
		cm, err := l.configMap(ctx, pod.Namespace, r.Name)
		if err != nil {
			return "", false, missing(err, r.Optional)
		}
		value, ok := cm.Data[r.Key]
		if !ok && (r.Optional == nil || !*r.Optional) {
			return "", false, fmt.Errorf("%w: couldn't find key %v in ConfigMap %v/%v", errConfig, r.Key, pod.Namespace, r.Name)
		}
		return value, ok, nil
	case from.SecretKeyRef != nil:
		r := from.SecretKeyRef
		s, err := l.secret(ctx, pod.Namespace, r.Name)
		if err != nil {
			return "", false, missing(err, r.Optional)
		}
		value, ok := s.Data[r.Key]
		if !ok && (r.Optional == nil || !*r.Optional) {
			return "", false, fmt.Errorf("%w: couldn't find key %v in Secret %v/%v", errConfig, r.Key, pod.Namespace, r.Name)
		}
		return string(value), ok, nil
	case from.FileKeyRef != nil:
		r := from.FileKeyRef
		optional := r.Optional != nil && *r.Optional
		value, err := l.envFile(r.VolumeName, r.Path, r.Key)
		if optional && errors.Is(err, fs.ErrNotExist) {
			return "", false, nil
		}
		if err != nil {
			return "", false, fmt.Errorf("%w: %w", errConfig, err)
		}
		if value == "" && !optional {
			return "", false, fmt.Errorf("%w: environment variable key %q not found in file %q", errConfig, r.Key, r.Path)
		}
		return value, value != "", nil
	default:
		return "", false, fmt.Errorf("%w: a source of variables that this node does not support (pod %s/%s, container %s)", errConfig, pod.Namespace, pod.Name, c.Name)
	}
}

// fieldValue reads a field of the pod, also those that only the node knows.
func fieldValue(pod *corev1.Pod, path string, l lookup) (string, error) {
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	switch path {
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(l.hostIPs), nil
	case "status.hostIPs":
		return join(l.hostIPs), nil
	case "status.podIP":
		return first(l.podIPs), nil
	case "status.podIPs":
		return join(l.podIPs), nil
	}
	return fieldpath.ExtractFieldPathAsString(pod, path)
}

func join(list []string) string {
	out := ""
	for i, s := range list {
		if i > 0 {
			out += ","
		}
		out += s
	}
	return out
}

// resourceValue reads a request or limit; what has no limit has the node's allocatable.
func resourceValue(pod *corev1.Pod, c *corev1.Container, ref *corev1.ResourceFieldSelector, allocatable corev1.ResourceList) (string, error) {
	if ref.ContainerName != "" && ref.ContainerName != c.Name {
		return resource.ExtractResourceValueByContainerNameAndNodeAllocatable(ref, pod, ref.ContainerName, allocatable)
	}
	full := c.DeepCopy()
	resource.MergeContainerResourceLimits(full, allocatable)
	return resource.ExtractContainerResourceValue(ref, full)
}

// expand replaces $(NAME) in a command line.
func expand(list []string, env *variables) []string {
	if list == nil {
		return nil
	}
	mapping := expansion.MappingFuncFor(env.value)
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = expansion.Expand(s, mapping)
	}
	return out
}
