// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// decisions are the scheduler's without any API, by its own benchmarks.
func decisions(ctx context.Context, b *bench) error {
	args := []string{"test", "./controlplane/scheduler", "-run", "^$", "-bench", "^Benchmark(Decide|Apart|Preempt)$/^(plain|spread|nodes=.*)$", "-benchtime", "1s"}
	if b.quick {
		args[len(args)-1] = "100x"
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("scheduler's benchmarks: %w\n%s", err, out)
	}
	rates := ratesOf(out)
	if len(rates) == 0 {
		return fmt.Errorf("scheduler's benchmarks say no rates:\n%s", out)
	}
	for _, r := range rates {
		goal := ""
		if strings.HasPrefix(r.name, "Decide") {
			goal = "20000"
		}
		b.add("scheduler alone, decisions a second: "+r.name, fmt.Sprintf("%.0f", r.value), "", "", goal)
	}
	return nil
}

type rate struct {
	name  string
	value float64
}

// ratesOf reads the custom metric pods/s from the output of `go test -bench`.
func ratesOf(out []byte) (rates []rate) {
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		for i := 1; i < len(fields); i++ {
			if value, err := strconv.ParseFloat(fields[i-1], 64); err == nil && fields[i] == "pods/s" {
				name := strings.TrimPrefix(fields[0], "Benchmark")
				if at := strings.LastIndexByte(name, '-'); at > 0 {
					name = name[:at] // the number of processors
				}
				rates = append(rates, rate{name, value})
			}
		}
	}
	return rates
}

func nodeName(i int) string { return fmt.Sprintf("hollow-%05d", i) }

// addNodes registers nodes that are only objects.
func addNodes(ctx context.Context, p plane, n int) error {
	capacity := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("32"), corev1.ResourceMemory: resource.MustParse("128Gi"), corev1.ResourcePods: resource.MustParse("110"),
	}
	return inParallel(ctx, n, func(ctx context.Context, i int) error {
		now := metav1.Now()
		name := nodeName(i)
		status := corev1.NodeStatus{
			Capacity: capacity, Allocatable: capacity,
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Hollow", LastHeartbeatTime: now, LastTransitionTime: now}},
		}
		node := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelTopologyZone: fmt.Sprint("zone-", i%3)}},
			Status:     status,
		}
		if _, err := p.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			return err
		}
		patch, err := json.Marshal(map[string]any{"status": status})
		if err != nil {
			return err
		}
		_, err = p.client.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		return err
	})
}

// removeNodes ends the nodes before anybody misses their heartbeats.
func removeNodes(ctx context.Context, p plane) error {
	return p.client.CoreV1().Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: corev1.LabelTopologyZone})
}

func hollowPod(name string, change func(*corev1.Pod)) *corev1.Pod {
	no, grace := false, int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "bench"}},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken: &no, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "c", Image: "hollow", Resources: corev1.ResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
			}}},
		},
	}
	if change != nil {
		change(pod)
	}
	return pod
}

// kinds of pods that are scheduled, and how many of the section's pods.
var kinds = []struct {
	name   string
	part   func(sizes) int
	change func(i int, pod *corev1.Pod)
}{
	{"plain", func(s sizes) int { return s.pods }, func(int, *corev1.Pod) {}},
	{"spread over zones and nodes", func(s sizes) int { return s.pods }, func(_ int, pod *corev1.Pod) {
		for key, skew := range map[string]int32{corev1.LabelTopologyZone: 1, corev1.LabelHostname: 5} {
			pod.Spec.TopologySpreadConstraints = append(pod.Spec.TopologySpreadConstraints, corev1.TopologySpreadConstraint{
				MaxSkew: skew, TopologyKey: key, WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: &metav1.LabelSelector{MatchLabels: pod.Labels},
			})
		}
	}},
	// 100 to an application, of which no two share a node.
	{"anti-affinity", func(s sizes) int { return s.pods }, func(i int, pod *corev1.Pod) {
		pod.Labels["app"] = fmt.Sprint("apart-", i/100)
		pod.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
			TopologyKey: corev1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: pod.Labels},
		}}}}
	}},
}

// scheduling is how many pods a second are created and bound, from the first creation to the last binding; and how many
// that find their room only by preemption.
func scheduling(ctx context.Context, b *bench, size sizes, ours, other plane) error {
	for _, kind := range kinds {
		what := fmt.Sprintf("pods created and bound a second, %d nodes: %s", size.nodes, kind.name)
		goal := ""
		if kind.name == "plain" {
			goal = "2000"
		}
		err := both(b, what, goal, ours, other, func(p plane) (float64, error) {
			return scheduled(ctx, p, size.nodes, kind.part(size), kind.change)
		})
		if err != nil {
			return err
		}
	}
	full := min(size.nodes, 100)
	return both(b, fmt.Sprintf("the same by preemption, of two pods each, %d full nodes", full), "", ours, other, func(p plane) (float64, error) {
		return preempted(ctx, p, full)
	})
}

// namespaces are numbered, since one that ends takes its time.
func namespaceOf(kind string) string { return fmt.Sprintf("%s-%d", kind, time.Now().UnixNano()) }

func scheduled(ctx context.Context, p plane, nodes, n int, change func(int, *corev1.Pod)) (float64, error) {
	ns := namespaceOf("bound")
	if err := makeNamespace(ctx, p, ns); err != nil {
		return 0, err
	}
	if err := addNodes(ctx, p, nodes); err != nil {
		return 0, err
	}
	took, err := bind(ctx, p, ns, n, func(i int) *corev1.Pod {
		return hollowPod(fmt.Sprint("p-", i), func(pod *corev1.Pod) { change(i, pod) })
	})
	if err != nil {
		return 0, err
	}
	return float64(n) / took.Seconds(), errors.Join(empty(ctx, p, ns), removeNodes(ctx, p))
}

func preempted(ctx context.Context, p plane, nodes int) (float64, error) {
	ns := namespaceOf("preempt")
	if err := makeNamespace(ctx, p, ns); err != nil {
		return 0, err
	}
	if err := addNodes(ctx, p, nodes); err != nil {
		return 0, err
	}
	asking := func(cpu, class string) func(*corev1.Pod) {
		return func(pod *corev1.Pod) {
			pod.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = resource.MustParse(cpu)
			pod.Spec.PriorityClassName = class
		}
	}
	if _, err := p.client.SchedulingV1().PriorityClasses().Create(ctx, highClass(ns), metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	if _, err := bind(ctx, p, ns, 2*nodes, func(i int) *corev1.Pod { return hollowPod(fmt.Sprint("low-", i), asking("16", "")) }); err != nil {
		return 0, err
	}
	took, err := bind(ctx, p, ns, nodes, func(i int) *corev1.Pod { return hollowPod(fmt.Sprint("high-", i), asking("32", ns)) })
	if err != nil {
		return 0, err
	}
	return float64(nodes) / took.Seconds(), errors.Join(empty(ctx, p, ns), removeNodes(ctx, p))
}

// bind creates pods, and returns how long it took until all of them had nodes.
func bind(ctx context.Context, p plane, ns string, n int, pod func(i int) *corev1.Pod) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	pods := p.client.CoreV1().Pods(ns)
	waits := map[string]bool{}
	for i := range n {
		waits[pod(i).Name] = true
	}
	all := make(chan error, 1)
	events, err := watchAll(ctx, p, ns)
	if err != nil {
		return 0, err
	}
	go func() {
		all <- follow(ctx, p, ns, events, func(event watch.Event, pod *corev1.Pod) bool {
			if pod.Spec.NodeName != "" && event.Type != watch.Deleted {
				delete(waits, pod.Name)
			}
			return len(waits) == 0
		})
	}()
	begin := time.Now()
	if err := inParallel(ctx, n, func(ctx context.Context, i int) error {
		_, err := pods.Create(ctx, pod(i), metav1.CreateOptions{})
		return err
	}); err != nil {
		return 0, err
	}
	err = <-all
	return time.Since(begin), err
}

func watchAll(ctx context.Context, p plane, ns string) (watch.Interface, error) {
	return p.client.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{})
}

// follow sees pods until one of them is the last; a watch that was too slow is begun anew, with what there is.
func follow(ctx context.Context, p plane, ns string, events watch.Interface, last func(watch.Event, *corev1.Pod) bool) error {
	for {
		for event := range events.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok && last(event, pod) {
				events.Stop()
				return nil
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("pods of %s: %w", ns, ctx.Err())
		}
		var err error
		if events, err = watchAll(ctx, p, ns); err != nil {
			return err
		}
	}
}

// empty deletes all pods of a namespace; they have no grace.
func empty(ctx context.Context, p plane, ns string) error {
	return p.client.CoreV1().Pods(ns).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
}

// oneDeployment is how long a Deployment takes until all its pods run, until all are replaced, and until all are gone.
func oneDeployment(ctx context.Context, b *bench, size sizes, ours, other plane) error {
	var took [2][3]time.Duration
	for i, p := range []plane{ours, other} {
		var err error
		if took[i], err = deploymentLife(ctx, p, size); err != nil {
			return fmt.Errorf("a Deployment of %d: %w", size.replicas, err)
		}
	}
	for j, step := range []struct{ name, goal string }{{"created until available", "5 s"}, {"rolled to another image", ""}, {"deleted until its pods are gone", "5 s"}} {
		b.add(fmt.Sprintf("a Deployment of %d replicas: %s", size.replicas, step.name), seconds(took[0][j]), "upstream "+seconds(took[1][j]), ratio(took[0][j], took[1][j]), step.goal)
	}
	return nil
}

func deploymentLife(ctx context.Context, p plane, size sizes) (took [3]time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	ns := namespaceOf("deployment")
	if err := makeNamespace(ctx, p, ns); err != nil {
		return took, err
	}
	if err := addNodes(ctx, p, max(100, size.nodes/10)); err != nil {
		return took, err
	}
	playing, stop := context.WithCancel(ctx)
	played := make(chan error, 1)
	events, err := watchAll(ctx, p, ns)
	if err != nil {
		stop()
		return took, err
	}
	go func() { played <- kubelets(playing, p, ns, events) }()
	defer func() {
		stop()
		err = errors.Join(err, <-played)
	}()
	replicas := int32(size.replicas)
	template := hollowPod("", nil)
	deployments := p.client.AppsV1().Deployments(ns)
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "big"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: template.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: template.Labels}, Spec: template.Spec},
		},
	}
	begin := time.Now()
	if _, err := deployments.Create(ctx, d, metav1.CreateOptions{}); err != nil {
		return took, err
	}
	complete := func(d *appsv1.Deployment) bool {
		s := d.Status
		return s.ObservedGeneration == d.Generation && s.AvailableReplicas == replicas && s.UpdatedReplicas == replicas && s.Replicas == replicas
	}
	if err := awaitDeployment(ctx, p, ns, complete); err != nil {
		return took, err
	}
	took[0] = time.Since(begin)

	begin = time.Now()
	if _, err := deployments.Patch(ctx, "big", types.StrategicMergePatchType, []byte(`{"spec":{"template":{"spec":{"containers":[{"name":"c","image":"hollow:2"}]}}}}`), metav1.PatchOptions{}); err != nil {
		return took, err
	}
	if err := awaitDeployment(ctx, p, ns, complete); err != nil {
		return took, err
	}
	took[1] = time.Since(begin)

	begin = time.Now()
	background := metav1.DeletePropagationBackground
	if err := deployments.Delete(ctx, "big", metav1.DeleteOptions{PropagationPolicy: &background}); err != nil {
		return took, err
	}
	if err := awaitNoPods(ctx, p, ns); err != nil {
		return took, err
	}
	took[2] = time.Since(begin)
	return took, removeNodes(ctx, p)
}

func awaitDeployment(ctx context.Context, p plane, ns string, done func(*appsv1.Deployment) bool) error {
	for ctx.Err() == nil {
		events, err := p.client.AppsV1().Deployments(ns).Watch(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for event := range events.ResultChan() {
			if d, ok := event.Object.(*appsv1.Deployment); ok && done(d) {
				events.Stop()
				return nil
			}
		}
	}
	return ctx.Err()
}

// awaitNoPods follows the pods that there are.
func awaitNoPods(ctx context.Context, p plane, ns string) error {
	for ctx.Err() == nil {
		list, err := p.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil || len(list.Items) == 0 {
			return err
		}
		left := map[types.UID]bool{}
		for i := range list.Items {
			left[list.Items[i].UID] = true
		}
		events, err := p.client.CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion})
		if err != nil {
			return err
		}
		for event := range events.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok && event.Type == watch.Deleted {
				delete(left, pod.UID)
			}
			if len(left) == 0 {
				break
			}
		}
		events.Stop()
	}
	return ctx.Err()
}

// kubelets says of every pod that has a node that it runs and is ready.
func kubelets(ctx context.Context, p plane, ns string, events watch.Interface) error {
	now := metav1.Now()
	status := corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &now, PodIP: "198.18.0.1", PodIPs: []corev1.PodIP{{IP: "198.18.0.1"}}}
	for _, kind := range []corev1.PodConditionType{corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
		status.Conditions = append(status.Conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	slots, failed := make(chan struct{}, clients), make(chan error, 1)
	started := map[types.UID]bool{}
	err = follow(ctx, p, ns, events, func(_ watch.Event, pod *corev1.Pod) bool {
		if pod.Spec.NodeName == "" || pod.DeletionTimestamp != nil || started[pod.UID] {
			return false
		}
		started[pod.UID] = true
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			_, err := p.client.CoreV1().Pods(ns).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
			if err != nil && !apierrors.IsNotFound(err) && ctx.Err() == nil {
				select {
				case failed <- err:
				default:
				}
			}
		}()
		return false
	})
	for range clients {
		slots <- struct{}{} // all have ended
	}
	if ctx.Err() != nil {
		err = nil // it was told to stop
	}
	select {
	case one := <-failed:
		return errors.Join(err, one)
	default:
		return err
	}
}
