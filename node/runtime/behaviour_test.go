// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"skep.io/skep/node/sandbox/cgroup"
)

func ptr[T any](v T) *T { return &v }

// TestProcess runs containers to their end and looks at what their process saw.
func TestProcess(t *testing.T) {
	n := newNode(t)
	volume := filepath.Join(n.dir, "volume")
	if err := os.MkdirAll(volume, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(volume, "file"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		args   []string
		change func(*ContainerSpec)
		code   int32
		want   []string
	}{
		{"exit", []string{"exit", "3"}, nil, 3, []string{"to stdout", "to stderr"}},
		{"command", nil, func(s *ContainerSpec) { s.Command, s.Args = []string{"/prog", "args"}, []string{"a b", "c"} }, 0, []string{"a b|c"}},
		{"env", []string{"env"}, func(s *ContainerSpec) { s.Env = []string{"OVERRIDDEN=spec", "MINE=1"}; s.Hostname = "host-1" }, 0,
			[]string{"OVERRIDDEN=spec\n", "MINE=1\n", "FROM_IMAGE=yes\n", "PATH=/\n", "HOSTNAME=host-1\n"}},
		{"root", []string{"id"}, nil, 0, []string{"uid 0 gid 0 groups [0] host root dir / pid 1\n"}},
		{"user", []string{"id"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{RunAsUser: ptr[int64](1000)}
			s.PodSecurity = &corev1.PodSecurityContext{FSGroup: ptr[int64](2000), SupplementalGroups: []int64{3000}}
			s.WorkingDir = "/tmp"
		}, 0, []string{"uid 1000 gid 1001 groups [1001 1500 2000 3000] host user dir /tmp pid 1\n"}},
		{"group", []string{"id"}, func(s *ContainerSpec) {
			s.PodSecurity = &corev1.PodSecurityContext{RunAsUser: ptr[int64](7), RunAsGroup: ptr[int64](8)}
		}, 0, []string{"uid 7 gid 8 groups [8]"}},
		{"mount", []string{"cat", "/data/file"}, func(s *ContainerSpec) {
			s.Mounts = []Mount{{HostPath: volume, ContainerPath: "/data"}}
		}, 0, []string{"from the host\n"}},
		{"readonly-mount", []string{"touch", "/data/new"}, func(s *ContainerSpec) {
			s.Mounts = []Mount{{HostPath: volume, ContainerPath: "/data", ReadOnly: true}}
		}, 1, []string{"read-only file system"}},
		{"readonly-root", []string{"touch", "/new"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{ReadOnlyRootFilesystem: ptr(true)}
		}, 1, []string{"read-only file system"}},
		{"writable-root", []string{"touch", "/new"}, nil, 0, nil},
		{"network", []string{"addrs"}, nil, 0, []string{"127.0.0.1/8", "10.42.9.", "fd73:6b65:7042:9:"}},
		{"capabilities", []string{"cat", "/proc/self/status"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{AllowPrivilegeEscalation: ptr(false), Capabilities: &corev1.Capabilities{
				Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_BIND_SERVICE"}}}
		}, 0, []string{"CapEff:\t0000000000000400\n", "NoNewPrivs:\t1\n", "Seccomp:\t0\n"}},
		{"seccomp", []string{"cat", "/proc/self/status"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
		}, 0, []string{"Seccomp:\t2\n"}},
		{"privileged", []string{"touch", "/sys/fs/cgroup"}, func(s *ContainerSpec) {
			s.Security = &corev1.SecurityContext{Privileged: ptr(true)}
		}, 1, []string{"is a directory"}},
		{"oom-score", []string{"cat", "/proc/self/oom_score_adj"}, func(s *ContainerSpec) { s.OOMScoreAdj = -997 }, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := n.spec(c.name, c.args...)
			if c.change != nil {
				c.change(&spec)
			}
			ended := n.exited(n.run(spec))
			log := readLog(t, spec.LogPath, "")
			if ended.ExitCode != c.code || ended.OOMKilled || ended.Reason != "" {
				t.Errorf("ended with %+v; log %q", ended, log)
			}
			for _, want := range c.want {
				if !strings.Contains(log, want) {
					t.Errorf("log %q lacks %q", log, want)
				}
			}
		})
	}
}

// TestCannotStart looks at what users get told when a container cannot be started.
func TestCannotStart(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	for _, c := range []struct {
		name   string
		change func(*ContainerSpec)
		want   string
	}{
		{"no-command", func(s *ContainerSpec) { s.Command = []string{"nonsense"} }, `exec: "nonsense": executable file not found in $PATH`},
		{"no-file", func(s *ContainerSpec) { s.Command = []string{"/none"} }, `exec: "/none": stat /none: no such file or directory`},
		{"no-mount", func(s *ContainerSpec) { s.Mounts = []Mount{{HostPath: "/does/not/exist", ContainerPath: "/x"}} }, "/does/not/exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := n.spec(c.name)
			c.change(&spec)
			id, err := n.Create(ctx, spec)
			if err != nil {
				t.Fatal(err)
			}
			err = n.Start(ctx, id)
			if !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Start: %v", err)
			}
			if k := n.container(id); k.State != Exited || k.ExitCode != 128 || k.Reason != "StartError" || !strings.Contains(k.Message, c.want) {
				t.Errorf("container %+v", k)
			}
		})
	}
	spec := n.spec("no-user")
	spec.Security = nil
	spec.ImageID = "sha256:none"
	if _, err := n.Create(ctx, spec); !errors.Is(err, ErrImageNotFound) {
		t.Errorf("unknown image: %v", err)
	}
}

// TestNotReady: a process does not run before what its container waits for is there, and may be started later.
func TestNotReady(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.spec("wait", "sleep", "1h")
	missing := errors.New("no network yet")
	spec.Ready = func(context.Context) error { return missing }
	id, err := n.Create(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Start(ctx, id); !errors.Is(err, ErrNotReady) || !errors.Is(err, missing) {
			t.Fatalf("Start: %v", err)
		}
		c := n.container(id)
		if pids, err := cgroup.Processes(c.Cgroup); c.State != Created || len(pids) != 0 || err != nil {
			t.Fatalf("%s with processes %v, %v", c.State, pids, err)
		}
	}
	missing = nil
	if err := n.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	if c := n.container(id); c.State != Running {
		t.Errorf("%+v", c)
	}
	if err := n.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
}

func TestMemoryLimit(t *testing.T) {
	n := newNode(t)
	spec := n.spec("eater", "eat")
	spec.Resources = corev1.ResourceRequirements{Limits: corev1.ResourceList{
		corev1.ResourceMemory: resource.MustParse("20Mi"), corev1.ResourceCPU: resource.MustParse("500m"),
	}}
	c := n.exited(n.run(spec))
	if !c.OOMKilled || c.Reason != "OOMKilled" || c.ExitCode != 137 {
		t.Errorf("ended with %+v", c)
	}
}

// TestCgroups: the process is in its container's own group in every hierarchy, under the pod's, with the limits.
func TestCgroups(t *testing.T) {
	n := newNode(t)
	spec := n.spec("limited")
	spec.Resources = corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("250m")},
		Limits:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
	}
	id := n.run(spec)
	c := n.container(id)
	all, err := cgroup.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		data, err := os.ReadFile(filepath.Join(h.Path(c.Cgroup), "cgroup.procs"))
		if err != nil || !slices.Contains(strings.Fields(string(data)), fmt.Sprint(c.PID)) {
			t.Errorf("%+v: %q, %v", h, data, err)
		}
		for file, want := range map[string]string{"cpu.shares": "256", "cpu.cfs_quota_us": "50000", "memory.limit_in_bytes": "67108864"} {
			if data, err := os.ReadFile(filepath.Join(h.Path(c.Cgroup), file)); err == nil && strings.TrimSpace(string(data)) != want {
				t.Errorf("%s is %s", file, data)
			}
		}
	}
	used, err := cgroup.Read(c.Cgroup)
	if err != nil || used.CPUNanos == 0 || used.WorkingSet == 0 || used.MemoryLimit != 64<<20 {
		t.Errorf("statistics %+v, %v", used, err)
	}
}

// TestTwoInOnePod: containers of a pod share a shim and its namespaces; one restarts alone.
func TestTwoInOnePod(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	a, b := n.spec("pair", "serve", "8080"), n.spec("pair", "wait")
	b.Name, b.LogPath = "second", filepath.Join(n.dir, "logs", "pair", "second.log")
	first, second := n.run(a), n.run(b)
	n.logs(a, "listening")
	if left := processes(n.dir); len(left) != 1 {
		t.Errorf("shims: %v", left)
	}
	if err := n.Stop(ctx, first, 0); err != nil {
		t.Fatal(err)
	}
	if c := n.container(first); c.ExitCode != 137 {
		t.Errorf("killed: %+v", c)
	}
	if err := n.Remove(ctx, first); err != nil {
		t.Fatal(err)
	}
	a.Attempt, a.LogPath = 1, a.LogPath+".1"
	third := n.run(a)
	n.logs(a, "listening")
	if c := n.container(second); c.State != Running {
		t.Errorf("neighbour: %+v", c)
	}
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- n.PortForward(ctx, "pair", 8080, there) }()
	if _, err := here.Write([]byte("you\n")); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(here).ReadString('\n')
	if err != nil || line != "hello you\n" {
		t.Errorf("forwarded %q, %v", line, err)
	}
	here.Close()
	if err := <-done; err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	refused, there2 := net.Pipe()
	defer refused.Close()
	if err := n.PortForward(ctx, "pair", 9, there2); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("closed port: %v", err)
	}
	list, err := n.ListPod(ctx, "pair")
	if err != nil || len(list) != 2 || list[1].ID != third || list[1].Attempt != 1 {
		t.Errorf("pod has %+v, %v", list, err)
	}
}

// TestRestartAtOnce starts the next attempt as soon as the last one is known to have ended, when its shim may just
// be ending too.
func TestRestartAtOnce(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.spec("again", "exit", "1")
	for i := range 15 {
		spec.Attempt = i
		id := n.run(spec)
		c := n.lookup(id)
		<-c.done
		if k := n.container(id); k.ExitCode != 1 || k.Attempt != i {
			t.Fatalf("attempt %d: %+v", i, k)
		}
		if err := n.Remove(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
}

// TestShimKilled: a container whose shim dies is known to have ended, not how.
func TestShimKilled(t *testing.T) {
	n := newNode(t)
	spec := n.spec("orphan")
	id := n.run(spec)
	n.logs(spec, "ready")
	pids, err := shimPids(filepath.Join(n.dir, "run", "containerd"))
	if err != nil || len(pids) != 1 {
		t.Fatalf("shims %v, %v", pids, err)
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if c := n.exited(id); c.Reason != "ContainerStatusUnknown" || c.ExitCode != 137 {
		t.Errorf("ended with %+v", c)
	}
	left, err := cgroup.Processes(n.cgroupRoot())
	if err != nil || len(left) != 0 {
		t.Errorf("processes left: %v, %v", left, err)
	}
	spec.Attempt, spec.LogPath = 1, spec.LogPath+".1"
	n.run(spec)
	n.logs(spec, "ready")
}

func TestStopStubborn(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.spec("stubborn", "stubborn")
	id := n.run(spec)
	n.logs(spec, "ready")
	start := time.Now()
	if err := n.Stop(ctx, id, 300*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if time.Since(start) < 300*time.Millisecond {
		t.Error("grace was cut short")
	}
	if c := n.container(id); c.State != Exited || c.ExitCode != 137 {
		t.Errorf("stopped: %+v", c)
	}
	if err := n.Stop(ctx, id, time.Second); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestExits(t *testing.T) {
	n := newNode(t)
	id := n.run(n.spec("brief", "exit", "0"))
	deadline := time.After(10 * time.Second)
	for {
		select {
		case uid := <-n.Exits():
			if uid != "brief" {
				t.Fatalf("exit of %s", uid)
			}
			if n.container(id).State == Exited {
				return
			}
		case <-deadline:
			t.Fatal("no exit told")
		}
	}
}

func TestExecSessions(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.spec("sessions")
	id := n.run(spec)
	n.logs(spec, "ready")
	var out bytes.Buffer
	code, err := n.Exec(ctx, id, []string{"/prog", "copy"}, Streams{In: strings.NewReader("through\n"), Out: &out})
	if err != nil || code != 0 || out.String() != "through\n" {
		t.Errorf("stdin: %d, %v, %q", code, err, out.String())
	}
	out.Reset()
	sizes := make(chan Size, 1)
	sizes <- Size{Width: 99, Height: 33}
	code, err = n.Exec(ctx, id, []string{"/prog", "exit", "5"}, Streams{Out: &out, TTY: true, Resize: sizes})
	if err != nil || code != 5 || !strings.Contains(out.String(), "to stdout\r\n") || !strings.Contains(out.String(), "to stderr\r\n") {
		t.Errorf("terminal: %d, %v, %q", code, err, out.String())
	}
	_, _, _, err = n.ExecSync(ctx, id, []string{"/prog", "sleep", "1h"}, 200*time.Millisecond)
	if !errors.Is(err, ErrTimeout) {
		t.Errorf("timeout: %v", err)
	}
	eventually(t, "the timed out process is gone", func() error {
		pids, err := cgroup.Processes(n.container(id).Cgroup)
		if err != nil || len(pids) != 1 {
			return fmt.Errorf("%v, %w", pids, err)
		}
		return nil
	})
	_, _, _, err = n.ExecSync(ctx, id, []string{"nonsense"}, time.Minute)
	if !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), "executable file not found in $PATH") {
		t.Errorf("missing command: %v", err)
	}
	if _, _, _, err := n.ExecSync(ctx, "nobody", []string{"x"}, 0); !errors.Is(err, ErrContainerNotFound) {
		t.Errorf("unknown container: %v", err)
	}
	if err := n.Stop(ctx, id, time.Second); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := n.ExecSync(ctx, id, []string{"x"}, 0); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stopped container: %v", err)
	}
}

func TestAttach(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	for _, tty := range []bool{false, true} {
		name := fmt.Sprintf("attach-%v", tty)
		spec := n.spec(name, "echo")
		spec.Stdin, spec.StdinOnce, spec.TTY = true, true, tty
		id := n.run(spec)
		in, typed := io.Pipe()
		shown, out := io.Pipe()
		done := make(chan error, 1)
		go func() { err := n.Attach(ctx, id, Streams{In: in, Out: out, TTY: tty}); out.Close(); done <- err }()
		lines := bufio.NewScanner(shown)
		for _, word := range []string{"one", "two"} {
			if _, err := fmt.Fprintln(typed, word); err != nil {
				t.Fatal(err)
			}
			for lines.Scan() && strings.TrimSpace(lines.Text()) != "echo "+word {
				if !tty {
					t.Errorf("shown %q", lines.Text())
				}
			}
		}
		if tty {
			if _, err := typed.Write([]byte{4}); err != nil { // end of input, as a terminal says it
				t.Fatal(err)
			}
		}
		typed.Close()
		rest := ""
		for lines.Scan() {
			rest += lines.Text()
		}
		if !strings.Contains(rest, "end of input") {
			t.Errorf("at the end: %q", rest)
		}
		if err := <-done; err != nil {
			t.Errorf("attach: %v", err)
		}
		if c := n.exited(id); c.ExitCode != 0 {
			t.Errorf("ended with %+v", c)
		}
		n.logs(spec, "echo two")
	}
}

// TestManyLines writes more than a log file holds and finds all of it in the files.
func TestManyLines(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	n.Runtime.cfg.LogSize = 64 << 10
	spec := n.spec("lines", "lines", "5000")
	id := n.run(spec)
	n.logs(spec, "line 4999\n")
	if err := n.Stop(ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(spec.LogPath + ".*")
	if len(files) == 0 {
		t.Error("nothing was rotated")
	}
	if err := n.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(spec.LogPath + "*"); len(left) != 0 {
		t.Errorf("logs left: %v", left)
	}
}

// TestUpdate: a running container gets other limits, and keeps them in its record; fewer than it uses it does not get.
func TestUpdate(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	limits := func(cpu, memory string) corev1.ResourceRequirements {
		return corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}}
	}
	spec := n.spec("resized")
	spec.Resources = limits("500m", "64Mi")
	id := n.run(spec)
	if err := n.Update(ctx, id, limits("1", "128Mi")); err != nil {
		t.Fatal(err)
	}
	c := n.container(id)
	if used, err := cgroup.Read(c.Cgroup); err != nil || used.MemoryLimit != 128<<20 {
		t.Errorf("statistics %+v, %v", used, err)
	}
	if c.State != Running || c.Resources.Limits.Cpu().Value() != 1 {
		t.Errorf("%+v", c)
	}
	if err := n.Update(ctx, id, limits("1", "4Ki")); !errors.Is(err, cgroup.ErrInUse) {
		t.Errorf("less than it uses: %v", err)
	}
	if c := n.container(id); c.State != Running || c.Resources.Limits.Memory().Value() != 128<<20 {
		t.Errorf("after a refusal: %+v", c)
	}
	if err := n.Stop(ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if err := n.Update(ctx, id, limits("1", "256Mi")); !errors.Is(err, ErrNotRunning) {
		t.Errorf("one that has ended: %v", err)
	}
}
