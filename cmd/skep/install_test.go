// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// installed lists what is below a root, without directories.
func installed(t *testing.T, root string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			files = append(files, strings.TrimPrefix(path, root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// shim puts a stand-in for the shim beside the test's binary, as an archive has it.
func shim(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(filepath.Dir(self), "containerd-shim-runc-v2")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

func agentFlags(t *testing.T, args ...string) *pflag.FlagSet {
	t.Helper()
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	(&agentOptions{}).addFlags(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return flags
}

func TestInstallAndUninstall(t *testing.T) {
	shim(t)
	p := places{root: t.TempDir(), bin: "/usr/local/bin"}
	if err := install(t.Context(), p, "agent", agentFlags(t, "--server=https://a", "--token=secret", "--node-ip=192.0.2.1,2001:db8::1"), true, io.Discard); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"/etc/skep/agent.yaml", "/etc/systemd/system/multi-user.target.wants/skep-agent.service", "/etc/systemd/system/skep-agent.service",
		"/usr/local/bin/containerd-shim-runc-v2", "/usr/local/bin/skep",
	}
	if got := installed(t, p.root); !slices.Equal(got, want) {
		t.Errorf("installed %q", got)
	}
	if info, err := os.Stat(p.config("agent")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file with the token: %v, %v", info.Mode(), err)
	}
	// What was written is what the agent reads.
	flags := agentFlags(t)
	if err := loadConfig(p.config("agent"), flags); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"server": "https://a", "token": "secret", "node-ip": "[192.0.2.1,2001:db8::1]"} {
		if got := flags.Lookup(name).Value.String(); got != value {
			t.Errorf("%s is %s", name, got)
		}
	}
	before, err := os.ReadFile(p.config("agent"))
	if err != nil {
		t.Fatal(err)
	}
	// An upgrade keeps the configuration.
	if err := install(t.Context(), p, "agent", agentFlags(t), true, io.Discard); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(p.config("agent")); err != nil || string(after) != string(before) {
		t.Errorf("the configuration changed: %s, %v", after, err)
	}
	if err := install(t.Context(), p, "server", pflag.NewFlagSet("", 0), true, io.Discard); err == nil || !strings.Contains(err.Error(), "skep uninstall") {
		t.Errorf("a second role: %v", err)
	}
	if err := uninstall(t.Context(), p, io.Discard); err != nil {
		t.Fatal(err)
	}
	if got := installed(t, p.root); len(got) > 0 {
		t.Errorf("left over: %q", got)
	}
	if err := uninstall(t.Context(), p, io.Discard); err != nil {
		t.Errorf("again: %v", err)
	}
}

// Without the shim nothing is installed that could start.
func TestInstallNeedsTheShim(t *testing.T) {
	p := places{root: t.TempDir(), bin: "/usr/local/bin"}
	err := install(t.Context(), p, "server", pflag.NewFlagSet("", 0), true, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "belong together") {
		t.Error(err)
	}
	if _, err := os.Stat(p.unit("server")); err == nil {
		t.Error("there is a unit")
	}
}

// systemd reads the units without a word of complaint.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must not skip: ", err)
		}
		t.Skip("no systemd-analyze on this host: apt-get install systemd")
	}
	for _, role := range roles {
		path := filepath.Join(t.TempDir(), "skep-"+role+".service")
		if err := os.WriteFile(path, []byte(unitFile(role, "/bin/true")), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", path).CombinedOutput()
		if err != nil || strings.Contains(string(out), "skep-"+role) {
			t.Errorf("%v: %s", err, out)
		}
	}
}
