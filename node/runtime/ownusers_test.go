// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// ownSpec is spec for a pod with user ids of its own.
func (n *node) ownSpec(pod string, args ...string) ContainerSpec {
	n.t.Helper()
	sp := n.sandboxSpec(pod)
	sp.OwnUsers = true
	box, err := n.sandboxes.Create(context.Background(), sp)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.sandboxes.Attached(context.Background(), box.PodUID); err != nil {
		n.t.Fatal(err)
	}
	return n.containerSpec(pod, box, args...)
}

// TestOwnUsers looks at what the processes of pods see that are root only to themselves: every file that is root's, or a
// user's, on the host is so for them.
func TestOwnUsers(t *testing.T) {
	n := newNode(t)
	volume, memory, one := filepath.Join(n.dir, "volume"), filepath.Join(n.dir, "memory"), filepath.Join(n.dir, "one")
	for _, d := range []string{volume, memory} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// As the node mounts secrets: the container may not undo the flags.
	if err := unix.Mount("tmpfs", memory, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(memory, unix.MNT_DETACH) })
	for path, owner := range map[string]int{filepath.Join(volume, "bees"): 1000, filepath.Join(memory, "secret"): 0, one: 0} {
		if err := os.WriteFile(path, []byte("honey\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	mounts := []Mount{
		{HostPath: volume, ContainerPath: "/volume"},
		{HostPath: memory, ContainerPath: "/memory", ReadOnly: true, Recursive: true},
		{HostPath: memory, ContainerPath: "/half", ReadOnly: true},
		{HostPath: one, ContainerPath: "/etc/one", Propagation: corev1.MountPropagationHostToContainer},
	}
	for _, c := range []struct {
		name   string
		args   []string
		change func(*ContainerSpec)
		code   int32
		want   []string
	}{
		{"ids", []string{"cat", "/proc/self/uid_map", "/proc/self/gid_map"}, nil, 0, nil},
		{"root", []string{"id"}, nil, 0, []string{"uid 0 gid 0 groups [0] host root dir / pid 1\n"}},
		{"user", []string{"id"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](1000)}
			s.PodSecurity = &corev1.PodSecurityContext{FSGroup: ptr[int64](2000)}
		}, 0, []string{"uid 1000 gid 1001 groups [1001 1500 2000] host user"}},
		{"owners", []string{"owner", "/prog", "/etc/passwd", "/volume", "/volume/bees", "/memory/secret", "/etc/one", "/dev/shm"}, nil, 0,
			[]string{"/prog 0 0", "/etc/passwd 0 0", "/volume 0 0", "/volume/bees 1000 1000", "/memory/secret 0 0", "/etc/one 0 0", "/dev/shm 0 0"}},
		{"read", []string{"cat", "/memory/secret", "/half/secret", "/etc/one"}, nil, 0, []string{"honey\nhoney\nhoney\n"}},
		{"read-as-user", []string{"cat", "/volume/bees"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](1000)}
		}, 0, []string{"honey\n"}},
		{"read-what-is-roots", []string{"cat", "/memory/secret"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](1000)}
		}, 1, []string{"permission denied"}},
		{"write", []string{"touch", "/volume/new"}, nil, 0, nil},
		{"write-file", []string{"touch", "/etc/one"}, nil, 0, nil},
		{"write-read-only", []string{"touch", "/memory/new"}, nil, 1, []string{"read-only file system"}},
		{"write-half-read-only", []string{"touch", "/half/new"}, nil, 1, []string{"read-only file system"}},
		{"write-root", []string{"touch", "/new"}, nil, 0, nil},
		{"write-shared-memory", []string{"touch", "/dev/shm/new"}, nil, 0, nil},
		{"standard-output", []string{"touch", "/proc/self/fd/1"}, nil, 0, []string{"x"}},
		{"standard-output-of-user", []string{"touch", "/proc/self/fd/2"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](1000)}
		}, 0, []string{"x"}},
		{"terminal", []string{"id"}, func(s *ContainerSpec) { s.TTY = true }, 0, []string{"uid 0"}},
		{"sysctl", []string{"cat", "/proc/sys/kernel/shm_rmid_forced"}, func(s *ContainerSpec) {
			s.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"}
		}, 0, []string{"1\n"}},
		{"network", []string{"addrs"}, nil, 0, []string{"127.0.0.1/8", "10.42.9.", "fd73:6b65:7042:9:"}},
		{"seccomp", []string{"cat", "/proc/self/status"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}, AllowPrivilegeEscalation: ptr(false)}
		}, 0, []string{"Seccomp:\t2\n", "NoNewPrivs:\t1\n"}},
		{"privileged", []string{"owner", "/prog", "/sys"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{Privileged: ptr(true)}
		}, 0, []string{"/prog 0 0"}},
		{"unmasked", []string{"cat", "/proc/sys/kernel/shm_rmid_forced"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{ProcMount: ptr(corev1.UnmaskedProcMount)}
		}, 0, []string{"0\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := n.ownSpec(c.name, c.args...)
			spec.Mounts = mounts
			if c.change != nil {
				c.change(&spec)
			}
			ended := n.exited(n.run(spec))
			log := readLog(t, spec.LogPath, "")
			if ended.ExitCode != c.code || ended.OOMKilled || ended.Reason != "" {
				t.Errorf("ended with %+v; log %q", ended, log)
			}
			if c.name == "ids" {
				want := []string{"0", strconv.FormatUint(uint64(spec.Sandbox.FirstID), 10), "65536"}
				c.want = []string{strings.Join(append(want, want...), " ")}
				log = strings.Join(strings.Fields(log), " ")
			}
			for _, want := range c.want {
				if !strings.Contains(log, want) {
					t.Errorf("log %q lacks %q", log, want)
				}
			}
		})
	}
	if st, err := os.Stat(filepath.Join(volume, "new")); err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("a file of the pod's root: %v, %v", st, err)
	}
}

// Containers of a pod share its ids, and its processes if it wants that; for the host they are nobody. Nothing is left
// mounted, and an agent that starts anew finds them.
func TestOwnUsersTogether(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	first := n.ownSpec("pair", "wait")
	pause := ContainerSpec{PodUID: "pair", PodNamespace: "default", PodName: "pair", Name: PauseName, Sandbox: first.Sandbox, CgroupParent: first.CgroupParent}
	holder := n.run(pause)
	first.TargetPID = n.container(holder).PID
	first.Mounts = []Mount{{HostPath: n.dir, ContainerPath: "/data"}}
	id := n.run(first)
	n.logs(first, "ready")
	st, err := os.Stat("/proc/" + strconv.FormatUint(uint64(n.container(id).PID), 10))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != first.Sandbox.FirstID {
		t.Errorf("the process is of %+v, %v, want %d", st, err, first.Sandbox.FirstID)
	}
	out, _, code, err := n.ExecSync(ctx, id, []string{"/prog", "id"}, 0)
	if err != nil || code != 0 || !strings.Contains(string(out), "uid 0 gid 0") {
		t.Errorf("exec: %q, %d, %v", out, code, err)
	}
	if left, err := os.ReadDir(n.mappedRoot()); err == nil && len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
	// As after kill -9 in the middle of a start.
	stray := filepath.Join(n.mappedRoot(), "stray", "0")
	if err := os.MkdirAll(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(n.dir, stray, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Runtime.Close(); err != nil {
		t.Fatal(err)
	}
	n.open()
	if _, err := os.Stat(n.mappedRoot()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stray mounts: %v", err)
	}
	second := n.ownSpec("pair", "id")
	second.Name, second.LogPath, second.TargetPID = "second", filepath.Join(n.dir, "logs", "pair", "second.log"), first.TargetPID
	ended := n.exited(n.run(second))
	if ended.ExitCode != 0 || second.Sandbox.FirstID != first.Sandbox.FirstID {
		t.Errorf("second container: %+v", ended)
	}
	if c := n.container(id); c.State != Running {
		t.Errorf("first container: %+v", c)
	}
	// As the pod's worker does: whoever holds the processes goes last, or takes the others with it.
	for _, c := range []string{id, ended.ID, holder} {
		if err := n.Remove(ctx, c); err != nil {
			t.Error(err)
		}
	}
}

// What such a pod cannot have is said by name, and nothing is left of the attempt.
func TestOwnUsersCannot(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.ownSpec("beyond", "id")
	spec.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](70000)}
	if _, err := n.Create(ctx, spec); !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), "id 70000, but with hostUsers: false") {
		t.Errorf("a user beyond the range: %v", err)
	}
	spec = n.ownSpec("unmappable", "id")
	spec.Mounts = []Mount{{HostPath: "/proc/self", ContainerPath: "/data", Volume: "self"}}
	id, err := n.Create(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx, id); !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), `volume "self": the files of /proc/self cannot`) || !strings.Contains(err.Error(), "files on proc") {
		t.Errorf("files that have no owners: %v", err)
	}
	if left, err := os.ReadDir(n.mappedRoot()); err == nil && len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
	if err := n.Remove(ctx, id); err != nil {
		t.Error(err)
	}
}
