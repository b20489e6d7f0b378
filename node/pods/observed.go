// SPDX-License-Identifier: Apache-2.0

// Package pods brings the pods of this node to life and keeps them there. One goroutine owns one
// pod: it compares what the API wants (the Pod) with what exists (Observed), asks plan what to do,
// and starts each action beside itself. plan and status are pure functions.
package pods

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/sandbox/cgroup"
)

// Annotations that a container carries through a restart of the agent.
const (
	// annotationImage is the image of the pod spec that the container was made from: a change of it restarts the container.
	annotationImage = "skep.io/image"
	// annotationDelay is how long to wait before restarting the container once it has ended.
	annotationDelay = "skep.io/restart-delay"
	// annotationBoot names the boot of the machine that made the container: init containers run again after a reboot.
	annotationBoot = "skep.io/boot-id"
)

// Back-off between restarts, as kubelet does it (kubelet.go: containerBackOff).
const (
	firstDelay = 10 * time.Second
	maxDelay   = 5 * time.Minute
	// calmAfter is how long a container must have run for its back-off to be forgotten.
	calmAfter = 10 * time.Minute
)

// startErrorCode is the exit code shown for a container whose process never started.
const startErrorCode = 128

// Failure is why something could not be done, and when it is tried again.
type Failure struct {
	Reason  string
	Message string
	RetryAt time.Time
}

// ImageState says whether a container's image is here.
type ImageState struct {
	Attempt int // the container's attempt that this is for: policy Always looks again for each
	Image   runtime.Image
	Ready   bool
	Pulling bool
	Failure *Failure // ErrImagePull and its like
}

// ProbeState is what the probes of one container (one attempt) last said.
type ProbeState struct {
	Started bool   // startup probe succeeded
	Ready   bool   // readiness probe succeeds
	Failed  string // "liveness" or "startup" once that probe gave up
}

// VolumeState is how far the volumes of a pod are.
type VolumeState struct {
	Ready   bool      // all mounted: containers may start
	Stale   bool      // something they show has changed
	Present bool      // something is there to unmount
	Files   bool      // the pod's directory or its logs exist
	Refresh time.Time // when a token needs renewing; zero for never
	Failure *Failure
}

// Observed is everything that plan decides on beside the Pod. Nobody changes it while plan runs.
type Observed struct {
	Now            time.Time
	BootID         string
	StartTime      time.Time // when this node accepted the pod
	StopTime       time.Time // when the pod was first told to stop; zero if it was not
	Gone           bool      // the API no longer has the pod
	Refused        *refusal  // why this node does not take the pod; nil if it does
	Ended          *Ending   // why this node ends the pod; nil if it does not
	Sandbox        *sandbox.Sandbox
	Unfurnished    bool // the sandbox is there, but an agent that died may not have written the files that go with it
	SandboxFailure *Failure
	Volumes        VolumeState
	Containers     []runtime.Container
	Starting       map[string]bool       // by container name: a start is on its way
	Starts         map[string]*Failure   // by container name: why the last start left no container
	Images         map[string]ImageState // by container name
	Probes         map[string]ProbeState // by container id
	Messages       map[string]string     // by container id: termination message
	Resized        map[string]bool       // by container id: it was stopped to start again with other resources
	Again          map[string]bool       // by container id: it was stopped to start again, whatever it ended with
	Limits         *cgroup.Limits        // of the pod's cgroup; nil if they are not known
	PodPids        int64                 // Terms.PodPids
	Pending        *pending              // why the pod does not get the resources of its spec; nil if it does
	ResizeFailure  *Failure
	NodeIPs        []string
}

// view is what plan and status read off a pod and what was observed of it.
type view struct {
	pod    *corev1.Pod
	o      *Observed
	latest map[string]*runtime.Container // newest attempt of each container
	prev   map[string]*runtime.Container // the one before
	old    []*runtime.Container          // all others
	pause  *runtime.Container            // holds the PID namespace that the pod's containers share; nil if there is none
	stray  []*runtime.Container          // containers that the spec does not name
}

func look(pod *corev1.Pod, o *Observed) *view {
	v := &view{pod: pod, o: o, latest: map[string]*runtime.Container{}, prev: map[string]*runtime.Container{}}
	known := map[string]bool{}
	for _, c := range v.all() {
		known[c.Name] = true
	}
	for i := range o.Containers {
		c := o.Containers[i]
		if c.State == runtime.Created && c.Reason != "" {
			// It could not start, and never will: users see it as ended.
			c.State, c.ExitCode = runtime.Exited, startErrorCode
			if c.FinishedAt.IsZero() {
				c.FinishedAt = c.CreatedAt
			}
		}
		if c.Name == runtime.PauseName && sharesProcesses(pod) {
			if v.pause == nil || v.pause.Attempt < c.Attempt {
				v.pause = &c
			}
			continue
		}
		if !known[c.Name] {
			v.stray = append(v.stray, &c)
			continue
		}
		switch l, p := v.latest[c.Name], v.prev[c.Name]; {
		case l == nil || c.Attempt > l.Attempt:
			if p != nil {
				v.old = append(v.old, p)
			}
			v.latest[c.Name] = &c
			if l != nil {
				v.prev[c.Name] = l
			}
		case p == nil || c.Attempt > p.Attempt:
			if p != nil {
				v.old = append(v.old, p)
			}
			v.prev[c.Name] = &c
		default:
			v.old = append(v.old, &c)
		}
	}
	return v
}

// thisBoot reports whether c was made since the machine started.
func (v *view) thisBoot(c *runtime.Container) bool {
	b := c.Annotations[annotationBoot]
	return b == "" || v.o.BootID == "" || b == v.o.BootID
}

// initialized reports whether the init containers have had their turn: a regular container of this boot exists.
func (v *view) initialized() bool {
	for i := range v.pod.Spec.Containers {
		name := v.pod.Spec.Containers[i].Name
		if l := v.latest[name]; l != nil && v.thisBoot(l) {
			return true
		}
	}
	return v.initDone()
}

// initDone reports whether every init container is past the point where the next may start.
func (v *view) initDone() bool {
	for i := range v.pod.Spec.InitContainers {
		if !v.initPassed(&v.pod.Spec.InitContainers[i]) {
			return false
		}
	}
	return true
}

func (v *view) initPassed(c *corev1.Container) bool {
	l := v.latest[c.Name]
	if l == nil || !v.thisBoot(l) {
		return false
	}
	if podutil.IsRestartableInitContainer(c) {
		return v.started(c, l)
	}
	return l.State == runtime.Exited && l.ExitCode == 0
}

// started reports whether the container runs, its postStart hook is done and its startup probe, if any, has succeeded.
func (v *view) started(c *corev1.Container, l *runtime.Container) bool {
	return l != nil && l.State == runtime.Running && !v.o.Starting[c.Name] && (c.StartupProbe == nil || v.o.Probes[l.ID].Started)
}

func (v *view) ready(c *corev1.Container, l *runtime.Container) bool {
	return v.started(c, l) && (c.ReadinessProbe == nil || v.o.Probes[l.ID].Ready)
}

// over reports whether the container has ended and must not start again.
func (v *view) over(c *corev1.Container) bool {
	l := v.latest[c.Name]
	return l != nil && l.State == runtime.Exited && !v.o.Starting[c.Name] && !v.again(c, l)
}

// again reports whether a container that has ended is to start again. How it ended decides only if it did so by itself.
func (v *view) again(c *corev1.Container, l *runtime.Container) bool {
	return v.o.Resized[l.ID] || v.o.Again[l.ID] || podutil.ContainerShouldRestart(*c, v.pod.Spec, l.ExitCode)
}

// restartsUnhealthy reports whether a container that a probe has given up starts again once it is stopped. Rules about exit
// codes have no say, as it has not ended by itself (kubelet: computePodActions).
func (v *view) restartsUnhealthy(c *corev1.Container) bool {
	if c.RestartPolicy != nil {
		return *c.RestartPolicy != corev1.ContainerRestartPolicyNever
	}
	return v.pod.Spec.RestartPolicy != corev1.RestartPolicyNever
}

// initFailed reports whether an init container failed for good.
func (v *view) initFailed() bool {
	for i := range v.pod.Spec.InitContainers {
		c := &v.pod.Spec.InitContainers[i]
		if l := v.latest[c.Name]; !podutil.IsRestartableInitContainer(c) && l != nil && l.ExitCode != 0 && v.over(c) {
			return true
		}
	}
	return false
}

// completed reports whether all regular containers are over.
func (v *view) completed() bool {
	for i := range v.pod.Spec.Containers {
		if !v.over(&v.pod.Spec.Containers[i]) {
			return false
		}
	}
	return true
}

func (v *view) pastDeadline() bool {
	d := v.deadline()
	return !d.IsZero() && !v.o.Now.Before(d)
}

// deadline is when spec.activeDeadlineSeconds is over; zero for never.
func (v *view) deadline() time.Time {
	if s := v.pod.Spec.ActiveDeadlineSeconds; s != nil && !v.o.StartTime.IsZero() {
		return v.o.StartTime.Add(time.Duration(*s) * time.Second)
	}
	return time.Time{}
}

func (v *view) deleted() bool { return v.pod.DeletionTimestamp != nil || v.o.Gone }

// ending reports whether nothing of the pod may start any more.
func (v *view) ending() bool {
	return v.deleted() || v.o.Refused != nil || v.o.Ended != nil || podutil.IsPodPhaseTerminal(v.pod.Status.Phase) || v.pastDeadline() || v.initFailed() || v.completed()
}

// stopped reports whether no process of the pod is left and none is about to start.
func (v *view) stopped() bool {
	for _, b := range v.o.Starting {
		if b {
			return false
		}
	}
	for i := range v.o.Containers {
		if c := &v.o.Containers[i]; c.State == runtime.Running && c.Name != runtime.PauseName {
			return false
		}
	}
	return true
}

// restart says when an ended container may start again, and the delay to note on it for the time after.
func (v *view) restart(l *runtime.Container) (at time.Time, next time.Duration) {
	delay, err := time.ParseDuration(l.Annotations[annotationDelay])
	if err != nil || delay < 0 {
		delay = 0
	}
	if v.o.Resized[l.ID] {
		return l.FinishedAt, delay // it did not fail
	}
	return restartAfter(delay, l.StartedAt, l.FinishedAt)
}

// restartAfter is the back-off: the first restart is immediate, then 10 s, doubling up to 5 min, and all is forgotten
// once the container has run for 10 min.
func restartAfter(delay time.Duration, started, finished time.Time) (at time.Time, next time.Duration) {
	if !started.IsZero() && finished.Sub(started) >= calmAfter {
		delay = 0
	}
	return finished.Add(delay), min(max(2*delay, firstDelay), maxDelay)
}

// changed reports whether the pod spec names another image than the container was made from.
func changed(c *corev1.Container, l *runtime.Container) bool {
	was, ok := l.Annotations[annotationImage]
	return ok && was != c.Image
}
