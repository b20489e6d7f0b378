// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/tools"
)

// commands are the verbs of scripts, beside skep, kubectl, node and outside, which are programs:
//
//	machine [ARG...]         make a node, start nothing; ARGs go to every start of its server
//	server start|kill|restart|stop|reset|again
//	                         start: and wait until Ready; kill: SIGKILL; stop: SIGTERM; reset: `skep reset`;
//	                         again: start it if it has ended, and wait
//	agent make|start|kill|stop|restart|ready|reset NAME [ARG...]
//	                         make: another machine on the node's LAN, which scripts enter by `on NAME COMMAND...`;
//	                         start: make it if need be, and start `skep agent` with ARGs there; kill: SIGKILL;
//	                         stop: SIGTERM; restart: start it again; ready: wait until its Node is Ready
//	peer make|start|kill|stop|restart|ready|reset NAME [ARG...]
//	                         agent for further servers of the cluster, which join the first
//	writes start             write numbered ConfigMaps through whichever server answers
//	writes go                wait until ten more have been acknowledged
//	writes stop              end it; fails if one that was acknowledged is not there
//	until [-not] PATTERN COMMAND...
//	                         repeat COMMAND until its output matches
//	load start NAME [-from node|outside|pod/NAME] [flags] URL
//	                         requests in the background: see tests/cluster/load.go
//	load stop NAME           end it; fails if any request failed or any kept connection broke
//	killpod NAME             SIGKILL to the process of the pod's container
//	registry [-login USER:PASSWORD] NAME:TAG=ARCHIVE...
//	                         an image registry on the node until the script ends; sets REGISTRY
//	etcd DIRECTORY           an etcd on the node until the script ends: see tests/cluster/etcd.go
//	driver NAME              a CSI driver on the node until the script ends; its volumes are below /srv/e2e-csi
//	disk FILE BYTES LINK     a block device of FILE, to which LINK leads, on the node until the script ends
//	newer VAR                sets VAR to a skep that says it is of Kubernetes v1.38.0
//	snapshot                 remember what is on the node, and how much its server has open
//	steady                   wait until that is so again
//	[!] log PATTERN          the server's log has it, or has it not
//	jsonpath VAR RESOURCE... PATH
//	                         sets VAR to what `skep get RESOURCE... -o jsonpath=PATH` prints
func commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"machine":  machineCommand,
		"server":   serverCommand,
		"agent":    agentCommand,
		"peer":     peerCommand,
		"writes":   writesCommand,
		"until":    untilCommand,
		"load":     loadCommand,
		"jsonpath": jsonpathCommand,
		"killpod":  killpodCommand,
		"registry": registryCommand,
		"driver":   driverCommand,
		"disk":     diskCommand,
		"etcd":     etcdCommand,
		"log":      logCommand,
		"newer":    newerCommand,
		"snapshot": snapshotCommand,
		"steady":   steadyCommand,
	}
}

func state(ts *testscript.TestScript) *script {
	return ts.Value(scriptKey{}).(*script)
}

func positive(ts *testscript.TestScript, neg bool) {
	if neg {
		ts.Fatalf("! makes no sense here")
	}
}

func machineCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	s := state(ts)
	if s.node != nil {
		ts.Fatalf("the script has a node already")
	}
	n, err := s.newNode(args)
	ts.Check(err)
	s.node = n
	s.environment(ts.Setenv)
}

func serverCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) == 0 {
		ts.Fatalf("usage: server start|kill|restart|stop|reset")
	}
	s := state(ts)
	if !s.own {
		ts.Fatalf("only scripts in testdata/own may touch the server")
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	if args[0] == "start" {
		if s.node == nil {
			machineCommand(ts, false, args[1:])
		}
		s.stopped = false
		ts.Check(s.node.Restart(ctx))
		return
	}
	if s.node == nil {
		ts.Fatalf("there is no server yet")
	}
	switch args[0] {
	case "kill":
		s.stopped = true
		ts.Check(s.node.Kill(ctx))
	case "restart":
		s.stopped = false
		ts.Check(s.node.Restart(ctx))
	case "stop":
		s.stopped = true
		ts.Check(s.node.Shutdown(ctx))
	case "reset":
		ts.Check(s.node.Reset(ctx))
	case "again":
		ts.Check(s.node.EnsureReady(ctx))
	default:
		ts.Fatalf("server: unknown %q", args[0])
	}
}

func untilCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	not := len(args) > 0 && args[0] == "-not"
	if not {
		args = args[1:]
	}
	if len(args) < 2 {
		ts.Fatalf("usage: until [-not] PATTERN COMMAND...")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	path, err := exec.LookPath(args[1])
	ts.Check(err)
	deadline := time.Now().Add(stepLimit)
	for {
		// Not ts.Exec, which would log every try.
		ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
		cmd := exec.CommandContext(ctx, path, args[2:]...)
		cmd.Dir, cmd.Env = ts.MkAbs("."), scriptEnv(ts)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		cancel()
		met := (re.Match(stdout.Bytes()) || re.Match(stderr.Bytes())) != not
		if !met && time.Now().Before(deadline) {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		_, _ = stdout.WriteTo(ts.Stdout())
		_, _ = stderr.WriteTo(ts.Stderr())
		if !met {
			ts.Fatalf("after %s: %v", stepLimit, err)
		}
		return
	}
}

// scriptEnv is the part of the script's environment that its programs need.
func scriptEnv(ts *testscript.TestScript) []string {
	var env []string
	for name := range state(ts).agents {
		env = append(env, agentEnv(name)+"="+ts.Getenv(agentEnv(name)))
	}
	for _, key := range []string{"PATH", "WORK", "HOME", "TMPDIR", "LANG", "TERM", "KUBECONFIG", "NS", nodeEnv, outsideEnv, pathEnv, kubectlEnv} {
		if value := ts.Getenv(key); value != "" {
			env = append(env, key+"="+value)
		}
	}
	return env
}

func jsonpathCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) < 3 {
		ts.Fatalf("usage: jsonpath VAR RESOURCE... PATH")
	}
	last := len(args) - 1
	argv := append([]string{"get"}, args[1:last]...)
	ts.Check(ts.Exec("skep", append(argv, "-o", "jsonpath="+args[last])...))
	value := strings.TrimSpace(ts.ReadFile("stdout"))
	if value == "" {
		ts.Fatalf("%s is empty", args[last])
	}
	ts.Setenv(args[0], value)
}

func logCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] log PATTERN")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	raw, err := os.ReadFile(state(ts).node.LogPath())
	ts.Check(err)
	if found := re.Find(raw); (found != nil) == neg {
		ts.Fatalf("the server's log has %q: %v", found, found != nil)
	}
}

// newer is the binary of newerCommand.
var newer = sync.OnceValues(func() (string, error) {
	bin, err := cluster.BuildVersion(context.Background(), filepath.Join("..", "..", ".build", "e2e", "newer"), "newer", "v1.38.0")
	return filepath.Join(bin, "skep"), err
})

func newerCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) != 1 {
		ts.Fatalf("usage: newer VAR")
	}
	path, err := newer()
	ts.Check(err)
	ts.Setenv(args[0], path)
}

func registryCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	s := state(ts)
	for i, arg := range args {
		if ref, archive, ok := strings.Cut(arg, "="); ok {
			args[i] = ref + "=" + filepath.Join(s.node.ImagesDir, archive)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	address := background(cancel, ts, s.node.Tool(ctx, "registry", args...))
	ts.Setenv("REGISTRY", strings.TrimSpace(address))
}

func driverCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) != 1 {
		ts.Fatalf("usage: driver NAME")
	}
	ctx, cancel := context.WithCancel(context.Background())
	background(cancel, ts, state(ts).node.Tool(ctx, "csi", args[0], "/var/lib/skep/plugins_registry", "/srv/e2e-csi"))
}

func diskCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	ctx, cancel := context.WithCancel(context.Background())
	background(cancel, ts, state(ts).node.Tool(ctx, "disk", args...))
}

func etcdCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	ctx, cancel := context.WithCancel(context.Background())
	background(cancel, ts, state(ts).node.Tool(ctx, "etcd", args...))
}

// background runs a command until the script ends, and returns its first line.
func background(cancel context.CancelFunc, ts *testscript.TestScript, cmd *exec.Cmd) (line string) {
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		_, err = cmd.StdinPipe()
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		ts.Check(err)
	}
	ts.Defer(func() {
		cancel()
		_ = cmd.Wait() // killed
	})
	line, err = bufio.NewReader(stdout).ReadString('\n')
	ts.Check(err)
	return line
}

// load is a running load generator.
type load struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	out    *bufio.Reader
	cancel context.CancelFunc
}

func loadCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) < 2 {
		ts.Fatalf("usage: load start NAME ... | load stop NAME")
	}
	s := state(ts)
	name := args[1]
	switch args[0] {
	case "start":
		l, err := s.startLoad(args[2:])
		ts.Check(err)
		if s.loads == nil {
			s.loads = map[string]*load{}
		}
		s.loads[name] = l
	case "stop":
		l := s.loads[name]
		if l == nil {
			ts.Fatalf("no load %s", name)
		}
		delete(s.loads, name)
		report, err := l.stop()
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "%d requests over %d connections, %d failed\n", report.Requests, report.Connections, report.Failed)
		if report.Failed > 0 || report.Requests == 0 {
			ts.Fatalf("load %s: %+v", name, report)
		}
	default:
		ts.Fatalf("load: unknown %q", args[0])
	}
}

func (s *script) startLoad(args []string) (*load, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	from := "node"
	if i := slices.Index(args, "-from"); i >= 0 && i+1 < len(args) {
		from = args[i+1]
		args = slices.Delete(slices.Clone(args), i, i+2)
	}
	var cmd *exec.Cmd
	switch pod, isPod := strings.CutPrefix(from, "pod/"); {
	case from == "node":
		cmd = s.node.Tool(ctx, "load", args...)
	case from == "outside":
		cmd = s.node.LAN.Tool(ctx, "load", args...)
	case isPod:
		uid, err := s.podUID(ctx, pod)
		if err != nil {
			cancel()
			return nil, err
		}
		if cmd, err = s.node.PodTool(ctx, uid, "load", args...); err != nil {
			cancel()
			return nil, err
		}
	default:
		cancel()
		return nil, fmt.Errorf("load: unknown -from %s", from)
	}
	return startLoad(cmd, cancel)
}

// startLoad runs a load generator until its first answers are there.
func startLoad(cmd *exec.Cmd, cancel context.CancelFunc) (*load, error) {
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	l := &load{cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout), cancel: cancel}
	if line, err := l.out.ReadString('\n'); line != "ready\n" {
		cancel()
		_ = cmd.Wait()
		return nil, fmt.Errorf("load did not begin: %q, %w", line, err)
	}
	return l, nil
}

func killpodCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) != 1 {
		ts.Fatalf("usage: killpod NAME")
	}
	s := state(ts)
	uid, err := s.podUID(context.Background(), args[0])
	ts.Check(err)
	ts.Check(s.node.KillPod(uid))
}

func (s *script) podUID(ctx context.Context, name string) (string, error) {
	client, err := s.node.Kubernetes()
	if err != nil {
		return "", err
	}
	pod, err := client.CoreV1().Pods(s.podNamespace()).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return string(pod.UID), nil
}

// podNamespace is where a script's pods are.
func (s *script) podNamespace() string {
	if s.namespace == "" {
		return metav1.NamespaceDefault
	}
	return s.namespace
}

func (l *load) stop() (tools.LoadReport, error) {
	defer l.cancel()
	var report tools.LoadReport
	if err := l.stdin.Close(); err != nil {
		return report, err
	}
	if err := json.NewDecoder(l.out).Decode(&report); err != nil {
		return report, fmt.Errorf("read the load's report: %w", err)
	}
	return report, l.cmd.Wait()
}
