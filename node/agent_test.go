// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func testPod(name string, change func(*corev1.Pod)) *corev1.Pod {
	grace := int64(5)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: testNode, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "main", Image: testImage, ImagePullPolicy: corev1.PullIfNotPresent}},
		},
	}
	if change != nil {
		change(p)
	}
	return p
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// ask gets a page of the program in a pod.
func (c *cluster) ask(p *corev1.Pod, path string) string {
	c.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + p.Status.PodIP + ":8080" + path)
	if err != nil {
		return "error: " + err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "error: " + err.Error()
	}
	return string(b)
}

func file(name string) string { return "/file?name=" + url.QueryEscape(name) }

// TestPodLife is one pod with a bit of everything, from creation to the last trace.
func TestPodLife(t *testing.T) {
	c := newCluster(t)
	c.start()
	ctx := context.Background()

	node, err := c.admin.CoreV1().Nodes().Get(ctx, testNode, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if node.Status.NodeInfo.KubeletVersion != KubeletVersion || node.Status.Capacity.Pods().Value() != 110 || node.Labels[corev1.LabelHostname] != testNode {
		t.Errorf("node %+v %+v", node.Labels, node.Status)
	}
	c.until("the lease is there", func() bool {
		l, err := c.admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, testNode, metav1.GetOptions{})
		return err == nil && l.Spec.LeaseDurationSeconds != nil && *l.Spec.LeaseDurationSeconds == 40
	})

	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "conf"}, Data: map[string]string{"greeting": "hello", "sub": "path"}}
	if cm, err = c.admin.CoreV1().ConfigMaps("default").Create(ctx, cm, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "key"}, StringData: map[string]string{"password": "honey"}}
	if _, err = c.admin.CoreV1().Secrets("default").Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.create(testPod("life", func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{
			{Name: "conf", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}}}},
			{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			{Name: "about", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}}},
		}
		shared := corev1.VolumeMount{Name: "shared", MountPath: "/shared"}
		p.Spec.InitContainers = []corev1.Container{{Name: "prepare", Image: testImage, Args: []string{"write", "/shared/prepared", "yes"}, VolumeMounts: []corev1.VolumeMount{shared}}}
		main := &p.Spec.Containers[0]
		main.Args = []string{"serve", "$(GREETING), $(NOBODY)"}
		main.VolumeMounts = []corev1.VolumeMount{{Name: "conf", MountPath: "/conf"}, shared, {Name: "conf", MountPath: "/one", SubPath: "greeting"}, {Name: "about", MountPath: "/about"}}
		main.Env = []corev1.EnvVar{
			{Name: "GREETING", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}, Key: "greeting"}}},
			{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
			{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "key"}, Key: "password"}}},
		}
		main.EnvFrom = []corev1.EnvFromSource{{Prefix: "CM_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}}}}
		main.ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(8080)}}}
		main.LivenessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/prog", "test", "/shared/prepared"}}}}
	}))
	p := c.untilPod("life", "is ready", isReady)
	if len(p.Status.PodIPs) != 2 || p.Status.HostIP != nodeIP || p.Status.QOSClass != corev1.PodQOSBestEffort || p.Status.Phase != corev1.PodRunning {
		t.Errorf("status %+v", p.Status)
	}
	env := c.ask(p, "/env")
	for _, want := range []string{`"GREETING=hello"`, `"POD_IP=` + p.Status.PodIP + `"`, `"PASSWORD=honey"`, `"CM_sub=path"`, `"KUBERNETES_SERVICE_HOST=10.43.0.1"`} {
		if !strings.Contains(env, want) {
			t.Errorf("environment lacks %s: %s", want, env)
		}
	}
	for path, want := range map[string]string{
		"/args": `"hello, $(NOBODY)"`, file("/conf/greeting"): "hello", file("/one"): "hello", file("/shared/prepared"): "yes",
		file("/about/labels"): `app="life"`, file("/etc/hosts"): p.Status.PodIP + "\tlife", file("/etc/resolv.conf"): "nameserver 10.43.0.10",
		file("/etc/hostname"): "life", file("/var/run/secrets/kubernetes.io/serviceaccount/token"): "ey", file("/proc/self/cgroup"): "kubepods/besteffort/pod" + string(p.UID),
	} {
		if got := c.ask(p, path); !strings.Contains(got, want) {
			t.Errorf("%s: %q does not have %q", path, got, want)
		}
	}

	// A change of the ConfigMap shows in the volume of the running container.
	cm.Data["greeting"] = "good bye"
	if _, err := c.admin.CoreV1().ConfigMaps("default").Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("the volume shows the change", func() bool { return c.ask(p, file("/conf/greeting")) == "good bye" })

	// Readiness follows its probe.
	c.ask(p, "/write?name=/shared/unready")
	c.untilPod("life", "is not ready", func(p *corev1.Pod) bool { return !isReady(p) })
	c.until("the probe's failure is told", func() bool {
		return slices.Contains(c.events("life"), "Unhealthy Readiness probe failed: HTTP probe failed with statuscode: 503")
	})
	if err := os.Remove(filepath.Join(c.dir, "data", "pods", string(p.UID), "volumes", "kubernetes.io~empty-dir", "shared", "unready")); err != nil {
		t.Fatal(err)
	}
	c.untilPod("life", "is ready again", isReady)

	// A crash restarts the container, and its last words are kept.
	c.ask(p, "/crash")
	p = c.untilPod("life", "has restarted", func(p *corev1.Pod) bool { return p.Status.ContainerStatuses[0].RestartCount == 1 && isReady(p) })
	if last := p.Status.ContainerStatuses[0].LastTerminationState.Terminated; last == nil || last.ExitCode != 7 || last.Message != "crashed as asked" {
		t.Errorf("last state %+v", last)
	}
	// The next crash has to wait.
	c.ask(p, "/crash")
	c.untilPod("life", "is in back-off", func(p *corev1.Pod) bool {
		w := p.Status.ContainerStatuses[0].State.Waiting
		return w != nil && w.Reason == "CrashLoopBackOff" && strings.Contains(w.Message, "back-off 10s restarting failed container=main pod=life_default(")
	})

	c.until("all events are there", func() bool {
		have := strings.Join(c.events("life"), "\n")
		for _, want := range []string{"Pulled Container image \"" + testImage + "\" already present on machine", "Created Container created", "Started Container started", "BackOff Back-off restarting failed container main in pod life_default("} {
			if !strings.Contains(have, want) {
				return false
			}
		}
		return true
	})
	c.delete("life")
	for _, left := range []string{filepath.Join(c.dir, "data", "pods", string(p.UID)), filepath.Join(c.dir, "logs", "default_life_"+string(p.UID))} {
		if _, err := os.Lstat(left); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", left, err)
		}
	}
	if list, err := c.agent.Runtime().List(ctx); err != nil || len(list) > 0 {
		t.Errorf("containers left: %v, %v", list, err)
	}
}

// TestAdoption replaces the agent under a running pod, and takes a pod away while there is no agent.
func TestAdoption(t *testing.T) {
	c := newCluster(t)
	c.start()
	ctx := context.Background()
	c.create(testPod("kept", func(p *corev1.Pod) {
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}}
	}))
	c.create(testPod("lost", nil))
	kept := c.untilPod("kept", "is ready", isReady)
	lost := c.untilPod("lost", "is ready", isReady)
	changes, err := c.admin.CoreV1().Pods("default").Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=kept", ResourceVersion: kept.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer changes.Stop()
	c.stop()
	now := int64(0)
	if err := c.admin.CoreV1().Pods("default").Delete(ctx, "lost", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	if got := c.ask(kept, "/args"); !strings.Contains(got, "prog") {
		t.Errorf("without an agent the pod answers %q", got)
	}

	c.start()
	c.until("what belongs to nobody is gone", func() bool {
		list, err := c.agent.Runtime().List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_, err = os.Lstat(filepath.Join(c.dir, "data", "pods", string(lost.UID)))
		return len(list) == 1 && os.IsNotExist(err)
	})
	again := c.get("kept")
	if was, is := kept.Status.ContainerStatuses[0], again.Status.ContainerStatuses[0]; was.ContainerID != is.ContainerID || is.RestartCount != 0 || !isReady(again) {
		t.Errorf("container was %+v, is %+v", was, is)
	}
	if got := c.ask(again, file("/var/run/secrets/kubernetes.io/serviceaccount/token")); !strings.HasPrefix(got, "ey") {
		t.Errorf("token: %q", got)
	}
	// A crash after adoption goes on counting.
	c.ask(again, "/crash")
	c.untilPod("kept", "has restarted", func(p *corev1.Pod) bool { return p.Status.ContainerStatuses[0].RestartCount == 1 && isReady(p) })
	for len(changes.ResultChan()) > 0 {
		e := <-changes.ResultChan()
		if p, ok := e.Object.(*corev1.Pod); ok && !isReady(p) && p.Status.ContainerStatuses[0].RestartCount == 0 && p.Status.ContainerStatuses[0].State.Running != nil {
			t.Errorf("the pod was shown unready while it was adopted: %+v", p.Status.Conditions)
		}
	}
	c.delete("kept")
}

// TestPodEndings: the states that people know from what goes wrong.
func TestPodEndings(t *testing.T) {
	c := newCluster(t)
	c.start()
	waiting := func(p *corev1.Pod) string {
		if len(p.Status.ContainerStatuses) == 0 || p.Status.ContainerStatuses[0].State.Waiting == nil {
			return ""
		}
		return p.Status.ContainerStatuses[0].State.Waiting.Reason
	}
	tests := []struct {
		name  string
		pod   func(*corev1.Pod)
		want  func(*corev1.Pod) bool
		event string
	}{
		{"success", func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.Containers[0].Args = []string{"exit", "0"}
		}, func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded }, ""},
		{"failure", func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.Containers[0].Args = []string{"exit", "3"}
			p.Spec.Containers[0].TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
		}, func(p *corev1.Pod) bool {
			return p.Status.Phase == corev1.PodFailed && p.Status.ContainerStatuses[0].State.Terminated.Message == "exiting with 3\n"
		}, ""},
		{"no-such-image", func(p *corev1.Pod) {
			p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = "127.0.0.1:1/none:1", corev1.PullIfNotPresent
		}, func(p *corev1.Pod) bool { return waiting(p) == "ImagePullBackOff" }, "Failed Error: ErrImagePull"},
		{"never-pull", func(p *corev1.Pod) {
			p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = "127.0.0.1:1/none:1", corev1.PullNever
		}, func(p *corev1.Pod) bool { return waiting(p) == "ErrImageNeverPull" }, "ErrImageNeverPull Container image \"127.0.0.1:1/none:1\" is not present with pull policy of Never"},
		{"no-config-map", func(p *corev1.Pod) {
			p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "nope"}}}}
		}, func(p *corev1.Pod) bool { return waiting(p) == "CreateContainerConfigError" }, `Failed Error: configmap "nope" not found`},
		{"no-volume", func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "nope"}}}}
		}, func(p *corev1.Pod) bool { return waiting(p) == "ContainerCreating" }, `FailedMount MountVolume.SetUp failed for volume "v" : secret "nope" not found`},
		{"bad-command", func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.Containers[0].Command = []string{"/nope"}
		}, func(p *corev1.Pod) bool {
			s := p.Status.ContainerStatuses
			return len(s) > 0 && s[0].State.Terminated != nil && s[0].State.Terminated.Reason == "StartError" && s[0].State.Terminated.ExitCode == 128 && p.Status.Phase == corev1.PodFailed
		}, ""},
		{"too-late", func(p *corev1.Pod) {
			one := int64(1)
			p.Spec.ActiveDeadlineSeconds = &one
		}, func(p *corev1.Pod) bool {
			return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "DeadlineExceeded"
		}, ""},
		{"dead", func(p *corev1.Pod) {
			p.Spec.Containers[0].LivenessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 1, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/prog", "test", "/nope"}}}}
		}, func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount > 0
		}, "Killing Container main failed liveness probe, will be restarted"},
		{"hooked", func(p *corev1.Pod) {
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/prog", "exit", "1"}}}}
		}, func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount > 0
		}, "FailedPostStartHook PostStartHook failed"},
		{"host-net", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, func(p *corev1.Pod) bool {
			return p.Status.PodIP == nodeIP && p.Status.Phase == corev1.PodRunning
		}, ""},
		{"sidecar", func(p *corev1.Pod) {
			always := corev1.ContainerRestartPolicyAlways
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
			p.Spec.InitContainers = []corev1.Container{{Name: "side", Image: testImage, RestartPolicy: &always}}
			p.Spec.Containers[0].Args = []string{"sleep", "100ms"}
		}, func(p *corev1.Pod) bool {
			return p.Status.Phase == corev1.PodSucceeded && p.Status.InitContainerStatuses[0].State.Terminated != nil
		}, "Killing Stopping container side"},
	}
	for _, tt := range tests {
		c.create(testPod(tt.name, tt.pod))
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sub := *c
			sub.t = t
			sub.untilPod(tt.name, "is as it should be", tt.want)
			if tt.event != "" {
				sub.until("its event is told: "+tt.event, func() bool { return slices.Contains(sub.events(tt.name), tt.event) })
			}
		})
	}
	// What was missing arrives: the pod goes on without delay.
	ctx := context.Background()
	if _, err := c.admin.CoreV1().Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "nope"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "nope"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.untilPod("no-volume", "runs", isReady)
	c.untilPod("no-config-map", "runs", isReady)
	for _, tt := range tests {
		c.delete(tt.name)
	}
}

// BenchmarkCreateToRunning is the time from a pod's creation, bound to this node, image present and token volume mounted,
// until the API shows it running.
func BenchmarkCreateToRunning(b *testing.B) {
	c := newCluster(b)
	c.start()
	ctx := context.Background()
	var took []time.Duration
	n := 0
	for b.Loop() {
		n++
		name := fmt.Sprintf("p%d", n)
		w, err := c.admin.CoreV1().Pods("default").Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		if err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		c.create(testPod(name, nil))
		for e := range w.ResultChan() {
			if p, ok := e.Object.(*corev1.Pod); ok && isReady(p) {
				break
			}
		}
		took = append(took, time.Since(began))
		w.Stop()
		b.StopTimer()
		c.delete(name)
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "ms-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Milliseconds()), "ms-p99")
}

// TestStaticPods runs a pod because of a file, with the API server's own rules about who may make its mirror.
func TestStaticPods(t *testing.T) {
	c := newCluster(t)
	dir := filepath.Join(c.dir, "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	manifest := func(arg string) {
		t.Helper()
		text := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  terminationGracePeriodSeconds: 5\n  containers:\n"+
			"  - {name: c, image: %q, args: [serve, %q], readinessProbe: {periodSeconds: 1, tcpSocket: {port: 8080}}}\n", testImage, arg)
		if err := os.WriteFile(filepath.Join(dir, "web.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manifest("one")
	c.start()
	exists := func() bool {
		_, err := c.admin.CoreV1().Pods("default").Get(context.Background(), "web-"+testNode, metav1.GetOptions{})
		return err == nil
	}
	c.until("the API shows it", exists)
	p := c.untilPod("web-"+testNode, "is ready", isReady)
	if got := c.ask(p, "/args"); !strings.Contains(got, `"one"`) {
		t.Errorf("arguments %s", got)
	}
	c.until("its events are found by its uid on the node", func() bool {
		list, err := c.admin.CoreV1().Events("default").List(context.Background(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + p.Annotations[corev1.MirrorPodAnnotationKey]})
		return err == nil && slices.ContainsFunc(list.Items, func(e corev1.Event) bool { return e.Reason == "Started" })
	})

	// The next agent finds it ready, and says nothing else of it.
	changes, err := c.admin.CoreV1().Pods("default").Watch(context.Background(), metav1.ListOptions{FieldSelector: "metadata.name=" + p.Name, ResourceVersion: p.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	c.stop()
	c.start()
	c.until("the next agent runs it", func() bool {
		q, ok := c.agent.Pods().Pod("default", p.Name, "")
		return ok && isReady(q)
	})
	changes.Stop()
	for e := range changes.ResultChan() {
		if q, ok := e.Object.(*corev1.Pod); ok && !isReady(q) {
			t.Errorf("not ready for a moment: %+v", q.Status.Conditions)
		}
	}
	if q := c.get(p.Name); q.UID != p.UID || q.Status.ContainerStatuses[0].ContainerID != p.Status.ContainerStatuses[0].ContainerID {
		t.Errorf("it was made anew: %+v", q.Status)
	}

	manifest("two")
	c.until("another mirror shows the new one", func() bool {
		q, err := c.admin.CoreV1().Pods("default").Get(context.Background(), p.Name, metav1.GetOptions{})
		return err == nil && q.UID != p.UID && isReady(q)
	})
	p = c.get(p.Name)
	if got := c.ask(p, "/args"); !strings.Contains(got, `"two"`) {
		t.Errorf("arguments %s", got)
	}
	if err := os.Remove(filepath.Join(dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	c.until("it is gone", func() bool { return !exists() })
	if list, err := c.agent.Runtime().List(context.Background()); err != nil || len(list) > 0 {
		t.Errorf("containers left: %v, %v", list, err)
	}
}
