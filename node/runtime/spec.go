// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// groupAnnotation makes containers of one pod share a shim.
const groupAnnotation = "io.containerd.runc.v2.group"

// specInput is all that a container's OCI spec is made of.
type specInput struct {
	id     string
	spec   ContainerSpec
	image  ocispec.ImageConfig
	users  userDB // of the image's root file system
	host   hostFacts
	seccom func(spec *specs.Spec, profile *corev1.SeccompProfile) (*specs.LinuxSeccomp, error)
	lookup func(path string) (*specs.LinuxDevice, error)                  // of a device of the host
	device func() ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) // of the host, for privileged containers
}

// buildSpec decides everything about the container's process and surroundings.
func buildSpec(in specInput) (*specs.Spec, error) {
	c := in.spec
	sec := c.Security
	if sec == nil {
		sec = &corev1.SecurityContext{}
	}
	args, err := arguments(c, in.image)
	if err != nil {
		return nil, err
	}
	user, err := resolveUser(sec, c.PodSecurity, in.image.User, in.users)
	if err != nil {
		return nil, err
	}
	privileged := sec.Privileged != nil && *sec.Privileged
	s := &specs.Spec{
		Version:     "1.0.2",
		Root:        &specs.Root{Path: "rootfs", Readonly: sec.ReadOnlyRootFilesystem != nil && *sec.ReadOnlyRootFilesystem},
		Annotations: map[string]string{groupAnnotation: string(c.PodUID)},
		Process: &specs.Process{
			Terminal:        c.TTY,
			User:            user,
			Args:            args,
			Env:             environment(c, in.image.Env),
			Cwd:             workingDir(c, in.image),
			Capabilities:    capabilities(sec, privileged, user.UID == 0),
			NoNewPrivileges: sec.AllowPrivilegeEscalation != nil && !*sec.AllowPrivilegeEscalation && !privileged,
		},
		Linux: &specs.Linux{
			Namespaces:  namespacesOf(c, in.host),
			CgroupsPath: path.Join("/", c.CgroupParent, in.id),
			Resources:   resources(c.Resources, in.host),
		},
	}
	if c.Sandbox != nil && c.Sandbox.UserNS != "" {
		if err := ownUsers(s, c); err != nil {
			return nil, err
		}
	}
	score := max(int64(c.OOMScoreAdj), in.host.oomFloor)
	adj := int(score)
	s.Process.OOMScoreAdj = &adj
	mounts, propagation, err := mountsOf(c, privileged)
	if err != nil {
		return nil, err
	}
	s.Mounts, s.Linux.RootfsPropagation = mounts, propagation
	if privileged {
		devices, rules, err := in.device()
		if err != nil {
			return nil, err
		}
		s.Linux.Devices = devices
		s.Linux.Resources.Devices = append([]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, rules...)
	} else {
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
		if sec.ProcMount == nil || *sec.ProcMount != corev1.UnmaskedProcMount {
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = maskedPaths(), readonlyPaths()
		}
		if in.seccom != nil {
			if s.Linux.Seccomp, err = in.seccom(s, seccompOf(sec, c.PodSecurity)); err != nil {
				return nil, err
			}
		}
	}
	return s, addDevices(s, c.Devices, in.lookup)
}

// addDevices lets the container use devices of the host. They come last: the rule that counts is the last that fits.
func addDevices(s *specs.Spec, devices []Device, lookup func(path string) (*specs.LinuxDevice, error)) error {
	for _, d := range devices {
		dev, err := lookup(d.HostPath)
		if err != nil {
			return fmt.Errorf("device %s: %w", d.HostPath, err)
		}
		if dev.Type != "b" {
			return fmt.Errorf("device %s is not a block device", d.HostPath)
		}
		access := "rwm"
		if d.ReadOnly {
			access = "r"
		}
		dev.Path = d.ContainerPath
		s.Linux.Devices = append(s.Linux.Devices, *dev)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: access})
	}
	return nil
}

// arguments follows Kubernetes' table: a command replaces entrypoint and arguments of the image.
func arguments(c ContainerSpec, image ocispec.ImageConfig) ([]string, error) {
	var args []string
	switch {
	case len(c.Command) > 0:
		args = slices.Concat(c.Command, c.Args)
	case len(c.Args) > 0:
		args = slices.Concat(image.Entrypoint, c.Args)
	default:
		args = slices.Concat(image.Entrypoint, image.Cmd)
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("%w: no command specified: neither the container nor image %s has one", ErrStart, c.Image)
	}
	return args, nil
}

func workingDir(c ContainerSpec, image ocispec.ImageConfig) string {
	for _, d := range []string{c.WorkingDir, image.WorkingDir} {
		if d != "" {
			return path.Join("/", d)
		}
	}
	return "/"
}

// environment lets the container's variables override the image's, each name once, last one wins.
func environment(c ContainerSpec, image []string) []string {
	base := []string{}
	if c.Hostname != "" {
		base = append(base, "HOSTNAME="+c.Hostname)
	}
	if c.TTY {
		base = append(base, "TERM=xterm")
	}
	if !slices.ContainsFunc(image, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		base = append(base, defaultPath)
	}
	var env []string
	at := map[string]int{}
	for _, e := range slices.Concat(base, image, c.Env) {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := at[name]; ok {
			env[i] = e
			continue
		}
		at[name] = len(env)
		env = append(env, e)
	}
	return env
}

// namespacesOf joins the sandbox's namespaces. A kind that is not listed is the host's.
func namespacesOf(c ContainerSpec, host hostFacts) []specs.LinuxNamespace {
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	if host.unified {
		ns = append(ns, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	switch {
	case c.TargetPID != 0:
		ns = append(ns, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: fmt.Sprintf("/proc/%d/ns/pid", c.TargetPID)})
	case !c.HostPID:
		ns = append(ns, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if c.Sandbox == nil {
		return ns
	}
	for _, j := range []struct {
		kind specs.LinuxNamespaceType
		path string
	}{{specs.UserNamespace, c.Sandbox.UserNS}, {specs.NetworkNamespace, c.Sandbox.NetNS}, {specs.IPCNamespace, c.Sandbox.IPCNS}, {specs.UTSNamespace, c.Sandbox.UTSNS}} {
		if j.path != "" {
			ns = append(ns, specs.LinuxNamespace{Type: j.kind, Path: j.path})
		}
	}
	return ns
}

// mountsOf are the standard ones, less those that the container mounts itself, and the container's,
// parents before children.
func mountsOf(c ContainerSpec, privileged bool) (mounts []specs.Mount, rootPropagation string, err error) {
	access := "ro"
	if privileged {
		access = "rw"
	}
	shm := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}
	switch {
	case c.Sandbox == nil:
	case c.Sandbox.ShmPath != "":
		shm = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: c.Sandbox.ShmPath, Options: []string{"rbind", "nosuid", "noexec", "nodev", "rw"}}
	case c.Sandbox.IPCNS == "":
		shm = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "nosuid", "noexec", "nodev", "rw"}}
	}
	all := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		shm,
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", access}},
	}
	own := map[string]bool{}
	for _, m := range c.Mounts {
		own[path.Join("/", m.ContainerPath)] = true
	}
	for _, m := range all {
		if !own[m.Destination] {
			mounts = append(mounts, m)
		}
	}
	rootPropagation = "private"
	var mine []specs.Mount
	for i, m := range c.Mounts {
		if m.ContainerPath == "" || m.HostPath == "" {
			return nil, "", errors.New("a mount needs a path on the host and one in the container")
		}
		options := []string{"rbind"}
		switch m.Propagation {
		case corev1.MountPropagationBidirectional:
			options = append(options, "rshared")
			rootPropagation = "shared"
		case corev1.MountPropagationHostToContainer:
			options = append(options, "rslave")
			if rootPropagation == "private" {
				rootPropagation = "slave"
			}
		default:
			options = append(options, "rprivate")
		}
		switch {
		case m.ReadOnly && m.Recursive:
			options = append(options, "rro")
		case m.ReadOnly:
			options = append(options, "ro")
		default:
			options = append(options, "rw")
		}
		if c.lockedFlags != nil {
			options = append(options, c.lockedFlags[i]...)
		}
		mine = append(mine, specs.Mount{Destination: path.Join("/", m.ContainerPath), Type: "bind", Source: m.HostPath, Options: options})
	}
	slices.SortStableFunc(mine, func(a, b specs.Mount) int {
		return strings.Count(path.Clean(a.Destination), "/") - strings.Count(path.Clean(b.Destination), "/")
	})
	return append(mounts, mine...), rootPropagation, nil
}

func maskedPaths() []string {
	return []string{"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi"}
}

func readonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}
