// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/leaks"
	"skep.io/skep/tests/tools"
)

func TestMain(m *testing.M) {
	cluster.Helper()
	os.Exit(m.Run())
}

// standIn behaves as a server in what the harness sees of it: it ends on SIGTERM and has a child
// that outlives its death, as a shim does.
var standIn = []string{"/bin/sh", "-c", `(sleep 1000 & echo $! > /run/child); trap 'kill $(cat /run/child); rm /run/child; exit 0' TERM; echo serving; while :; do sleep 0.02; done`}

func start(t *testing.T, o cluster.Options) *cluster.Node {
	t.Helper()
	o.Name = strings.ToLower(fmt.Sprintf("harness-%d-%s", os.Getpid(), t.Name()[len("Test"):]))
	o.Dir, o.Server = t.TempDir(), standIn
	n, err := cluster.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Discard(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, out, &stderr)
	}
	return string(out)
}

// await polls a condition that a stand-in brings about.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain for ", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestMachineIsItsOwn(t *testing.T) {
	ctx := t.Context()
	n := start(t, cluster.Options{})
	if got := strings.TrimSpace(output(t, n.Exec(ctx, "hostname"))); got != n.Name {
		t.Errorf("host name %q, want %q", got, n.Name)
	}
	if got := output(t, n.Exec(ctx, "ip", "route", "show", "default")); got != "" {
		t.Errorf("the node has a way out: %s", got)
	}
	if got := output(t, n.Outside(ctx, "ip", "route", "show", "default")); got != "" {
		t.Errorf("the client has a way out: %s", got)
	}
	for line := range strings.Lines(output(t, n.Exec(ctx, "cat", "/proc/self/cgroup"))) {
		path := strings.SplitN(strings.TrimSpace(line), ":", 3)[2]
		if path != "/" && path != "/harness" {
			t.Errorf("the node sees its cgroup as %s", path)
		}
	}
	for line := range strings.Lines(output(t, n.Exec(ctx, "cat", "/proc/self/mountinfo"))) {
		if fields := strings.Fields(line); strings.Contains(line, " - cgroup") && fields[3] != "/" {
			t.Errorf("the node's cgroup mount does not show its root: %s", line)
		}
	}
	if got := strings.Fields(output(t, n.Exec(ctx, "ls", "/sys/class/net"))); !slices.Equal(got, []string{"eth0", "lo"}) {
		t.Errorf("devices: %q", got)
	}
	output(t, n.Exec(ctx, "sh", "-ec", "! ls /run/skep /etc/skep /sys/fs/bpf/skep 2>&1; ! ls -A /var/lib/skep | grep .; touch /etc/skep-was-here /var/lib/skep/data-was-here"))
	if _, err := os.Stat("/etc/skep-was-here"); err == nil {
		t.Error("the node wrote to the machine's /etc")
	}
	if _, err := os.Stat(n.Dir + "/data/data-was-here"); err != nil {
		t.Error("the node's data is not in its directory: ", err)
	}
	if err := os.Remove(n.Dir + "/data/data-was-here"); err != nil {
		t.Error(err)
	}
	for _, addr := range n.Client() {
		output(t, n.Tool(ctx, "dial", "-until", "refused", net.JoinHostPort(addr.String(), "1")))
	}
	if err := n.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func TestOrphansOutliveTheServer(t *testing.T) {
	ctx := t.Context()
	n := start(t, cluster.Options{})
	await(t, "the child", func() bool {
		raw, err := os.ReadFile(n.Path("/run/child"))
		return err == nil && bytes.HasSuffix(raw, []byte("\n"))
	})
	raw, err := os.ReadFile(n.Path("/run/child"))
	if err != nil {
		t.Fatal(err)
	}
	first := n.ServerPid()
	if err := n.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(first, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the killed server is still there: %v", err)
	}
	child := strings.TrimSpace(string(raw))
	status, err := os.ReadFile("/proc/" + child + "/status")
	if err != nil {
		t.Fatal("the child died with its server: ", err)
	}
	if want := fmt.Sprintf("PPid:\t%d\n", n.Pid()); !strings.Contains(string(status), want) {
		t.Errorf("the orphan is not init's:\n%s", status)
	}
	found, err := n.Leaks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(found, "\n"), "process "+child+" sleep 1000") {
		t.Errorf("the orphan is no leak: %q", found)
	}
	err = n.Stop(ctx)
	if !errors.Is(err, cluster.ErrLeak) || !strings.Contains(err.Error(), "process "+child) {
		t.Errorf("Stop did not name the orphan: %v", err)
	}
	if _, err := os.Stat("/proc/" + child); err == nil {
		t.Error("the orphan outlived the node")
	}
}

func TestPlantedLeaksAreFound(t *testing.T) {
	ctx := t.Context()
	n := start(t, cluster.Options{})
	plants := []struct{ plant, want string }{
		{"ip link add planted type bridge", "link planted (bridge)"},
		{"ip addr add 198.51.100.1/32 dev lo", "address 198.51.100.1/32 on lo"},
		{"ip route add unreachable 198.51.100.128/25", "route table 254 type 7 198.51.100.128/25"},
		{"ip -6 route add unreachable fd00:dead::/64", "route table 254 type 7 fd00:dead::/64"},
		{"ip rule add from 198.51.100.2 lookup 100", "rule family 2"},
		{"ip neigh add 198.51.100.3 lladdr 02:00:00:00:00:01 dev eth0 nud permanent", "neighbour 198.51.100.3 02:00:00:00:00:01"},
		{"ip netns add planted", "namespace /run/netns/planted (nsfs)"},
		{"mkdir /run/planted && mount -t tmpfs planted /run/planted", "mount /run/planted (tmpfs)"},
		{"mkdir -p /sys/fs/bpf/skep/planted", "pinned bpf object /sys/fs/bpf/skep/planted"},
		{"iptables -t nat -N PLANTED", "iptables table nat :PLANTED -"},
		{"ip6tables -A FORWARD -j ACCEPT", "ip6tables table filter -A FORWARD -j ACCEPT"},
		{"tc qdisc add dev eth0 clsact", "qdisc clsact on eth0"},
		{"mkdir $(dirname $(find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs | head -1))/planted", "cgroup /sys/fs/cgroup/"},
		{"mkdir -p /etc/skep && touch /etc/skep/kubeconfig", "file /etc/skep/kubeconfig"},
		{"mkdir -p /var/lib/skep/etcd", "file /var/lib/skep/etcd"},
		{"mkdir -p /run/skep && touch /run/skep/lock", "file /run/skep/lock"},
	}
	for _, p := range plants {
		output(t, n.Exec(ctx, "sh", "-ec", p.plant))
	}
	found, err := n.Leaks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(found, "\n")
	for _, p := range plants {
		if !strings.Contains(all, p.want) {
			t.Errorf("%q left %q, not found in\n%s", p.plant, p.want, all)
		}
	}
}

func TestServerThatEnds(t *testing.T) {
	dir := t.TempDir()
	n, err := cluster.Start(t.Context(), cluster.Options{
		Name: fmt.Sprintf("harness-%d-ends", os.Getpid()), Dir: dir,
		Server: []string{"/bin/sh", "-c", "echo no such key; exit 3"},
	})
	if err != nil {
		t.Fatal(err)
	}
	err = n.WaitReady(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("waiting for a server that ends: %v", err)
	}
	if err := n.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTools(t *testing.T) {
	ctx := t.Context()
	before, err := leaks.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	n := start(t, cluster.Options{})
	serve := n.LAN.Tool(ctx, "serve", "[::]:8080")
	hold, err := serve.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	client, node := n.Client(), n.Addrs
	for i, url := range []string{fmt.Sprintf("http://%s:8080/", client[0]), fmt.Sprintf("http://[%s]:8080/", client[1])} {
		got := output(t, n.Tool(ctx, "http", "-until", "you are "+node[i].String(), url))
		if !strings.Contains(got, "200 OK") {
			t.Errorf("answer: %s", got)
		}
	}
	got := output(t, n.Tool(ctx, "dial", "-until", "refused", node[0].String()+":1"))
	if !strings.Contains(got, "connection refused") {
		t.Errorf("dial: %s", got)
	}

	load := n.Tool(ctx, "load", "-kept", "2", "-new", "1", fmt.Sprintf("http://%s:8080/", client[0]))
	stop, err := load.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := load.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, ready); err != nil || string(ready) != "ready\n" {
		t.Fatalf("load said %q, %v", ready, err)
	}
	_ = stop.Close()
	var report tools.LoadReport
	if err := json.NewDecoder(out).Decode(&report); err != nil {
		t.Fatal(err)
	}
	_ = load.Wait()
	if report.Failed != 0 || report.Requests < 3 || report.Connections < 3 {
		t.Errorf("report: %+v", report)
	}
	_ = hold.Close()
	_ = serve.Wait()
	if err := n.Stop(ctx); err != nil {
		t.Error(err)
	}
	after, err := leaks.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	if leaked := leaks.New(before, after); len(leaked) > 0 {
		t.Errorf("the harness keeps descriptors open: %q", leaked)
	}
}

// TestLoadNotices checks the judge: a load whose server goes away must say so.
func TestLoadNotices(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	n := start(t, cluster.Options{})
	serve := n.LAN.Tool(ctx, "serve", "[::]:8080")
	if _, err := serve.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("http://%s:8080/", n.Client()[0])
	output(t, n.Tool(ctx, "http", "-until", "you are", url))
	load := n.Tool(ctx, "load", "-kept", "1", "-new", "1", url)
	stop, err := load.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := load.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(pipe)
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("load said %q, %v", line, err)
	}
	_ = serve.Process.Kill()
	_ = serve.Wait()
	// Refused from now on: this dial has the same fate as the load's next one.
	output(t, n.Tool(ctx, "dial", "-until", "refused", n.Client()[0].String()+":8080"))
	_ = stop.Close()
	var report tools.LoadReport
	if err := json.NewDecoder(out).Decode(&report); err != nil {
		t.Fatal(err)
	}
	_ = load.Wait()
	if report.Failed < 2 { // the kept connection, and the new one
		t.Errorf("the load noticed too little: %+v", report)
	}
	if err := n.Stop(ctx); err != nil {
		t.Error(err)
	}
}
