// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/runtime"
)

// Kind of action.
type Kind string

// Actions. Each may be planned again while it is on its way: the worker starts it once.
const (
	CreateSandbox   Kind = "CreateSandbox"
	RemoveSandbox   Kind = "RemoveSandbox"
	MountVolumes    Kind = "MountVolumes" // also refreshes what has changed
	UnmountVolumes  Kind = "UnmountVolumes"
	EnsureImage     Kind = "EnsureImage"
	StartContainer  Kind = "StartContainer"
	StartPause      Kind = "StartPause" // the first process of a PID namespace that the pod's containers share
	Resize          Kind = "Resize"     // cgroups follow what the pod was given
	StopContainer   Kind = "StopContainer"
	RemoveContainer Kind = "RemoveContainer"
	RemoveFiles     Kind = "RemoveFiles" // volumes, the pod's directory, its logs
	DeletePod       Kind = "DeletePod"   // tell the API that nothing is left
)

// Action is one thing to do.
type Action struct {
	Kind      Kind
	Container string        // container name; EnsureImage: the image's key (wantedImage)
	ID        string        // container id: Stop, Remove
	Attempt   int           // EnsureImage, StartContainer
	Delay     time.Duration // StartContainer: the back-off to note on the container
	TargetPID uint32        // StartContainer: a process whose PID namespace it shares; 0 for none
	Grace     time.Duration // StopContainer
	Message   string        // StopContainer: for the event
	Again     bool          // StopContainer: it starts again, whatever it ends with
	Resize    bool          // StopContainer: it starts again at once, with other resources
}

// Plan is what to do now and when to think again.
type Plan struct {
	Actions []Action
	// Probes are the containers whose probes must run, by container id; all other probes stop.
	Probes []Target
	// Waiting names containers that are in restart back-off.
	Waiting []string
	// Wake is when time alone changes the plan; zero for never.
	Wake time.Time
	// Ending: starts and pulls that are on their way are to be given up.
	Ending bool
	// Done: nothing of the pod is left and the API does not have it either.
	Done bool
}

// Target is a container to probe.
type Target struct {
	Container string
	ID        string
	// ReadinessOnly: the pod is ending, so nothing is restarted any more.
	ReadinessOnly bool
}

func (p *Plan) do(a Action) { p.Actions = append(p.Actions, a) }

func (p *Plan) wakeAt(t time.Time) {
	if !t.IsZero() && (p.Wake.IsZero() || t.Before(p.Wake)) {
		p.Wake = t
	}
}

// due reports whether f allows another try, and plans to wake when it will.
func (p *Plan) due(f *Failure, now time.Time) bool {
	if f == nil || !now.Before(f.RetryAt) {
		return true
	}
	p.wakeAt(f.RetryAt)
	return false
}

func plan(pod *corev1.Pod, o *Observed) Plan {
	v := look(pod, o)
	var p Plan
	v.prune(&p)
	if v.ending() {
		p.Ending = true
		v.planEnd(&p)
	} else {
		v.planRun(&p)
	}
	return p
}

// prune removes what is kept for nobody: of each container the newest attempt and the one before stay.
func (v *view) prune(p *Plan) {
	for _, c := range v.previous() {
		if c.State == runtime.Running {
			p.do(Action{Kind: StopContainer, Container: c.Name, ID: c.ID, Message: "Container " + c.Name + " is superseded"})
		}
	}
	for _, c := range slices.Concat(v.old, v.stray) {
		if c.State == runtime.Running {
			p.do(Action{Kind: StopContainer, Container: c.Name, ID: c.ID, Message: "Container " + c.Name + " is superseded"})
		} else {
			p.do(Action{Kind: RemoveContainer, Container: c.Name, ID: c.ID})
		}
	}
}

// planRun brings the pod up and keeps it up.
func (v *view) planRun(p *Plan) {
	o := v.o
	p.wakeAt(v.deadline())
	if o.Sandbox != nil && o.Unfurnished && p.due(o.SandboxFailure, o.Now) {
		p.do(Action{Kind: CreateSandbox}) // which finds the sandbox, and writes the files
	}
	if o.Sandbox == nil {
		// Without its namespaces a running container is cut off: it must go before the sandbox is made anew.
		cut := false
		for _, c := range v.all() {
			if l := v.latest[c.Name]; l != nil && l.State == runtime.Running {
				cut = true
				v.stop(p, c, l, v.grace(), "Pod sandbox changed, it will be killed and re-created.")
			}
		}
		if cut {
			return
		}
		if p.due(o.SandboxFailure, o.Now) {
			p.do(Action{Kind: CreateSandbox})
		}
	}
	if !o.Volumes.Ready || o.Volumes.Stale || !o.Volumes.Refresh.IsZero() && !o.Now.Before(o.Volumes.Refresh) {
		if p.due(o.Volumes.Failure, o.Now) {
			p.do(Action{Kind: MountVolumes})
		}
	} else {
		p.wakeAt(o.Volumes.Refresh)
	}

	v.planResize(p)
	v.planPause(p)
	v.planEphemeral(p)

	initialized := v.initialized()
	for i := range v.pod.Spec.InitContainers {
		c := &v.pod.Spec.InitContainers[i]
		l := v.latest[c.Name]
		if podutil.IsRestartableInitContainer(c) {
			v.keep(p, c)
		} else if !initialized && !v.initPassed(c) && (l == nil || l.State != runtime.Running) {
			v.start(p, c)
		}
		if !initialized && !v.initPassed(c) {
			return
		}
	}
	for i := range v.pod.Spec.Containers {
		c := &v.pod.Spec.Containers[i]
		if !v.over(c) {
			v.keep(p, c)
		}
	}
}

// keep has a long-running container running, healthy and of the right image.
func (v *view) keep(p *Plan, c *corev1.Container) {
	l := v.latest[c.Name]
	if v.o.Starting[c.Name] {
		return
	}
	if l == nil || l.State != runtime.Running {
		v.start(p, c)
		return
	}
	probe := v.o.Probes[l.ID]
	switch {
	case changed(c, l):
		v.replace(p, c, l, v.grace(), "definition changed", true)
	case probe.Failed == "liveness":
		v.replace(p, c, l, v.probeGrace(c.LivenessProbe), "failed liveness probe", v.restartsUnhealthy(c))
	case probe.Failed == "startup":
		v.replace(p, c, l, v.probeGrace(c.StartupProbe), "failed startup probe", v.restartsUnhealthy(c))
	case restartsFor(c, resizeOf(c, l)) && v.roomy():
		p.do(Action{Kind: StopContainer, Container: c.Name, ID: l.ID, Grace: v.grace(), Message: fmt.Sprintf("Container %s resize requires restart", c.Name), Resize: true})
	}
	p.Probes = append(p.Probes, Target{Container: c.Name, ID: l.ID})
}

// start has the next attempt of a container started: its image first, then, once sandbox and volumes are there, itself.
func (v *view) start(p *Plan, c *corev1.Container) {
	o, l := v.o, v.latest[c.Name]
	if o.Starting[c.Name] {
		return
	}
	attempt, next := 0, time.Duration(0)
	if l != nil && l.State == runtime.Created {
		// An agent that died left it between creation and start.
		p.do(Action{Kind: RemoveContainer, Container: c.Name, ID: l.ID})
		return
	}
	if l != nil {
		attempt = l.Attempt + 1
		var at time.Time
		at, next = v.restart(l)
		if o.Now.Before(at) {
			p.wakeAt(at)
			p.Waiting = append(p.Waiting, c.Name)
			return
		}
	}
	if !p.due(o.Starts[c.Name], o.Now) {
		return
	}
	if !v.imagesHere(p, c, attempt) {
		return
	}
	if o.Sandbox == nil || o.Unfurnished || !o.Volumes.Ready || !v.roomy() {
		return
	}
	pid, ok := v.targetPID(c.Name)
	if !ok {
		return
	}
	p.do(Action{Kind: StartContainer, Container: c.Name, Attempt: attempt, Delay: next, TargetPID: pid})
}

func (v *view) stop(p *Plan, c *corev1.Container, l *runtime.Container, grace time.Duration, message string) {
	p.do(Action{Kind: StopContainer, Container: c.Name, ID: l.ID, Grace: grace, Message: message})
}

// replace stops a container for a reason, and with again has it start anew.
func (v *view) replace(p *Plan, c *corev1.Container, l *runtime.Container, grace time.Duration, reason string, again bool) {
	message := "Container " + c.Name + " " + reason
	if again {
		message += ", will be restarted"
	}
	p.do(Action{Kind: StopContainer, Container: c.Name, ID: l.ID, Grace: grace, Message: message, Again: again})
}

// planEnd takes the pod down in order: containers, sidecars backwards, then what they used, then the API object.
func (v *view) planEnd(p *Plan) {
	o := v.o
	grace := v.grace()
	main, busy := false, false
	var sidecars []*corev1.Container
	for _, c := range v.all() {
		busy = busy || o.Starting[c.Name]
		l := v.latest[c.Name]
		if l == nil || l.State != runtime.Running {
			continue
		}
		busy = true
		if podutil.IsRestartableInitContainer(c) {
			sidecars = append(sidecars, c)
			continue
		}
		main = true
		v.stop(p, c, l, grace, "Stopping container "+c.Name)
		if c.ReadinessProbe != nil {
			p.Probes = append(p.Probes, Target{Container: c.Name, ID: l.ID, ReadinessOnly: true})
		}
	}
	if !main && len(sidecars) > 0 {
		last := sidecars[len(sidecars)-1]
		left := grace
		if !o.StopTime.IsZero() {
			left = max(grace-o.Now.Sub(o.StopTime), min(grace, minGrace))
		}
		v.stop(p, last, v.latest[last.Name], left, "Stopping container "+last.Name)
	}
	for _, c := range sidecars {
		if c.ReadinessProbe != nil {
			p.Probes = append(p.Probes, Target{Container: c.Name, ID: v.latest[c.Name].ID, ReadinessOnly: true})
		}
	}
	if busy || !v.stopped() {
		return
	}
	if v.pause != nil {
		p.do(Action{Kind: RemoveContainer, Container: v.pause.Name, ID: v.pause.ID})
		return
	}
	if o.Sandbox != nil && p.due(o.SandboxFailure, o.Now) {
		p.do(Action{Kind: RemoveSandbox})
	}
	if !v.deleted() {
		if o.Volumes.Present && p.due(o.Volumes.Failure, o.Now) {
			p.do(Action{Kind: UnmountVolumes})
		}
		return
	}
	for _, c := range slices.Concat(v.newest(), v.previous()) {
		p.do(Action{Kind: RemoveContainer, Container: c.Name, ID: c.ID})
	}
	if len(o.Containers) > 0 || o.Sandbox != nil {
		return
	}
	switch {
	case o.Volumes.Files || o.Volumes.Present:
		if p.due(o.Volumes.Failure, o.Now) {
			p.do(Action{Kind: RemoveFiles})
		}
	case !o.Gone:
		p.do(Action{Kind: DeletePod})
	default:
		p.Done = true
	}
}

// evictionGrace is what containers get that are in the way of all others (kubelet: immediateEvictionGracePeriodSeconds).
const evictionGrace = time.Second

// minGrace is what a sidecar gets at least after the containers have used up the pod's grace.
const minGrace = 2 * time.Second

// grace is how long the containers of the pod have between the stop signal and the end.
func (v *view) grace() time.Duration {
	if e := v.o.Ended; e != nil {
		return min(e.Grace, v.ownGrace())
	}
	return v.ownGrace()
}

func (v *view) ownGrace() time.Duration {
	if s := v.pod.DeletionGracePeriodSeconds; s != nil && v.pod.DeletionTimestamp != nil {
		return time.Duration(max(*s, 0)) * time.Second
	}
	if s := v.pod.Spec.TerminationGracePeriodSeconds; s != nil {
		return time.Duration(max(*s, 0)) * time.Second
	}
	return corev1.DefaultTerminationGracePeriodSeconds * time.Second
}

func (v *view) probeGrace(probe *corev1.Probe) time.Duration {
	if probe != nil && probe.TerminationGracePeriodSeconds != nil {
		return time.Duration(*probe.TerminationGracePeriodSeconds) * time.Second
	}
	return v.grace()
}

// all lists the containers of the spec: init containers first, those for debugging last.
func (v *view) all() []*corev1.Container { return containersOf(v.pod) }

func (v *view) newest() []*runtime.Container   { return sorted(v.latest) }
func (v *view) previous() []*runtime.Container { return sorted(v.prev) }

func sorted(m map[string]*runtime.Container) []*runtime.Container {
	out := make([]*runtime.Container, 0, len(m))
	for _, c := range m {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *runtime.Container) int { return cmp.Compare(a.ID, b.ID) })
	return out
}
