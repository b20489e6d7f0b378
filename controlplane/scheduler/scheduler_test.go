// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"github.com/prometheus/client_golang/prometheus"
)

// cluster is a scheduler that runs against a fake API server which, unlike the plain fake, acts on
// pods/binding.
type cluster struct {
	t      *testing.T
	ctx    context.Context
	client *fake.Clientset
	// bindErr fails the next bindings: before they take effect, or after.
	failBefore, failAfter atomic.Int32
}

func startCluster(t *testing.T, objects ...runtime.Object) *cluster {
	t.Helper()
	return startClusterOf(t, nil, objects...)
}

func startClusterOf(t *testing.T, profiles Profiles, objects ...runtime.Object) *cluster {
	t.Helper()
	client := fake.NewClientset(objects...)
	c := &cluster{t: t, client: client}
	client.PrependReactor("create", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if action.GetSubresource() != "binding" {
			return false, nil, nil
		}
		if c.failBefore.Add(-1) >= 0 {
			return true, nil, errors.New("injected: refused")
		}
		binding := action.(clienttesting.CreateAction).GetObject().(*v1.Binding)
		pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
		object, err := client.Tracker().Get(pods, binding.Namespace, binding.Name)
		if err != nil {
			return true, nil, err
		}
		bound := object.(*v1.Pod).DeepCopy()
		if bound.Spec.NodeName != "" {
			return true, nil, errors.New("already bound to " + bound.Spec.NodeName)
		}
		bound.Spec.NodeName = binding.Target.Name
		if err := client.Tracker().Update(pods, bound, binding.Namespace); err != nil {
			return true, nil, err
		}
		if c.failAfter.Add(-1) >= 0 {
			return true, nil, errors.New("injected: answer lost")
		}
		return true, binding, nil
	})
	before := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(t.Context())
	c.ctx = ctx
	factory := informers.NewSharedInformerFactory(client, 0)
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Client: client, Informers: factory, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), Profiles: profiles})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		factory.Shutdown()
		goleak.VerifyNone(t, before)
	})
	return c
}

// eventually polls: the fake client offers nothing to wait on for several kinds of object.
func (c *cluster) eventually(what string, condition func() bool) {
	c.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			c.t.Fatalf("did not happen: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (c *cluster) create(object *v1.Pod) {
	c.t.Helper()
	if _, err := c.client.CoreV1().Pods(object.Namespace).Create(c.ctx, object, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) pod(name string) *v1.Pod {
	object, err := c.client.CoreV1().Pods("default").Get(c.ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	return object
}

func (c *cluster) isOn(pod, node string) {
	c.t.Helper()
	c.eventually(pod+" is on "+node, func() bool { p := c.pod(pod); return p != nil && p.Spec.NodeName == node })
}

func (c *cluster) waits(pod, message string) {
	c.t.Helper()
	c.eventually(pod+" waits: "+message, func() bool {
		p := c.pod(pod)
		if p == nil {
			return false
		}
		for _, condition := range p.Status.Conditions {
			if condition.Type == v1.PodScheduled {
				return condition.Status == v1.ConditionFalse && condition.Reason == v1.PodReasonUnschedulable && strings.HasPrefix(condition.Message, message)
			}
		}
		return false
	})
}

func (c *cluster) event(reason, message string) {
	c.t.Helper()
	c.eventFrom(Name, reason, message)
}

func (c *cluster) eventFrom(scheduler, reason, message string) {
	c.t.Helper()
	c.eventually("event "+reason+" "+message, func() bool {
		events, err := c.client.CoreV1().Events("default").List(c.ctx, metav1.ListOptions{})
		if err != nil {
			return false
		}
		for _, e := range events.Items {
			if e.Reason == reason && strings.HasPrefix(e.Message, message) && e.Source.Component == scheduler {
				return true
			}
		}
		return false
	})
}

func TestSchedulesAndExplains(t *testing.T) {
	c := startCluster(t)
	c.create(testPod("early"))
	c.waits("early", "no nodes available to schedule pods")
	c.event("FailedScheduling", "no nodes available to schedule pods")

	if _, err := c.client.CoreV1().Nodes().Create(c.ctx, testNode("a"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("early", "a")
	c.event("Scheduled", "Successfully assigned default/early to a")

	c.create(testPod("big", asks("cpu", "6")))
	c.waits("big", "0/1 nodes are available: 1 Insufficient cpu. no new claims")

	// What wakes it: its node grows.
	if _, err := c.client.CoreV1().Nodes().Update(c.ctx, testNode("a", gives("cpu", "8")), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("big", "a")

	c.create(testPod("next", asks("cpu", "6")))
	c.waits("next", "0/1 nodes are available: 1 Insufficient cpu.")
	// What wakes it: another pod goes.
	if err := c.client.CoreV1().Pods("default").Delete(c.ctx, "big", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("next", "a")

	c.create(testPod("last", asks("cpu", "6")))
	c.waits("last", "0/1 nodes are available: 1 Insufficient cpu.")
	// What wakes it: another pod ends.
	ended := c.pod("next")
	ended.Status.Phase = v1.PodSucceeded
	if _, err := c.client.CoreV1().Pods("default").UpdateStatus(c.ctx, ended, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("last", "a")
}

func TestLeavesOthersAlone(t *testing.T) {
	c := startCluster(t, testNode("a", gives("cpu", "2")),
		testPod("others", func(p *v1.Pod) { p.Spec.SchedulerName = "mine" }),
		testPod("gated", func(p *v1.Pod) { p.Spec.SchedulingGates = []v1.PodSchedulingGate{{Name: "example.com/g"}} }),
		testPod("bound", onNode("a"), asks("cpu", "1")))
	c.create(testPod("p", asks("cpu", "1")))
	c.isOn("p", "a")
	if on := c.pod("others").Spec.NodeName + c.pod("gated").Spec.NodeName; on != "" {
		t.Errorf("a pod that is not ours or gated was bound to %s", on)
	}
	// The bound pod counts.
	c.create(testPod("q", asks("cpu", "1")))
	c.waits("q", "0/1 nodes are available: 1 Insufficient cpu.")
	// The gate is lifted.
	open := c.pod("gated")
	open.Spec.SchedulingGates = nil
	open.Generation++
	if _, err := c.client.CoreV1().Pods("default").Update(c.ctx, open, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.isOn("gated", "a")
}

// Pods of every profile are scheduled, each as its own says, and the event explains it.
func TestProfilesOfOneScheduler(t *testing.T) {
	c := startClusterOf(t, mustParse(t, packing), testNode("empty"), testNode("half"), testPod("there", onNode("half"), asks("cpu", "2", "memory", "4Gi")))
	c.create(testPod("packed", bySchedulerNamed("packing"), asks("cpu", "1", "memory", "2Gi")))
	c.isOn("packed", "half")
	c.eventFrom("packing", "Scheduled", "Successfully assigned default/packed to half, with a score of 1050 the best of 2 that fit; next is empty with 550 (NodeResourcesFit 750, there 250)")
	c.create(testPod("spread", asks("cpu", "1", "memory", "2Gi")))
	c.isOn("spread", "empty")
	c.create(testPod("others", bySchedulerNamed("mine")))
	c.create(testPod("last", asks("cpu", "1")))
	c.eventually("the last is somewhere", func() bool { p := c.pod("last"); return p != nil && p.Spec.NodeName != "" })
	if on := c.pod("others").Spec.NodeName; on != "" {
		t.Errorf("a pod of a scheduler that is not configured was bound to %s", on)
	}
}

// noEvents is for tests that do not look at them.
func noEvents(string) record.EventRecorder { return record.NewFakeRecorder(0) }

func TestFailedBindings(t *testing.T) {
	c := startCluster(t)
	c.failBefore.Store(1)
	if _, err := c.client.CoreV1().Nodes().Create(c.ctx, testNode("a", gives("cpu", "1")), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.create(testPod("retried", asks("cpu", "1")))
	c.event("FailedScheduling", `running Bind plugin "DefaultBinder": injected: refused`)
	c.isOn("retried", "a")

	if err := c.client.CoreV1().Pods("default").Delete(c.ctx, "retried", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.failAfter.Store(1)
	c.create(testPod("lost", asks("cpu", "1")))
	c.isOn("lost", "a")
	// It stays accounted although its binding looked like a failure.
	c.create(testPod("p", asks("cpu", "1")))
	c.waits("p", "0/1 nodes are available: 1 Insufficient cpu.")
}

func TestPreempts(t *testing.T) {
	c := startCluster(t, testNode("a"), testPod("low", onNode("a"), asks("cpu", "4")))
	c.create(testPod("high", priority(10), asks("cpu", "2")))
	c.isOn("high", "a")
	c.event("Preempted", "Preempted by pod uid-high on node a")
	if c.pod("low") != nil {
		t.Error("the victim is still there")
	}
}

// An informer that lost its watch may show the next pod of a name as an update of the last.
func TestAnotherPodOfTheSameName(t *testing.T) {
	client := fake.NewClientset()
	s, err := newScheduler(Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler)},
		noEvents)
	if err != nil {
		t.Fatal(err)
	}
	s.onNode(nil, testNode("a"))
	before := testPod("p", onNode("a"), asks("cpu", "1"))
	s.onPod(nil, before)
	after := testPod("p", asks("cpu", "2"))
	after.UID = "another"
	s.onPod(before, after)
	if n := s.snapshot.byName["a"]; len(n.pods) != 0 || n.requested.milliCPU != 0 {
		t.Errorf("the last pod is still accounted: %+v", n.requested)
	}
	if s.queue.byUID["another"] == nil {
		t.Error("the next pod is not queued")
	}
}
