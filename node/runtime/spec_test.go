// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"pgregory.net/rapid"

	"skep.io/skep/node/sandbox"
)

func TestArguments(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"default"}}
	for _, c := range []struct{ command, args, want []string }{
		{nil, nil, []string{"/entry", "default"}},
		{nil, []string{"a"}, []string{"/entry", "a"}},
		{[]string{"c"}, nil, []string{"c"}},
		{[]string{"c"}, []string{"a"}, []string{"c", "a"}},
	} {
		got, err := arguments(ContainerSpec{Command: c.command, Args: c.args}, image)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v %v: %v, %v", c.command, c.args, got, err)
		}
	}
	if _, err := arguments(ContainerSpec{}, ocispec.ImageConfig{}); !errors.Is(err, ErrStart) {
		t.Errorf("no command: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	box := &sandbox.Sandbox{NetNS: "/n", IPCNS: "/i", UTSNS: "/u"}
	own := []specs.LinuxNamespace{{Type: "mount"}}
	for name, c := range map[string]struct {
		spec ContainerSpec
		host hostFacts
		want []specs.LinuxNamespace
	}{
		"pod": {ContainerSpec{Sandbox: box}, hostFacts{}, append(slices.Clone(own), specs.LinuxNamespace{Type: "pid"},
			specs.LinuxNamespace{Type: "network", Path: "/n"}, specs.LinuxNamespace{Type: "ipc", Path: "/i"}, specs.LinuxNamespace{Type: "uts", Path: "/u"})},
		"host network, host PID": {ContainerSpec{Sandbox: &sandbox.Sandbox{IPCNS: "/i"}, HostPID: true}, hostFacts{unified: true},
			append(slices.Clone(own), specs.LinuxNamespace{Type: "cgroup"}, specs.LinuxNamespace{Type: "ipc", Path: "/i"})},
		"shared PID": {ContainerSpec{TargetPID: 7}, hostFacts{}, append(slices.Clone(own), specs.LinuxNamespace{Type: "pid", Path: "/proc/7/ns/pid"})},
	} {
		if diff := cmp.Diff(c.want, namespacesOf(c.spec, c.host)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestResources(t *testing.T) {
	list := func(kv ...string) corev1.ResourceList {
		l := corev1.ResourceList{}
		for i := 0; i < len(kv); i += 2 {
			l[corev1.ResourceName(kv[i])] = resource.MustParse(kv[i+1])
		}
		return l
	}
	got := resources(corev1.ResourceRequirements{Limits: list("cpu", "1500m", "memory", "1Gi", "hugepages-2Mi", "4Mi")}, hostFacts{unified: true, swapLimit: true, hugetlb: true})
	want := &specs.LinuxResources{
		CPU:            &specs.LinuxCPU{Shares: ptr[uint64](1536), Quota: ptr[int64](150000), Period: ptr[uint64](100000)},
		Memory:         &specs.LinuxMemory{Limit: ptr[int64](1 << 30), Swap: ptr[int64](1 << 30)},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := resources(corev1.ResourceRequirements{}, hostFacts{}); *got.CPU.Shares != minShares || got.CPU.Quota != nil || got.Memory != nil {
		t.Errorf("nothing asked: %+v", got)
	}
}

func TestCapabilities(t *testing.T) {
	for name, c := range map[string]struct {
		add, drop []corev1.Capability
		want      []string
	}{
		"drop all, add one": {[]corev1.Capability{"net_bind_service"}, []corev1.Capability{"ALL"}, []string{"CAP_NET_BIND_SERVICE"}},
		"drop all":          {nil, []corev1.Capability{"ALL"}, nil},
		"drop one":          {nil, []corev1.Capability{"CAP_MKNOD"}, slices.DeleteFunc(defaultCapabilities(), func(c string) bool { return c == "CAP_MKNOD" })},
		"add one":           {[]corev1.Capability{"SYS_TIME"}, nil, append(defaultCapabilities(), "CAP_SYS_TIME")},
	} {
		got := capabilities(&corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: c.add, Drop: c.drop}}, false, true)
		if !slices.Equal(got.Bounding, c.want) {
			t.Errorf("%s: %v", name, got.Bounding)
		}
	}
	if c := capabilities(&corev1.SecurityContext{}, false, false); len(c.Effective) != 0 || len(c.Bounding) == 0 {
		t.Errorf("not root: %+v", c)
	}
}

// TestEnvironment: each name once, and the last one wins.
func TestEnvironment(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries := rapid.SliceOf(rapid.StringMatching(`(A|B|PATH|HOSTNAME)=[xy]{0,2}`))
		image, mine := entries.Draw(t, "image"), entries.Draw(t, "container")
		want := map[string]string{}
		for _, e := range slices.Concat(image, mine) {
			name, value, _ := cut(e)
			want[name] = value
		}
		seen := map[string]bool{}
		for _, e := range environment(ContainerSpec{Env: mine, Hostname: "h"}, image) {
			name, value, _ := cut(e)
			if seen[name] {
				t.Fatalf("%s twice", name)
			}
			seen[name] = true
			if w, ok := want[name]; ok && w != value {
				t.Fatalf("%s is %q, want %q", name, value, w)
			}
		}
		if !seen["PATH"] || !seen["HOSTNAME"] {
			t.Fatal("PATH or HOSTNAME is missing")
		}
	})
}

func cut(e string) (name, value string, ok bool) {
	for i := range e {
		if e[i] == '=' {
			return e[:i], e[i+1:], true
		}
	}
	return e, "", false
}

func FuzzUsers(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n", "wheel:x:10:root\n", "root:wheel")
	f.Fuzz(func(t *testing.T, passwd, group, who string) {
		db, err := parseUserDB([]byte(passwd), []byte(group))
		if err != nil {
			return
		}
		_, _, _ = db.lookup(who)
	})
}
