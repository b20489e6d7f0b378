// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/steps"
)

// agentProcess says what the test binary, run as an agent of its own, is to do.
type agentProcess struct {
	Dir, Host       string
	CA, Cert, Key   []byte
	DieAt, DieOfPod string // SIGKILL to itself once that pod has passed that step
	Passed          string // file that gets each step; empty for none
}

// agentProcessEnv holds an agentProcess.
const agentProcessEnv = "SKEP_TEST_AGENT_PROCESS"

// runAgentProcess is the whole life of such a process.
func runAgentProcess(text string) error {
	var p agentProcess
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host: p.Host, QPS: -1, TLSClientConfig: rest.TLSClientConfig{ServerName: "kubernetes", CAData: p.CA, CertData: p.Cert, KeyData: p.Key},
	})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	ctx := steps.With(context.Background(), func(pod, step string) {
		mu.Lock()
		defer mu.Unlock()
		if p.Passed != "" {
			f, err := os.OpenFile(p.Passed, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
			if err != nil {
				panic(err)
			}
			fmt.Fprintln(f, step)
			_ = f.Close()
		}
		if p.DieAt != "" && p.DieAt == step && pod == "default/"+p.DieOfPod {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	a, err := New(ctx, Config{
		NodeName: testNode, NodeIPs: []netip.Addr{netip.MustParseAddr(nodeIP)}, Client: client,
		DataDir: filepath.Join(p.Dir, "data"), RunDir: filepath.Join(p.Dir, "run"), LogsDir: filepath.Join(p.Dir, "logs"),
		ImagesDir: filepath.Join(p.Dir, "images"), ClusterDNS: []netip.Addr{netip.MustParseAddr("10.43.0.10")},
		RuntimeConfig: runtime.Config{ShimPath: filepath.Join(binDir, shim)}, Log: testLog(),
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// spawn starts an agent in a process of its own. The function that it returns waits for its end.
func (c *cluster) spawn(p agentProcess) (kill func(), ended func() error) {
	c.t.Helper()
	p.Dir, p.Host, p.CA = c.dir, c.address, c.ca.CAPEM()
	var err error
	if p.Cert, p.Key, err = c.ca.IssueClient("system:node:"+testNode, []string{"system:nodes"}); err != nil {
		c.t.Fatal(err)
	}
	text, err := json.Marshal(p)
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentProcessEnv+"="+string(text))
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	done := make(chan struct{})
	var exit error
	go func() {
		defer close(done)
		exit = cmd.Wait()
	}()
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	c.t.Cleanup(kill)
	return kill, func() error {
		select {
		case <-done:
			return exit
		case <-time.After(60 * time.Second):
			return fmt.Errorf("the agent did not die at %q of pod %s", p.DieAt, p.DieOfPod)
		}
	}
}

func (c *cluster) exists(name string) bool {
	_, err := c.admin.CoreV1().Pods("default").Get(context.Background(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		c.t.Fatal(err)
	}
	return err == nil
}

// crashPod has an init container, volumes of three kinds, a hook and a probe: all that the making of a pod consists of.
func crashPod(name string) *corev1.Pod {
	return testPod(name, func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{
			{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
			{Name: "ca", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}}}},
		}
		mounts := []corev1.VolumeMount{{Name: "shared", MountPath: "/shared"}, {Name: "ca", MountPath: "/one", SubPath: "ca.crt"}}
		p.Spec.InitContainers = []corev1.Container{{Name: "prepare", Image: testImage, Args: []string{"write", "/shared/prepared", "yes"}, VolumeMounts: mounts}}
		p.Spec.Containers[0].VolumeMounts = mounts
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/prog", "test", "/shared/prepared"}}}}
	})
}

// checkOnce checks that a ready pod is there once: one process, which serves.
func (c *cluster) checkOnce(p *corev1.Pod, at string) {
	c.t.Helper()
	// More than one for a moment: its probe.
	c.until("pod "+p.Name+", whose agent died at "+at+", has one process", func() bool { return len(c.processes(p.UID)) == 1 })
	if got := c.ask(p, file("/shared/prepared")); got != "yes" {
		c.t.Errorf("died at %q: the pod serves %q", at, got)
	}
	if n := p.Status.ContainerStatuses[0].RestartCount; n > 1 {
		c.t.Errorf("died at %q: restarted %d times", at, n)
	}
}

// processes lists those of a pod.
func (c *cluster) processes(uid types.UID) []string {
	hierarchies, err := cgroup.Hierarchies()
	if err != nil {
		c.t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(hierarchies[0].Path("kubepods/besteffort/pod"+string(uid)), "*", "cgroup.procs"))
	if err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		raw, _ := os.ReadFile(f) // a container's group may go meanwhile
		out = append(out, strings.Fields(string(raw))...)
	}
	return out
}

// left lists what is on the host of a pod that is gone.
func (c *cluster) left(uid types.UID) []string {
	var out []string
	for _, pattern := range []string{
		"data/pods/" + string(uid), "logs/*_" + string(uid), "run/ns/" + string(uid), "run/sandboxes/" + string(uid) + ".json",
	} {
		found, _ := filepath.Glob(filepath.Join(c.dir, pattern))
		out = append(out, found...)
	}
	if h, err := cgroup.Hierarchies(); err == nil {
		for _, one := range h {
			if path := one.Path("kubepods/besteffort/pod" + string(uid)); exists(path) {
				out = append(out, path)
			}
		}
	}
	if _, err := net.InterfaceByName("skep" + strings.ReplaceAll(string(uid), "-", "")[:8]); err == nil {
		out = append(out, "link of "+string(uid))
	}
	return out
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestCrashAtEveryStep kills the agent at each step of making and of unmaking a pod. The next agent makes the pod right,
// and once; when the pod is deleted nothing of it is left.
func TestCrashAtEveryStep(t *testing.T) {
	c := newCluster(t)
	c.start() // which gives the node its ranges
	c.stop()

	// Which steps there are, a pod says that nobody disturbs.
	passed := filepath.Join(c.dir, "passed")
	kill, _ := c.spawn(agentProcess{Passed: passed})
	c.create(crashPod("undisturbed"))
	p := c.untilPod("undisturbed", "is ready", isReady)
	c.checkOnce(p, "nothing")
	c.delete("undisturbed")
	c.until("nothing is left of it", func() bool { return len(c.left(p.UID)) == 0 })
	var raw []byte
	c.until("its last step is passed", func() bool {
		raw, _ = os.ReadFile(passed)
		return strings.Contains(string(raw), "DeletePod: done")
	})
	kill()
	all := strings.Split(strings.TrimSpace(string(raw)), "\n")
	slices.Sort(all)
	all = slices.Compact(all)
	for _, must := range []string{"sandbox: recorded", "sandbox: complete", "container: task created", "container: record gone", "sandbox: cgroup gone", "RemoveFiles: done"} {
		if !slices.Contains(all, must) {
			t.Errorf("step %q was not passed", must)
		}
	}
	t.Logf("%d steps: %q", len(all), all)

	var before *corev1.Pod // what the last agent left behind
	at := ""
	settle := func() {
		t.Helper()
		if before == nil {
			return
		}
		if c.exists(before.Name) {
			now := c.get(before.Name)
			if now.DeletionTimestamp == nil {
				c.checkOnce(c.untilPod(before.Name, "is ready after the agent died at "+at, isReady), at)
				c.delete(before.Name)
			} else {
				c.until("pod "+before.Name+" is gone, whose agent died at "+at, func() bool { return !c.exists(before.Name) })
			}
		}
		c.until("nothing is left of pod "+before.Name+", whose agent died at "+at, func() bool { return len(c.left(before.UID)) == 0 })
	}
	for i, step := range all {
		name := fmt.Sprintf("pod-%d", i)
		_, ended := c.spawn(agentProcess{DieAt: step, DieOfPod: name})
		settle()
		before, at = c.create(crashPod(name)), step
		over := make(chan error, 1)
		go func() { over <- ended() }()
		c.until("the agent died at "+step, func() bool {
			select {
			case err := <-over:
				over <- err
				return true
			default:
			}
			pods := c.admin.CoreV1().Pods("default")
			if now, err := pods.Get(context.Background(), name, metav1.GetOptions{}); err == nil && isReady(now) && now.DeletionTimestamp == nil {
				// It came through its beginning: the step is one of its end.
				if err := pods.Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			return false
		})
		if err := <-over; err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("step %q: the agent ended with %v", step, err)
		}
	}
	kill, _ = c.spawn(agentProcess{})
	settle()
	kill()
}
