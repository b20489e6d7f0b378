// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKillAndAdopt kills a process with a Runtime in it and finds its containers, running and undisturbed,
// with another: no line of their logs is missing, stdin is still open, and what ended meanwhile is known.
func TestKillAndAdopt(t *testing.T) {
	n, ctx := emptyNode(t), context.Background()
	n.killedAgent()

	logPath := filepath.Join(n.dir, "logs", "tick.log")
	before := strings.Count(readLog(t, logPath, ""), "\n")
	eventually(t, "log grows without an agent", func() error {
		if now := strings.Count(readLog(t, logPath, ""), "\n"); now < before+200 {
			return fmt.Errorf("%d lines, before %d", now, before)
		}
		return nil
	})
	// One ends while nobody looks.
	ended := initPid(t, n.dir, "wait")
	if err := unix.Kill(ended, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "process ends", func() error {
		if err := unix.Kill(ended, 0); err == nil {
			return fmt.Errorf("%d lives", ended)
		}
		return nil
	})

	n.open()
	all, err := n.List(ctx)
	if err != nil || len(all) != 3 {
		t.Fatalf("adopted %v, %v", all, err)
	}
	boxes, err := n.sandboxes.List(ctx)
	if err != nil || len(boxes) != 1 {
		t.Fatalf("sandboxes %v, %v", boxes, err)
	}
	for _, c := range all {
		if c.PodUID != "adopted" || c.Annotations["hash"] != "1234" {
			t.Errorf("adopted %+v", c)
		}
		switch c.Name {
		case "wait":
			if c.State != Exited || c.ExitCode != 0 || c.Reason != "" || c.FinishedAt.IsZero() {
				t.Errorf("ended one: %+v", c)
			}
		case "copy":
			if c.State != Running {
				t.Fatalf("copy: %+v", c)
			}
			r, w := io.Pipe()
			got := make(chan string, 1)
			attached, stop := context.WithCancel(ctx)
			go func() {
				_ = n.Attach(attached, c.ID, Streams{In: strings.NewReader("still here\n"), Out: w})
			}()
			go func() {
				line, _ := bufio.NewReader(r).ReadString('\n')
				got <- line
			}()
			select {
			case line := <-got:
				if line != "still here\n" {
					t.Errorf("attach gave %q", line)
				}
			case <-time.After(10 * time.Second):
				t.Error("attach gave nothing")
			}
			stop()
		case "tick":
			if c.State != Running {
				t.Fatalf("tick: %+v", c)
			}
			if _, _, code, err := n.ExecSync(ctx, c.ID, []string{"/prog", "args"}, time.Minute); err != nil || code != 0 {
				t.Errorf("exec in adopted: %d, %v", code, err)
			}
			if err := n.Stop(ctx, c.ID, 0); err != nil {
				t.Error(err)
			}
			for i, line := range strings.Split(strings.TrimSpace(readLog(t, logPath, "stdout")), "\n") {
				if want := fmt.Sprintf("tick %d", i); line != want {
					t.Fatalf("log line %d is %q", i, line)
				}
			}
			if c := n.exited(c.ID); c.ExitCode != 137 {
				t.Errorf("killed: %+v", c)
			}
		}
	}
}

// killedAgent starts containers in another process and kills that.
func (n *node) killedAgent() {
	t := n.t
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), agentEnv+"="+n.dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "started\n" {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("agent said %q, %v", line, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// initPid finds the process of the container with the given argument, by its command line.
func initPid(t *testing.T, dir, arg string) int {
	t.Helper()
	bundles, _ := filepath.Glob(filepath.Join(dir, "run/containerd/io.containerd.runtime.v2.task/skep/*/init.pid"))
	for _, b := range bundles {
		data, err := os.ReadFile(b)
		if err != nil {
			t.Fatal(err)
		}
		pid := strings.TrimSpace(string(data))
		args, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err == nil && strings.Contains(string(args), "\x00"+arg+"\x00") {
			var n int
			if _, err := fmt.Sscan(pid, &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no container %s in %v", arg, bundles)
	return 0
}
