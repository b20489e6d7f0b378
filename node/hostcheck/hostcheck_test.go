// SPDX-License-Identifier: Apache-2.0

package hostcheck

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// hybrid is mountinfo of a host with controllers on version 1 and an empty version 2 hierarchy.
const hybrid = `31 25 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 25 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 25 0:28 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
34 25 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`

func fakeHost(t *testing.T, files map[string]string) Host {
	t.Helper()
	root := t.TempDir()
	all := map[string]string{
		"proc/self/mountinfo":                     hybrid,
		"proc/filesystems":                        "nodev\tsysfs\nnodev\toverlay\n\text4\n",
		"proc/sys/net/ipv6/conf/all/disable_ipv6": "0\n",
		"proc/self/status":                        "Name:\tskep\nCapEff:\t000001ffffffffff\n",
	}
	for path, content := range files {
		all[path] = content
	}
	for path, content := range all {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Host{
		Root:       root,
		LookPath:   func(name string) (string, error) { return "/usr/sbin/" + name, nil },
		ProbeBPF:   func(BPFFeature) error { return nil },
		KernelName: func() (string, error) { return "6.1.0-13-amd64", nil },
		OwnUsers:   func() error { return nil },
		XDP:        func() (string, error) { return "", nil },
	}
}

func TestCompleteHost(t *testing.T) {
	for _, r := range Run(fakeHost(t, nil)) {
		if r.Outcome != OK || r.Detail == "" || r.Remedy != "" {
			t.Errorf("%+v, want ok with a detail and no remedy", r)
		}
	}
}

func TestWhatIsLacking(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		edit  func(*Host)
		check string
		want  Outcome
		says  string
	}{
		{"not root", nil, func(h *Host) { h.EUID = 1000 }, "user", Missing, "sudo"},
		{"old kernel", nil, func(h *Host) { h.KernelName = func() (string, error) { return "5.17.0", nil } }, "kernel", Missing, "5.18"},
		{"no cgroups", map[string]string{"proc/self/mountinfo": ""}, nil, "cgroup controllers", Missing, "cpu, memory, pids"},
		{"no cgroup2", map[string]string{"proc/self/mountinfo": strings.Split(hybrid, "34 ")[0]}, nil, "cgroup v2 hierarchy", Missing, "mount -t cgroup2"},
		{"v2 without memory", map[string]string{
			"proc/self/mountinfo":              "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/cgroup.controllers": "cpu io pids\n",
		}, nil, "cgroup controllers", Missing, "memory"},
		{"pure v2", map[string]string{
			"proc/self/mountinfo":              "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
		}, nil, "cgroup controllers", OK, "cpu"},
		{"no runc", nil, func(h *Host) { h.LookPath = func(string) (string, error) { return "", os.ErrNotExist } }, "runc", Missing, "apt-get install runc"},
		{"no overlay", map[string]string{"proc/filesystems": "\text4\n"}, nil, "overlay file system", Reduced, "copied"},
		{"no IPv6", map[string]string{"proc/sys/net/ipv6/conf/all/disable_ipv6": "1\n"}, nil, "IPv6", Reduced, "IPv4 addresses only"},
		{"no CAP_SYS_RESOURCE", map[string]string{"proc/self/status": "CapEff:\t000001fffeffffff\n"}, nil, "raising resource limits", Reduced, "clamped"},
		{"no user namespaces", nil, func(h *Host) { h.OwnUsers = func() error { return errors.New("the sysctl is 0") } }, "user namespaces", Reduced, "hostUsers: false do not start: the sysctl is 0"},
		{"no XDP", nil, func(h *Host) {
			h.ProbeBPF = func(f BPFFeature) error {
				if f.Program == ebpf.XDP {
					return ebpf.ErrNotSupported
				}
				return nil
			}
		}, "eBPF at the driver (XDP)", Reduced, "traffic control"},
		{"XDP that nobody uses", nil, nil, "eBPF at the driver (XDP)", OK, "not used"},
		{"XDP", nil, func(h *Host) { h.XDP = func() (string, error) { return "eth0 (native)", nil } }, "eBPF at the driver (XDP)", OK, "used on eth0 (native)"},
		{"no BPF", nil, func(h *Host) { h.ProbeBPF = func(BPFFeature) error { return errors.New("operation not permitted") } },
			"eBPF socket hooks", Missing, "operation not permitted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := fakeHost(t, c.files)
			if c.edit != nil {
				c.edit(&h)
			}
			results := Run(h)
			for _, r := range results {
				if r.Name != c.check {
					continue
				}
				if r.Outcome != c.want || !strings.Contains(r.Detail+r.Remedy, c.says) {
					t.Errorf("%+v, want %s saying %q", r, c.want, c.says)
				}
				if err := Err(results); (err != nil) != (c.want == Missing) {
					t.Errorf("Err() = %v with outcome %s", err, c.want)
				}
				return
			}
			t.Errorf("no check named %q in %+v", c.check, results)
		})
	}
}
