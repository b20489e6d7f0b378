// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	kubeqos "k8s.io/kubernetes/pkg/kubelet/qos"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
)

// CgroupRoot is the cgroup of all pods, relative to each hierarchy's root.
const CgroupRoot = "kubepods"

// cgroupParent is the cgroup of a pod, where kubelet's cgroupfs driver puts it.
func cgroupParent(pod *corev1.Pod) string {
	leaf := "pod" + string(pod.UID)
	switch qos.GetPodQOS(pod) {
	case corev1.PodQOSBurstable:
		return filepath.Join(CgroupRoot, "burstable", leaf)
	case corev1.PodQOSBestEffort:
		return filepath.Join(CgroupRoot, "besteffort", leaf)
	default:
		return filepath.Join(CgroupRoot, leaf)
	}
}

func (s *Set) sandboxSpec(pod *corev1.Pod) sandbox.Spec {
	spec := sandbox.Spec{
		PodUID: pod.UID, Namespace: pod.Namespace, Name: pod.Name,
		HostNetwork: pod.Spec.HostNetwork, HostIPC: pod.Spec.HostIPC, CgroupParent: cgroupParent(pod),
		CgroupLimits: podLimits(pod, s.cfg.Terms.PodPids),
	}
	if !pod.Spec.HostNetwork {
		name, domain := hostname(pod, s.cfg.ClusterDomain)
		if pod.Spec.SetHostnameAsFQDN != nil && *pod.Spec.SetHostnameAsFQDN && domain != "" {
			name += "." + domain
		}
		spec.Hostname = name
	}
	if sc := pod.Spec.SecurityContext; sc != nil && len(sc.Sysctls) > 0 {
		spec.Sysctls = map[string]string{}
		for _, c := range sc.Sysctls {
			spec.Sysctls[c.Name] = c.Value
		}
	}
	spec.OwnUsers = ownUsers(pod)
	return spec
}

// names are the pod's host name and domain; on the host's network they are the host's.
func (s *Set) names(pod *corev1.Pod) (name, domain string, err error) {
	if !pod.Spec.HostNetwork {
		name, domain = hostname(pod, s.cfg.ClusterDomain)
		return name, domain, nil
	}
	name, err = os.Hostname()
	if err != nil {
		return "", "", fmt.Errorf("host name: %w", err)
	}
	return name, "", nil
}

// containerSpec puts together everything that one attempt of a container is made from.
func (s *Set) containerSpec(ctx context.Context, pod *corev1.Pod, c *corev1.Container, box *sandbox.Sandbox, img runtime.Image, a Action) (runtime.ContainerSpec, error) {
	podIPs := addressesOf(box.Addrs)
	if pod.Spec.HostNetwork {
		podIPs = addressesOf(s.cfg.NodeIPs)
	}
	env, err := environment(ctx, pod, c, lookup{
		configMap: s.cfg.Objects.ConfigMap, secret: s.cfg.Objects.Secret,
		envFile: func(volume, path, key string) (string, error) { return s.cfg.Volumes.EnvFile(pod, volume, path, key) },
		services: func(namespace string) ([]*corev1.Service, error) {
			return s.cfg.Services(namespace, !IsStatic(pod)) // a static pod needs no API server
		},
		allocatable: s.cfg.Allocatable, podIPs: podIPs, hostIPs: addressesOf(s.cfg.NodeIPs),
	})
	if err != nil {
		return runtime.ContainerSpec{}, err
	}
	if err := mayRun(pod, c, img); err != nil {
		return runtime.ContainerSpec{}, err
	}
	name, _, err := s.names(pod)
	if err != nil {
		return runtime.ContainerSpec{}, err
	}
	mounts, err := s.cfg.Volumes.ContainerMounts(pod, c, func(in string) string { return expand([]string{in}, env)[0] })
	if err != nil {
		return runtime.ContainerSpec{}, fmt.Errorf("%w: %w", errConfig, err)
	}
	devices, err := s.cfg.Volumes.ContainerDevices(pod, c)
	if err != nil {
		return runtime.ContainerSpec{}, fmt.Errorf("%w: %w", errConfig, err)
	}
	spec := runtime.ContainerSpec{
		Devices: devices,
		PodUID:  pod.UID, PodNamespace: pod.Namespace, PodName: pod.Name, Name: c.Name, Attempt: a.Attempt,
		ImageID: img.ID, Image: c.Image,
		Command: expand(c.Command, env), Args: expand(c.Args, env), WorkingDir: c.WorkingDir, Env: env.list(),
		Sandbox: box, HostPID: pod.Spec.HostPID, TargetPID: a.TargetPID, Hostname: name, CgroupParent: cgroupParent(pod),
		Resources: c.Resources, OOMScoreAdj: kubeqos.GetContainerOOMScoreAdjust(pod, c, s.cfg.MemoryCapacity),
		Security: c.SecurityContext, PodSecurity: pod.Spec.SecurityContext,
		TTY: c.TTY, Stdin: c.Stdin, StdinOnce: c.StdinOnce,
		LogPath: s.files.log(pod, c.Name, a.Attempt),
		Annotations: map[string]string{
			annotationImage: c.Image, annotationDelay: a.Delay.String(), annotationBoot: s.cfg.BootID,
		},
	}
	if ownUsers(pod) {
		spec.Sysctls = s.sandboxSpec(pod).Sysctls
	}
	spec.Mounts, err = s.ownMounts(pod, c, mounts, a.Attempt)
	if err != nil {
		return runtime.ContainerSpec{}, err
	}
	if err := os.MkdirAll(filepath.Dir(spec.LogPath), 0o755); err != nil {
		return runtime.ContainerSpec{}, fmt.Errorf("log directory of container %s: %w", c.Name, err)
	}
	return spec, nil
}

// ownMounts adds the node's files to the volumes of a container, where no volume is already.
func (s *Set) ownMounts(pod *corev1.Pod, c *corev1.Container, mounts []runtime.Mount, attempt int) ([]runtime.Mount, error) {
	taken := map[string]bool{}
	for _, m := range mounts {
		taken[filepath.Clean(m.ContainerPath)] = true
	}
	readOnly := c.SecurityContext != nil && c.SecurityContext.ReadOnlyRootFilesystem != nil && *c.SecurityContext.ReadOnlyRootFilesystem
	for _, name := range []string{"hosts", "resolv.conf", "hostname"} {
		if at := "/etc/" + name; !taken[at] {
			mounts = append(mounts, runtime.Mount{HostPath: s.files.etc(pod.UID, name), ContainerPath: at, ReadOnly: readOnly})
		}
	}
	if c.TerminationMessagePath != "" {
		path := s.files.termination(pod.UID, c.Name, attempt)
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			return nil, fmt.Errorf("termination message of container %s: %w", c.Name, err)
		}
		// Whoever the container runs as must be able to write it.
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o666)
		if err != nil {
			return nil, fmt.Errorf("termination message of container %s: %w", c.Name, err)
		}
		if err := f.Chmod(0o666); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("termination message of container %s: %w", c.Name, err)
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("termination message of container %s: %w", c.Name, err)
		}
		mounts = append(mounts, runtime.Mount{HostPath: path, ContainerPath: c.TerminationMessagePath})
	}
	return mounts, nil
}

// mayRun checks runAsNonRoot against the user that the pod or the image names.
func mayRun(pod *corev1.Pod, c *corev1.Container, img runtime.Image) error {
	var nonRoot *bool
	var user *int64
	if sc := pod.Spec.SecurityContext; sc != nil {
		nonRoot, user = sc.RunAsNonRoot, sc.RunAsUser
	}
	if sc := c.SecurityContext; sc != nil {
		if sc.RunAsNonRoot != nil {
			nonRoot = sc.RunAsNonRoot
		}
		if sc.RunAsUser != nil {
			user = sc.RunAsUser
		}
	}
	if nonRoot == nil || !*nonRoot {
		return nil
	}
	if user != nil {
		if *user == 0 {
			return fmt.Errorf("%w: container's runAsUser breaks non-root policy (pod: %q, container: %s)", errConfig, pod.Namespace+"/"+pod.Name, c.Name)
		}
		return nil
	}
	name, _, _ := strings.Cut(img.User, ":")
	id, err := strconv.ParseInt(name, 10, 64)
	switch {
	case name == "" || err == nil && id == 0:
		return fmt.Errorf("%w: container has runAsNonRoot and image will run as root (pod: %q, container: %s)", errConfig, pod.Namespace+"/"+pod.Name, c.Name)
	case err != nil:
		return fmt.Errorf("%w: container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root (pod: %q, container: %s)", errConfig, name, pod.Namespace+"/"+pod.Name, c.Name)
	}
	return nil
}
