// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/runtime"
)

func sortedStrings(s []string) []string {
	out := slices.Clone(s)
	slices.Sort(out)
	return out
}

// sum is a status in a few words: phase, each container's state, each condition that is true.
func sum(s corev1.PodStatus) string {
	out := []string{string(s.Phase)}
	for _, c := range slices.Concat(s.InitContainerStatuses, s.ContainerStatuses) {
		state := ""
		switch {
		case c.State.Waiting != nil:
			state = "waiting:" + c.State.Waiting.Reason
		case c.State.Running != nil:
			state = "running"
		case c.State.Terminated != nil:
			state = fmt.Sprintf("ended:%s:%d", c.State.Terminated.Reason, c.State.Terminated.ExitCode)
		}
		if c.LastTerminationState.Terminated != nil {
			state += " last:" + c.LastTerminationState.Terminated.Reason
		}
		if c.RestartCount > 0 {
			state += fmt.Sprintf(" x%d", c.RestartCount)
		}
		if c.Ready {
			state += " ready"
		}
		out = append(out, c.Name+"="+state)
	}
	var on []string
	for _, c := range s.Conditions {
		if c.Status == corev1.ConditionTrue {
			on = append(on, string(c.Type))
		}
	}
	return strings.Join(out, ", ") + "; " + strings.Join(on, " ")
}

func TestStatus(t *testing.T) {
	const up = "PodReadyToStartContainers Initialized"
	tests := []struct {
		name string
		pod  *corev1.Pod
		seen *Observed
		want string
	}{
		{"new", pod(), seen(nothing), "Pending, c=waiting:ContainerCreating; Initialized PodScheduled"},
		{"initialising", pod(initC("i")), seen(running("i", 0)), "Pending, i=running, c=waiting:PodInitializing; PodReadyToStartContainers PodScheduled"},
		{"initialised", pod(initC("i")), seen(exited("i", 0, 0)), "Pending, i=ended:Completed:0 ready, c=waiting:ContainerCreating; " + up + " PodScheduled"},
		{"running", pod(), seen(running("c", 0)), "Running, c=running ready; " + up + " ContainersReady Ready PodScheduled"},
		{"running, not ready", pod(main("c", readiness)), seen(running("c", 0)), "Running, c=running; " + up + " PodScheduled"},
		{"ready by probe", pod(main("c", readiness)), seen(running("c", 0), probed("c-0", ProbeState{Ready: true})), "Running, c=running ready; " + up + " ContainersReady Ready PodScheduled"},
		{"ready, not started", pod(main("c", readiness, startup)), seen(running("c", 0), probed("c-0", ProbeState{Ready: true})), "Running, c=running; " + up + " PodScheduled"},
		{"a sidecar counts for readiness", pod(sidecar("s", readiness)), seen(running("s", 0), running("c", 0)), "Running, s=running, c=running ready; " + up + " PodScheduled"},
		{"crash loop", pod(), seen(exited("c", 1, 2, delay(10*time.Second))), "Running, c=waiting:CrashLoopBackOff last:Error x1; " + up + " PodScheduled"},
		{"about to restart", pod(), seen(exited("c", 0, 2)), "Running, c=ended:Error:2; " + up + " PodScheduled"},
		{"restarted", pod(), seen(exited("c", 0, 2), running("c", 1)), "Running, c=running last:Error x1 ready; " + up + " ContainersReady Ready PodScheduled"},
		{"out of memory", pod(policy(corev1.RestartPolicyNever)), seen(exited("c", 0, 137, func(c *runtime.Container) { c.OOMKilled = true })), "Failed, c=ended:OOMKilled:137; " + up + " PodScheduled"},
		{"succeeded", pod(policy(corev1.RestartPolicyNever)), seen(exited("c", 0, 0)), "Succeeded, c=ended:Completed:0; " + up + " PodScheduled"},
		{"init failed", pod(initC("i"), policy(corev1.RestartPolicyNever)), seen(exited("i", 0, 1)), "Failed, i=ended:Error:1, c=waiting:PodInitializing; PodReadyToStartContainers PodScheduled"},
		{"image cannot be pulled", pod(), seen(func(o *Observed) { o.Images["c"] = ImageState{Failure: &Failure{Reason: "ErrImagePull"}} }), "Pending, c=waiting:ErrImagePull; " + up + " PodScheduled"},
		{"config map is missing", pod(), seen(func(o *Observed) { o.Starts["c"] = &Failure{Reason: "CreateContainerConfigError"} }), "Pending, c=waiting:CreateContainerConfigError; " + up + " PodScheduled"},
		{"could not start", pod(), seen(boxed("c", 0, runtime.Created, func(c *runtime.Container) { c.Reason = "StartError" })), "Running, c=ended:StartError:128; " + up + " PodScheduled"},
		{"ending", pod(deleting(5)), seen(running("c", 0)), "Running, c=running ready; " + up + " ContainersReady Ready PodScheduled"},
		{"deleted before it began", pod(deleting(5)), seen(nothing), "Failed, c=ended:ContainerStatusUnknown:137; Initialized PodScheduled"},
		{"one succeeded, one runs", pod(main("a"), main("b"), policy(corev1.RestartPolicyNever)), seen(exited("a", 0, 0), running("b", 0)), "Running, a=ended:Completed:0, b=running ready; " + up + " PodScheduled"},
		{"one not created yet", pod(main("a"), main("b")), seen(running("a", 0)), "Pending, a=running ready, b=waiting:ContainerCreating; " + up + " PodScheduled"},
		{"past its deadline", pod(deadline(60)), seen(exited("c", 0, 137)), "Failed, c=ended:Error:137; " + up + " PodScheduled"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, sum(status(tt.pod, tt.seen))); d != "" {
				t.Errorf("status (-want +got):\n%s", d)
			}
		})
	}
}

func TestStatusDetails(t *testing.T) {
	o := seen(exited("c", 3, 1, delay(80*time.Second)))
	o.NodeIPs = []string{"192.0.2.1", "2001:db8::1"}
	o.Sandbox.Addrs = []netip.Addr{netip.MustParseAddr("10.42.0.5"), netip.MustParseAddr("fd00::5")}
	o.Messages["c-3"] = "boom"
	p := pod(func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: "example.com/gate", Status: corev1.ConditionTrue}}
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/other"}}
	})
	s := status(p, o)
	if w := s.ContainerStatuses[0].State.Waiting; w == nil || w.Message != "back-off 1m20s restarting failed container=c pod=p_ns(uid)" {
		t.Errorf("waiting %+v", w)
	}
	if m := s.ContainerStatuses[0].LastTerminationState.Terminated.Message; m != "boom" {
		t.Errorf("termination message %q", m)
	}
	if s.PodIP != "10.42.0.5" || len(s.PodIPs) != 2 || s.HostIP != "192.0.2.1" || len(s.HostIPs) != 2 {
		t.Errorf("addresses %q %v %q %v", s.PodIP, s.PodIPs, s.HostIP, s.HostIPs)
	}
	if s.QOSClass != corev1.PodQOSBestEffort || s.ObservedGeneration != 1 || s.StartTime == nil {
		t.Errorf("qos %q generation %d start %v", s.QOSClass, s.ObservedGeneration, s.StartTime)
	}
	if s.Conditions[0].Type != "example.com/gate" {
		t.Error("a condition of somebody else is gone")
	}

	// A ready pod waits for its gates, and says so.
	o = seen(running("c", 0))
	s = status(p, o)
	for _, c := range s.Conditions {
		if c.Type == corev1.PodReady && (c.Status != corev1.ConditionFalse || c.Reason != "ReadinessGatesNotReady") {
			t.Errorf("ready condition %+v", c)
		}
	}

	// What a finished pod showed stays when its sandbox is gone.
	p = pod(policy(corev1.RestartPolicyNever), func(p *corev1.Pod) {
		p.Status.PodIP, p.Status.PodIPs = "10.42.0.5", []corev1.PodIP{{IP: "10.42.0.5"}}
	})
	o = seen(nothing, exited("c", 0, 0))
	if s = status(p, o); s.PodIP != "10.42.0.5" || s.Phase != corev1.PodSucceeded {
		t.Errorf("finished: ip %q phase %s", s.PodIP, s.Phase)
	}
	// A second status of the same state changes nothing.
	p.Status = s
	o.Now = now.Add(time.Hour)
	if patch, err := statusPatch(p, status(p, o)); err != nil || patch != nil {
		t.Errorf("patch %s, %v", patch, err)
	}
}
