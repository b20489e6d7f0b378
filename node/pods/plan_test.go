// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
)

var now = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) time.Time { return now.Add(-d) }

// A small language for tables: pod(opts...) and seen(opts...).
type podOpt func(*corev1.Pod)

func pod(opts ...podOpt) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "uid", Generation: 1},
		Spec:       corev1.PodSpec{RestartPolicy: corev1.RestartPolicyAlways},
	}
	for _, o := range opts {
		o(p)
	}
	if len(p.Spec.Containers) == 0 {
		main("c")(p)
	}
	return p
}

func container(name string, opts ...func(*corev1.Container)) corev1.Container {
	c := corev1.Container{Name: name, Image: "img"}
	for _, o := range opts {
		o(&c)
	}
	return c
}

func main(name string, opts ...func(*corev1.Container)) podOpt {
	return func(p *corev1.Pod) { p.Spec.Containers = append(p.Spec.Containers, container(name, opts...)) }
}

func initC(name string, opts ...func(*corev1.Container)) podOpt {
	return func(p *corev1.Pod) { p.Spec.InitContainers = append(p.Spec.InitContainers, container(name, opts...)) }
}

func sidecar(name string, opts ...func(*corev1.Container)) podOpt {
	always := corev1.ContainerRestartPolicyAlways
	return initC(name, append(opts, func(c *corev1.Container) { c.RestartPolicy = &always })...)
}

func debugger(name, target string) podOpt {
	return func(p *corev1.Pod) {
		p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{
			EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: name, Image: "img"}, TargetContainerName: target,
		})
	}
}

func sharing(p *corev1.Pod) {
	yes := true
	p.Spec.ShareProcessNamespace = &yes
}

func pid(n uint32) func(*runtime.Container) { return func(c *runtime.Container) { c.PID = n } }

func policy(r corev1.RestartPolicy) podOpt {
	return func(p *corev1.Pod) { p.Spec.RestartPolicy = r }
}

func deleting(grace int64) podOpt {
	return func(p *corev1.Pod) {
		t := metav1.NewTime(now)
		p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &t, &grace
	}
}

func deadline(seconds int64) podOpt {
	return func(p *corev1.Pod) { p.Spec.ActiveDeadlineSeconds = &seconds }
}

func phase(ph corev1.PodPhase) podOpt { return func(p *corev1.Pod) { p.Status.Phase = ph } }

var (
	probe     = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{}}}
	liveness  = func(c *corev1.Container) { c.LivenessProbe = probe }
	readiness = func(c *corev1.Container) { c.ReadinessProbe = probe }
	startup   = func(c *corev1.Container) { c.StartupProbe = probe }
)

func ownPolicy(r corev1.ContainerRestartPolicy) func(*corev1.Container) {
	return func(c *corev1.Container) { c.RestartPolicy = &r }
}

type seenOpt func(*Observed)

// seen is a pod with sandbox and volumes in place, and all images here.
func seen(opts ...seenOpt) *Observed {
	o := &Observed{
		Now: now, BootID: "boot", StartTime: ago(time.Minute), Sandbox: &sandbox.Sandbox{PodUID: "uid"},
		Volumes: VolumeState{Ready: true, Present: true, Files: true}, Starting: map[string]bool{}, Starts: map[string]*Failure{},
		Images: map[string]ImageState{}, Probes: map[string]ProbeState{}, Messages: map[string]string{},
		Limits: &cgroup.Limits{CPUShares: minShares},
	}
	for _, opt := range opts {
		opt(o)
	}
	return o
}

func nothing(o *Observed) {
	o.Sandbox, o.Volumes, o.Limits = nil, VolumeState{}, nil
}

func image(name string, attempt int) seenOpt {
	return func(o *Observed) { o.Images[name] = ImageState{Attempt: attempt, Ready: true} }
}

func boxed(name string, attempt int, state runtime.State, opts ...func(*runtime.Container)) seenOpt {
	return func(o *Observed) {
		c := runtime.Container{
			ID: fmt.Sprintf("%s-%d", name, attempt), Name: name, Attempt: attempt, State: state, CreatedAt: ago(time.Minute),
			Annotations: map[string]string{annotationImage: "img", annotationBoot: "boot"},
		}
		if state != runtime.Created {
			c.StartedAt = ago(time.Minute)
		}
		if state == runtime.Exited {
			c.FinishedAt = ago(time.Second)
		}
		for _, opt := range opts {
			opt(&c)
		}
		o.Containers = append(o.Containers, c)
	}
}

func running(name string, attempt int, opts ...func(*runtime.Container)) seenOpt {
	return boxed(name, attempt, runtime.Running, opts...)
}

func exited(name string, attempt int, code int32, opts ...func(*runtime.Container)) seenOpt {
	return boxed(name, attempt, runtime.Exited, append([]func(*runtime.Container){func(c *runtime.Container) { c.ExitCode = code }}, opts...)...)
}

func delay(d time.Duration) func(*runtime.Container) {
	return func(c *runtime.Container) { c.Annotations[annotationDelay] = d.String() }
}

func ran(from, to time.Duration) func(*runtime.Container) {
	return func(c *runtime.Container) { c.StartedAt, c.FinishedAt = ago(from), ago(to) }
}

func otherBoot(c *runtime.Container) { c.Annotations[annotationBoot] = "before" }

func again(id string) seenOpt { return func(o *Observed) { o.Again = map[string]bool{id: true} } }

func starting(name string) seenOpt { return func(o *Observed) { o.Starting[name] = true } }

func probed(id string, s ProbeState) seenOpt { return func(o *Observed) { o.Probes[id] = s } }

// short is an action as tables write it.
func short(a Action) string {
	switch a.Kind {
	case EnsureImage:
		return fmt.Sprintf("image %s#%d", a.Container, a.Attempt)
	case StartContainer:
		s := fmt.Sprintf("start %s#%d", a.Container, a.Attempt)
		if a.Delay > 0 {
			s += " next " + a.Delay.String()
		}
		if a.TargetPID > 0 {
			s += fmt.Sprintf(" beside %d", a.TargetPID)
		}
		return s
	case StopContainer:
		s := fmt.Sprintf("stop %s %s", a.ID, a.Grace)
		if a.Again {
			s += " again"
		}
		return s
	case RemoveContainer:
		return "remove " + a.ID
	default:
		return string(a.Kind)
	}
}

func TestPlan(t *testing.T) {
	const grace = "30s"
	tests := []struct {
		name string
		pod  *corev1.Pod
		seen *Observed
		want []string
		wake time.Duration // from now; 0 for none
		wait []string
		done bool
	}{
		{name: "a new pod starts everything at once", pod: pod(), seen: seen(nothing), want: []string{"CreateSandbox", "MountVolumes", "image c#0"}},
		{name: "an image alone does not start a container", pod: pod(), seen: seen(nothing, image("c", 0)), want: []string{"CreateSandbox", "MountVolumes"}},
		{name: "volumes are waited for", pod: pod(), seen: seen(image("c", 0), func(o *Observed) { o.Volumes.Ready = false }), want: []string{"MountVolumes"}},
		{name: "all is there", pod: pod(), seen: seen(image("c", 0)), want: []string{"start c#0"}},
		{name: "two containers start together", pod: pod(main("a"), main("b")), seen: seen(image("a", 0), image("b", 0)), want: []string{"start a#0", "start b#0"}},
		{name: "a start on its way is left alone", pod: pod(), seen: seen(image("c", 0), starting("c"))},
		{name: "a running pod needs nothing", pod: pod(), seen: seen(running("c", 0))},
		{name: "a sandbox that failed is backed off", pod: pod(), seen: seen(nothing, image("c", 0), func(o *Observed) {
			o.SandboxFailure = &Failure{RetryAt: now.Add(3 * time.Second)}
		}), want: []string{"MountVolumes"}, wake: 3 * time.Second},
		{name: "volumes that failed are backed off", pod: pod(), seen: seen(image("c", 0), func(o *Observed) {
			o.Volumes = VolumeState{Failure: &Failure{RetryAt: now.Add(3 * time.Second)}}
		}), wake: 3 * time.Second},
		{name: "stale volumes are refreshed while containers run", pod: pod(), seen: seen(running("c", 0), func(o *Observed) { o.Volumes.Stale = true }), want: []string{"MountVolumes"}},
		{name: "a token is renewed when it is due", pod: pod(), seen: seen(running("c", 0), func(o *Observed) { o.Volumes.Refresh = now }), want: []string{"MountVolumes"}},
		{name: "the worker wakes when a token is due", pod: pod(), seen: seen(running("c", 0), func(o *Observed) { o.Volumes.Refresh = now.Add(time.Hour) }), wake: time.Hour},
		{name: "an image that failed is backed off", pod: pod(), seen: seen(func(o *Observed) {
			o.Images["c"] = ImageState{Failure: &Failure{RetryAt: now.Add(10 * time.Second)}}
		}), wake: 10 * time.Second},
		{name: "an image that failed is tried again", pod: pod(), seen: seen(func(o *Observed) {
			o.Images["c"] = ImageState{Failure: &Failure{RetryAt: now}}
		}), want: []string{"image c#0"}},
		{name: "a start that failed is backed off", pod: pod(), seen: seen(image("c", 0), func(o *Observed) {
			o.Starts["c"] = &Failure{RetryAt: now.Add(time.Second)}
		}), wake: time.Second},
		{name: "what a dead agent left between creation and start is removed", pod: pod(), seen: seen(image("c", 0), boxed("c", 0, runtime.Created)), want: []string{"remove c-0"}},
		{name: "the sandbox went away under a running container", pod: pod(), seen: seen(running("c", 0), func(o *Observed) { o.Sandbox = nil }), want: []string{"stop c-0 " + grace}},

		// Restarts.
		{name: "the first restart is immediate", pod: pod(), seen: seen(exited("c", 0, 1), image("c", 1)), want: []string{"start c#1 next 10s"}},
		{name: "each attempt looks for its image", pod: pod(), seen: seen(exited("c", 0, 1), image("c", 0)), want: []string{"image c#1"}},
		{name: "the second waits 10 s", pod: pod(), seen: seen(exited("c", 1, 1, delay(10*time.Second)), image("c", 2)), wake: 9 * time.Second, wait: []string{"c"}},
		{name: "and then starts", pod: pod(), seen: seen(exited("c", 1, 1, delay(10*time.Second), ran(20*time.Second, 10*time.Second)), image("c", 2)), want: []string{"start c#2 next 20s"}},
		{name: "the delay ends at 5 min", pod: pod(), seen: seen(exited("c", 9, 1, delay(5*time.Minute), ran(10*time.Minute, 5*time.Minute)), image("c", 10)), want: []string{"start c#10 next 5m0s"}},
		{name: "10 min of running make it forgotten", pod: pod(), seen: seen(exited("c", 9, 1, delay(5*time.Minute), ran(11*time.Minute, time.Second)), image("c", 10)), want: []string{"start c#10 next 10s"}},
		{name: "Always restarts what succeeded", pod: pod(), seen: seen(exited("c", 0, 0), image("c", 1)), want: []string{"start c#1 next 10s"}},
		{name: "OnFailure restarts what failed", pod: pod(policy(corev1.RestartPolicyOnFailure), main("a"), main("b")), seen: seen(exited("a", 0, 0), exited("b", 0, 3), image("b", 1)), want: []string{"start b#1 next 10s"}},
		{name: "Never restarts nothing", pod: pod(policy(corev1.RestartPolicyNever), main("a"), main("b")), seen: seen(exited("a", 0, 1), running("b", 0))},
		{name: "a container that could not start has ended", pod: pod(), seen: seen(boxed("c", 0, runtime.Created, func(c *runtime.Container) { c.Reason = "StartError" }), image("c", 1)), want: []string{"start c#1 next 10s"}},
		{name: "of attempts the last two are kept", pod: pod(), seen: seen(exited("c", 0, 1), exited("c", 1, 1), running("c", 2)), want: []string{"remove c-0"}},
		{name: "a changed image restarts its container", pod: pod(main("c", func(c *corev1.Container) { c.Image = "img:2" })), seen: seen(running("c", 0)), want: []string{"stop c-0 " + grace + " again"}},
		{name: "whatever the policy", pod: pod(policy(corev1.RestartPolicyNever), main("c", func(c *corev1.Container) { c.Image = "img:2" })), seen: seen(running("c", 0)), want: []string{"stop c-0 " + grace + " again"}},
		{name: "a failed liveness probe restarts the container", pod: pod(main("c", liveness)), seen: seen(running("c", 0), probed("c-0", ProbeState{Failed: "liveness"})), want: []string{"stop c-0 " + grace + " again"}},
		{name: "though it ends well where only failures restart", pod: pod(main("c", liveness), policy(corev1.RestartPolicyOnFailure)), seen: seen(exited("c", 0, 0), again("c-0"), image("c", 1)), want: []string{"start c#1 next 10s"}},
		{name: "with a back-off as for any other end", pod: pod(main("c", liveness), policy(corev1.RestartPolicyOnFailure)), seen: seen(exited("c", 1, 0, delay(10*time.Second)), again("c-1"), image("c", 2)), wake: 9 * time.Second, wait: []string{"c"}},
		{name: "but where nothing restarts it only ends", pod: pod(main("c", liveness), policy(corev1.RestartPolicyNever)), seen: seen(running("c", 0), probed("c-0", ProbeState{Failed: "liveness"})), want: []string{"stop c-0 " + grace}},
		{name: "a container's own policy comes first", pod: pod(main("c", liveness, ownPolicy(corev1.ContainerRestartPolicyOnFailure)), policy(corev1.RestartPolicyNever)), seen: seen(running("c", 0), probed("c-0", ProbeState{Failed: "liveness"})), want: []string{"stop c-0 " + grace + " again"}},
		{name: "either way", pod: pod(main("c", liveness, ownPolicy(corev1.ContainerRestartPolicyNever))), seen: seen(running("c", 0), probed("c-0", ProbeState{Failed: "liveness"})), want: []string{"stop c-0 " + grace}},
		{name: "with the grace of the probe", pod: pod(main("c", func(c *corev1.Container) {
			s := int64(7)
			c.StartupProbe = &corev1.Probe{TerminationGracePeriodSeconds: &s}
		})), seen: seen(running("c", 0), probed("c-0", ProbeState{Failed: "startup"})), want: []string{"stop c-0 7s again"}},
		{name: "a container that the spec does not have goes", pod: pod(), seen: seen(running("c", 0), exited("x", 0, 0)), want: []string{"remove x-0"}},

		// Init containers.
		{name: "init containers come first", pod: pod(initC("i"), initC("j")), seen: seen(nothing), want: []string{"CreateSandbox", "MountVolumes", "image i#0"}},
		{name: "one after another", pod: pod(initC("i"), initC("j")), seen: seen(exited("i", 0, 0), image("j", 0)), want: []string{"start j#0"}},
		{name: "a running one is waited for", pod: pod(initC("i"), initC("j")), seen: seen(running("i", 0))},
		{name: "then the containers", pod: pod(initC("i")), seen: seen(exited("i", 0, 0), image("c", 0)), want: []string{"start c#0"}},
		{name: "a failed one starts again", pod: pod(initC("i")), seen: seen(exited("i", 0, 1), image("i", 1)), want: []string{"start i#1 next 10s"}},
		{name: "a failed one ends a pod that never restarts", pod: pod(initC("i"), policy(corev1.RestartPolicyNever)), seen: seen(exited("i", 0, 1)), want: []string{"RemoveSandbox", "UnmountVolumes"}},
		{name: "init containers do not run again when a container restarts", pod: pod(initC("i")), seen: seen(exited("i", 0, 0), exited("c", 0, 1), image("c", 1)), want: []string{"start c#1 next 10s"}},
		{name: "but do after a reboot", pod: pod(initC("i")), seen: seen(nothing, exited("i", 0, 0, otherBoot), exited("c", 0, 137, otherBoot)), want: []string{"CreateSandbox", "MountVolumes", "image i#1"}},
		{name: "a pod that never restarts is over after a reboot", pod: pod(policy(corev1.RestartPolicyNever)), seen: seen(nothing, exited("c", 0, 137, otherBoot))},
		{name: "an initialised pod does not need its init container's remains", pod: pod(initC("i")), seen: seen(running("c", 0))},

		// Sidecars.
		{name: "a sidecar comes before what follows it", pod: pod(sidecar("s")), seen: seen(image("s", 0), image("c", 0)), want: []string{"start s#0"}},
		{name: "a started sidecar is passed", pod: pod(sidecar("s")), seen: seen(running("s", 0), image("c", 0)), want: []string{"start c#0"}},
		{name: "its startup probe is waited for", pod: pod(sidecar("s", startup)), seen: seen(running("s", 0), image("c", 0))},
		{name: "until it succeeds", pod: pod(sidecar("s", startup)), seen: seen(running("s", 0), image("c", 0), probed("s-0", ProbeState{Started: true})), want: []string{"start c#0"}},
		{name: "its postStart hook too", pod: pod(sidecar("s")), seen: seen(running("s", 0), starting("s"), image("c", 0))},
		{name: "a sidecar restarts whatever the pod's policy", pod: pod(sidecar("s"), policy(corev1.RestartPolicyNever)), seen: seen(exited("s", 0, 0), running("c", 0), image("s", 1)), want: []string{"start s#1 next 10s"}},
		{name: "sidecars end after the containers", pod: pod(sidecar("s"), policy(corev1.RestartPolicyNever)), seen: seen(running("s", 0), exited("c", 0, 0)), want: []string{"stop s-0 " + grace}},
		{name: "and then the pod is over", pod: pod(sidecar("s"), policy(corev1.RestartPolicyNever)), seen: seen(exited("s", 0, 137), exited("c", 0, 0)), want: []string{"RemoveSandbox", "UnmountVolumes"}},

		// A shared PID namespace.
		{name: "its holder starts with the sandbox, images beside it", pod: pod(sharing), seen: seen(), want: []string{"StartPause", "image c#0"}},
		{name: "not without a sandbox", pod: pod(sharing), seen: seen(nothing, image("c", 0)), want: []string{"CreateSandbox", "MountVolumes"}},
		{name: "containers wait for it", pod: pod(sharing), seen: seen(image("c", 0)), want: []string{"StartPause"}},
		{name: "and join it", pod: pod(sharing), seen: seen(running(runtime.PauseName, 0, pid(7)), image("c", 0)), want: []string{"start c#0 beside 7"}},
		{name: "hostPID needs none", pod: pod(sharing, func(p *corev1.Pod) { p.Spec.HostPID = true }), seen: seen(image("c", 0)), want: []string{"start c#0"}},
		{name: "one that has died is removed", pod: pod(sharing), seen: seen(exited(runtime.PauseName, 0, 137), exited("c", 0, 137), image("c", 1)), want: []string{"remove POD-0"}},
		{name: "once its namespace is empty", pod: pod(sharing), seen: seen(exited(runtime.PauseName, 0, 137), running("c", 0))},
		{name: "one that never started too", pod: pod(sharing), seen: seen(boxed(runtime.PauseName, 0, runtime.Created), image("c", 0)), want: []string{"remove POD-0"}},
		{name: "it outlives the containers", pod: pod(sharing, deleting(5)), seen: seen(running(runtime.PauseName, 0), running("c", 0)), want: []string{"stop c-0 5s"}},
		{name: "but not the pod", pod: pod(sharing, deleting(5)), seen: seen(running(runtime.PauseName, 0), exited("c", 0, 0)), want: []string{"remove POD-0"}},
		{name: "nor a pod that has succeeded", pod: pod(sharing, policy(corev1.RestartPolicyNever)), seen: seen(running(runtime.PauseName, 0), exited("c", 0, 0)), want: []string{"remove POD-0"}},

		// Containers for debugging.
		{name: "one starts beside the others", pod: pod(debugger("d", "")), seen: seen(running("c", 0), image("d", 0)), want: []string{"start d#0"}},
		{name: "even while init containers run", pod: pod(initC("i"), debugger("d", "")), seen: seen(running("i", 0), image("d", 0)), want: []string{"start d#0"}},
		{name: "it sees its target", pod: pod(debugger("d", "c")), seen: seen(running("c", 0, pid(9)), image("d", 0)), want: []string{"start d#0 beside 9"}},
		{name: "which must run", pod: pod(debugger("d", "c")), seen: seen(exited("c", 1, 1, delay(10*time.Second)), image("c", 2), image("d", 0)), wake: 9 * time.Second, wait: []string{"c"}},
		{name: "in a shared namespace it sees everybody", pod: pod(sharing, debugger("d", "c")), seen: seen(running(runtime.PauseName, 0, pid(7)), running("c", 0, pid(9)), image("d", 0)), want: []string{"start d#0 beside 7"}},
		{name: "it is never restarted", pod: pod(debugger("d", "")), seen: seen(running("c", 0), exited("d", 0, 1), image("d", 1))},
		{name: "it ends with the pod", pod: pod(debugger("d", ""), deleting(5)), seen: seen(running("c", 0), running("d", 0)), want: []string{"stop c-0 5s", "stop d-0 5s"}},
		{name: "and does not keep a pod from succeeding", pod: pod(debugger("d", ""), policy(corev1.RestartPolicyNever)), seen: seen(exited("c", 0, 0), running("d", 0)), want: []string{"stop d-0 " + grace}},

		// Endings.
		{name: "deletion stops all containers", pod: pod(main("a"), main("b"), deleting(5)), seen: seen(running("a", 0), running("b", 0)), want: []string{"stop a-0 5s", "stop b-0 5s"}},
		{name: "sidecars outlive them, the last first", pod: pod(sidecar("s"), sidecar("t"), deleting(5)), seen: seen(running("s", 0), running("t", 0), exited("c", 0, 0), func(o *Observed) { o.StopTime = ago(time.Second) }), want: []string{"stop t-0 4s"}},
		{name: "with little grace left they get a little", pod: pod(sidecar("s"), deleting(5)), seen: seen(running("s", 0), exited("c", 0, 0), func(o *Observed) { o.StopTime = ago(time.Minute) }), want: []string{"stop s-0 2s"}},
		{name: "a start on its way is waited for", pod: pod(deleting(5)), seen: seen(starting("c"))},
		{name: "when all have ended the rest goes", pod: pod(deleting(5)), seen: seen(exited("c", 0, 0), exited("c", 1, 0)), want: []string{"RemoveSandbox", "remove c-1", "remove c-0"}},
		{name: "then files", pod: pod(deleting(5)), seen: seen(func(o *Observed) { o.Sandbox = nil }), want: []string{"RemoveFiles"}},
		{name: "then the API is told", pod: pod(deleting(5)), seen: seen(nothing), want: []string{"DeletePod"}},
		{name: "a pod that is gone from the API is taken down too", pod: pod(), seen: seen(running("c", 0), func(o *Observed) { o.Gone = true }), want: []string{"stop c-0 " + grace}},
		{name: "and is done when nothing is left", pod: pod(), seen: seen(nothing, func(o *Observed) { o.Gone = true }), done: true},
		{name: "nothing starts in a deleted pod", pod: pod(deleting(5)), seen: seen(nothing, image("c", 0)), want: []string{"DeletePod"}},
		{name: "a finished pod keeps its containers for their logs", pod: pod(policy(corev1.RestartPolicyNever)), seen: seen(exited("c", 0, 0)), want: []string{"RemoveSandbox", "UnmountVolumes"}},
		{name: "and then rests", pod: pod(policy(corev1.RestartPolicyNever)), seen: seen(nothing, exited("c", 0, 0))},
		{name: "a phase that is final stays", pod: pod(phase(corev1.PodFailed)), seen: seen(running("c", 0)), want: []string{"stop c-0 " + grace}},
		{name: "the deadline wakes the worker", pod: pod(deadline(90)), seen: seen(running("c", 0)), wake: 30 * time.Second},
		{name: "and ends the pod", pod: pod(deadline(60)), seen: seen(running("c", 0)), want: []string{"stop c-0 " + grace}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := plan(tt.pod, tt.seen)
			var got []string
			for _, a := range p.Actions {
				got = append(got, short(a))
			}
			if d := cmp.Diff(sortedStrings(tt.want), sortedStrings(got)); d != "" {
				t.Errorf("actions (-want +got):\n%s", d)
			}
			wake := time.Duration(0)
			if !p.Wake.IsZero() {
				wake = p.Wake.Sub(now)
			}
			if wake != tt.wake || p.Done != tt.done || strings.Join(p.Waiting, " ") != strings.Join(tt.wait, " ") {
				t.Errorf("wake %v done %v waiting %v, want %v %v %v", wake, p.Done, p.Waiting, tt.wake, tt.done, tt.wait)
			}
		})
	}
}

func TestPlanProbes(t *testing.T) {
	tests := []struct {
		name string
		pod  *corev1.Pod
		seen *Observed
		want []Target
	}{
		{"running containers are probed", pod(sidecar("s"), main("c", readiness)), seen(running("s", 0), running("c", 0)), []Target{{"s", "s-0", false}, {"c", "c-0", false}}},
		{"not while they start", pod(main("c", readiness)), seen(running("c", 0), starting("c")), nil},
		{"readiness alone while they end", pod(main("c", readiness, liveness), deleting(5)), seen(running("c", 0)), []Target{{"c", "c-0", true}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, plan(tt.pod, tt.seen).Probes); d != "" {
				t.Errorf("probes (-want +got):\n%s", d)
			}
		})
	}
}

// The back-off never shrinks while a container keeps failing, and never passes five minutes.
func TestRestartBackoffProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d, last := time.Duration(0), time.Duration(-1)
		at := now
		for range rapid.IntRange(1, 30).Draw(t, "crashes") {
			lived := time.Duration(rapid.Int64Range(0, int64(calmAfter)-1).Draw(t, "lived"))
			finished := at.Add(lived)
			next, note := restartAfter(d, at, finished)
			waited := next.Sub(finished)
			if waited < last || waited > maxDelay || note < firstDelay || note > maxDelay {
				t.Fatalf("waited %v after %v, notes %v", waited, last, note)
			}
			d, last, at = note, waited, next
		}
		long := at.Add(calmAfter)
		if next, note := restartAfter(d, at, long); !next.Equal(long) || note != firstDelay {
			t.Fatalf("after a long run: waits %v, notes %v", next.Sub(long), note)
		}
	})
}

// model carries out a plan on an Observed, as a perfect node would.
type model struct {
	o    *Observed
	exit map[string]int32 // containers that end by themselves, with this code
}

func (m *model) apply(t *rapid.T, a Action) {
	o := m.o
	find := func() *runtime.Container {
		for i := range o.Containers {
			if o.Containers[i].ID == a.ID {
				return &o.Containers[i]
			}
		}
		t.Fatalf("%s of container %s, which is not there", a.Kind, a.ID)
		return nil
	}
	switch a.Kind {
	case CreateSandbox:
		o.Sandbox = &sandbox.Sandbox{PodUID: types.UID("uid")}
	case RemoveSandbox:
		o.Sandbox = nil
	case MountVolumes:
		o.Volumes = VolumeState{Ready: true, Present: true, Files: true}
	case UnmountVolumes:
		o.Volumes.Ready, o.Volumes.Present = false, false
	case RemoveFiles:
		o.Volumes = VolumeState{}
	case EnsureImage:
		o.Images[a.Container] = ImageState{Attempt: a.Attempt, Ready: true}
	case StartContainer:
		if o.Sandbox == nil || !o.Volumes.Ready {
			t.Fatalf("container %s starts without sandbox or volumes", a.Container)
		}
		running(a.Container, a.Attempt, delay(a.Delay), func(c *runtime.Container) { c.StartedAt = o.Now })(o)
	case StartPause:
		if o.Sandbox == nil {
			t.Fatal("the PID namespace is made without a sandbox")
		}
		running(runtime.PauseName, 0)(o)
	case StopContainer:
		c := find()
		c.State, c.ExitCode, c.FinishedAt = runtime.Exited, 137, o.Now
	case RemoveContainer:
		if find().State == runtime.Running && a.Container != runtime.PauseName {
			t.Fatalf("container %s is removed while it runs", a.ID)
		}
		for i := range o.Containers {
			if o.Containers[i].ID == a.ID {
				o.Containers = append(o.Containers[:i:i], o.Containers[i+1:]...)
				break
			}
		}
	case DeletePod:
		if len(o.Containers) > 0 || o.Sandbox != nil || o.Volumes.Files {
			t.Fatal("the pod is deleted while something of it is left")
		}
		o.Gone = true
	}
}

// Whatever the pod and whatever state it is found in, its plans reach a state in which nothing is left to do.
func TestPlanConvergesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := pod(policy(rapid.SampledFrom([]corev1.RestartPolicy{corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever}).Draw(t, "policy")))
		p.Spec.Containers = nil
		for i := range rapid.IntRange(0, 3).Draw(t, "init") {
			if rapid.Bool().Draw(t, "sidecar") {
				sidecar(fmt.Sprintf("s%d", i))(p)
			} else {
				initC(fmt.Sprintf("i%d", i))(p)
			}
		}
		for i := range rapid.IntRange(1, 3).Draw(t, "containers") {
			main(fmt.Sprintf("c%d", i))(p)
		}
		if rapid.Bool().Draw(t, "shares processes") {
			sharing(p)
		}
		if rapid.Bool().Draw(t, "debugged") {
			debugger("d", rapid.SampledFrom([]string{"", p.Spec.Containers[0].Name}).Draw(t, "target"))(p)
		}
		o := seen(nothing)
		if rapid.Bool().Draw(t, "sandbox") {
			o.Sandbox = &sandbox.Sandbox{}
		}
		m := &model{o: o, exit: map[string]int32{}}
		for _, c := range append(containersOf(p), &corev1.Container{Name: runtime.PauseName}) {
			for n := range rapid.IntRange(0, 3).Draw(t, "attempts") {
				switch rapid.IntRange(0, 3).Draw(t, "state") {
				case 0:
					running(c.Name, n)(o)
				case 1:
					boxed(c.Name, n, runtime.Created)(o)
				default:
					exited(c.Name, n, int32(rapid.IntRange(0, 1).Draw(t, "code")), delay(time.Duration(rapid.IntRange(0, 300).Draw(t, "delay"))*time.Second))(o)
				}
			}
			// Init containers end well in the end, or none could converge.
			if c.RestartPolicy == nil && isInit(p, c) {
				m.exit[c.Name] = 0
			}
		}
		deleteAfter := rapid.IntRange(0, 20).Draw(t, "deleted after")
		for step := range 200 {
			if step == deleteAfter {
				deleting(int64(rapid.IntRange(0, 30).Draw(t, "grace")))(p)
			}
			for i := range o.Containers {
				c := &o.Containers[i]
				if code, ok := m.exit[c.Name]; ok && c.State == runtime.Running {
					c.State, c.ExitCode, c.FinishedAt = runtime.Exited, code, o.Now
				}
			}
			pl := plan(p, o)
			_ = status(p, o)
			if pl.Done {
				return
			}
			for _, a := range pl.Actions {
				m.apply(t, a)
			}
			if len(pl.Actions) == 0 && !pl.Wake.IsZero() {
				o.Now = pl.Wake
			}
		}
		t.Fatalf("not done after 200 plans; the last: %+v", plan(p, o))
	})
}

// An agent that died between the sandbox and its files leaves a sandbox in which nothing can start.
func TestPlanFurnishesTheSandbox(t *testing.T) {
	has := func(p Plan, k Kind) bool {
		return slices.ContainsFunc(p.Actions, func(a Action) bool { return a.Kind == k })
	}
	bare := func(o *Observed) { o.Unfurnished = true }
	ready := func(o *Observed) { o.Images["c"] = ImageState{Ready: true} }
	if p := plan(pod(), seen(bare, ready)); !has(p, CreateSandbox) || has(p, StartContainer) {
		t.Errorf("unfurnished: %+v", p.Actions)
	}
	if p := plan(pod(), seen(ready)); has(p, CreateSandbox) || !has(p, StartContainer) {
		t.Errorf("furnished: %+v", p.Actions)
	}
	if p := plan(pod(deleting(0)), seen(bare)); has(p, CreateSandbox) || !has(p, RemoveSandbox) {
		t.Errorf("deleted: %+v", p.Actions)
	}
}
