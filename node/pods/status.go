// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/volumes"
)

// Reasons that users know from kubelet.
const (
	reasonPodInitializing   = "PodInitializing"
	reasonContainerCreating = "ContainerCreating"
	reasonCrashLoop         = "CrashLoopBackOff"
	reasonDeadline          = "DeadlineExceeded"
	reasonEvicted           = "Evicted"
	messageDeadline         = "Pod was active on the node longer than the specified deadline"
)

// status says what the API should show of a pod. It starts from pod.Status, which others write too: their conditions stay.
func status(pod *corev1.Pod, o *Observed) corev1.PodStatus {
	v := look(pod, o)
	s := *pod.Status.DeepCopy()
	ending := v.ending()
	if r := o.Refused; r != nil && !podutil.IsPodPhaseTerminal(s.Phase) {
		// Nothing of it was ever there: no containers, no conditions (kubelet: rejectPod).
		s.ObservedGeneration, s.QOSClass = pod.Generation, qos.GetPodQOS(pod)
		s.Phase, s.Reason, s.Message = corev1.PodFailed, r.Reason, "Pod was rejected: "+r.Message
		return s
	}
	if podutil.IsPodPhaseTerminal(s.Phase) && len(o.Containers) == 0 && len(s.ContainerStatuses) == 0 {
		return s // refused, or ended by somebody else before it began
	}

	s.ObservedGeneration = pod.Generation
	s.InitContainerStatuses = v.containerStatuses(pod.Spec.InitContainers, true, ending)
	s.ContainerStatuses = v.containerStatuses(pod.Spec.Containers, false, ending)
	s.EphemeralContainerStatuses = v.ephemeralStatuses(ending)
	if s.StartTime == nil && !o.StartTime.IsZero() {
		t := stamp(o.StartTime)
		s.StartTime = &t
	}
	if s.QOSClass == "" {
		s.QOSClass = qos.GetPodQOS(pod)
	}
	if len(o.NodeIPs) > 0 {
		s.HostIP, s.HostIPs = o.NodeIPs[0], nil
		for _, ip := range o.NodeIPs {
			s.HostIPs = append(s.HostIPs, corev1.HostIP{IP: ip})
		}
	}
	v.addresses(&s)
	v.podResources(&s)
	if !podutil.IsPodPhaseTerminal(s.Phase) {
		s.Phase = v.phase(ending)
		if v.pastDeadline() && !v.deleted() && !v.completed() {
			s.Reason, s.Message = reasonDeadline, messageDeadline
		}
		if v.o.Ended != nil && podutil.IsPodPhaseTerminal(s.Phase) { // not while something of it still runs
			s.Reason, s.Message = v.o.Ended.Reason, v.o.Ended.Message
		}
	}
	v.conditions(&s)
	return s
}

// podResources says what the pod as a whole was given, and has once its cgroup does.
func (v *view) podResources(s *corev1.PodStatus) {
	given := v.pod.Spec.Resources
	if given == nil {
		return
	}
	s.AllocatedResources = resource.PodRequests(v.pod, resource.PodResourcesOptions{})
	if l := v.o.Limits; s.Resources == nil || l != nil && *l == podLimits(v.pod, v.o.PodPids) {
		s.Resources = given.DeepCopy()
	}
}

func (v *view) addresses(s *corev1.PodStatus) {
	var ips []string
	switch {
	case v.pod.Spec.HostNetwork:
		ips = v.o.NodeIPs
	case v.o.Sandbox != nil:
		for _, a := range v.o.Sandbox.Addrs {
			ips = append(ips, a.String())
		}
	default:
		return // a finished pod keeps what it had
	}
	if len(ips) == 0 {
		return
	}
	s.PodIP, s.PodIPs = ips[0], nil
	for _, ip := range ips {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: ip})
	}
}

// phase is what kubelet's getPhase says, and for an ending pod what its containers came to once none is left.
func (v *view) phase(ending bool) corev1.PodPhase {
	spec := &v.pod.Spec
	if ending && v.stopped() {
		if v.o.Ended != nil || v.initFailed() || v.pastDeadline() && !v.completed() {
			return corev1.PodFailed
		}
		for i := range spec.Containers {
			if l := v.latest[spec.Containers[i].Name]; l == nil || l.State != runtime.Exited || l.ExitCode != 0 {
				return corev1.PodFailed
			}
		}
		return corev1.PodSucceeded
	}
	if !v.initialized() {
		return corev1.PodPending
	}
	for i := range spec.Containers {
		l := v.latest[spec.Containers[i].Name]
		if l == nil || l.State == runtime.Created && v.prev[l.Name] == nil {
			return corev1.PodPending
		}
		if l.State == runtime.Running && v.o.Starting[l.Name] && v.prev[l.Name] == nil && v.pod.Status.Phase != corev1.PodRunning && hasPostStart(&spec.Containers[i]) {
			return corev1.PodPending
		}
	}
	return corev1.PodRunning
}

func hasPostStart(c *corev1.Container) bool {
	return c.Lifecycle != nil && c.Lifecycle.PostStart != nil
}

func (v *view) containerStatuses(list []corev1.Container, init, ending bool) []corev1.ContainerStatus {
	var out []corev1.ContainerStatus
	for i := range list {
		out = append(out, v.containerStatus(&list[i], init, ending))
	}
	return out
}

func (v *view) containerStatus(c *corev1.Container, init, ending bool) corev1.ContainerStatus {
	l, prev := v.latest[c.Name], v.prev[c.Name]
	s := corev1.ContainerStatus{Name: c.Name, Image: c.Image}
	started := v.started(c, l)
	s.Started = &started
	if init && !podutil.IsRestartableInitContainer(c) {
		s.Ready = l != nil && l.State == runtime.Exited && l.ExitCode == 0
	} else {
		s.Ready = v.ready(c, l)
	}
	v.containerMounts(c, &s)
	if l == nil {
		s.State = v.absent(c, init, ending)
		return s
	}
	s.RestartCount = int32(l.Attempt)
	s.ContainerID, s.Image, s.ImageID = "containerd://"+l.ID, shownImage(c, l), l.ImageID
	if prev != nil && prev.State == runtime.Exited {
		s.LastTerminationState.Terminated = v.terminated(prev)
	}
	if u := l.User; u != nil {
		s.User = &corev1.ContainerUser{Linux: &corev1.LinuxContainerUser{UID: u.UID, GID: u.GID, SupplementalGroups: u.Groups}}
	}
	switch l.State {
	case runtime.Running:
		s.State.Running = &corev1.ContainerStateRunning{StartedAt: stamp(l.StartedAt)}
		if !init || podutil.IsRestartableInitContainer(c) {
			s.Resources, s.AllocatedResources = c.Resources.DeepCopy(), c.Resources.DeepCopy().Requests
			if l.Resources != nil {
				s.Resources = l.Resources.DeepCopy() // while a resize is under way they differ
			}
		}
	case runtime.Created:
		s.State = v.absent(c, init, ending)
	case runtime.Exited:
		end := v.terminated(l)
		if w := v.restarting(c, l, ending); w != nil {
			s.State.Waiting, s.LastTerminationState.Terminated = w, end
		} else {
			s.State.Terminated = end
		}
	}
	return s
}

func shownImage(c *corev1.Container, l *runtime.Container) string {
	if l.Image != "" {
		return l.Image
	}
	return c.Image
}

// absent is the state of a container that has not come to be.
func (v *view) absent(c *corev1.Container, init, ending bool) corev1.ContainerState {
	if ending && v.stopped() && (!init || !v.initialized()) {
		if podutil.IsPodPhaseTerminal(v.phase(ending)) && v.deleted() {
			return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{
				Reason: "ContainerStatusUnknown", ExitCode: 137,
				Message: "The container could not be located when the pod was terminated",
			}}
		}
	}
	w := &corev1.ContainerStateWaiting{Reason: reasonContainerCreating}
	if len(v.pod.Spec.InitContainers) > 0 && !v.initialized() {
		w.Reason = reasonPodInitializing
	}
	if f := v.hindrance(c); f != nil {
		w.Reason, w.Message = f.Reason, f.Message
	}
	return corev1.ContainerState{Waiting: w}
}

// hindrance is why the container's next attempt does not start.
func (v *view) hindrance(c *corev1.Container) *Failure {
	for _, key := range imageKeys(v.pod, c) {
		if f := v.o.Images[key].Failure; f != nil {
			return f
		}
	}
	return v.o.Starts[c.Name]
}

// restarting is the waiting state of an ended container that will start again; nil while it is still shown as ended.
func (v *view) restarting(c *corev1.Container, l *runtime.Container, ending bool) *corev1.ContainerStateWaiting {
	if ending || ephemeral(v.pod, c.Name) != nil || !v.again(c, l) || isInit(v.pod, c) && !podutil.IsRestartableInitContainer(c) && l.ExitCode == 0 {
		return nil
	}
	if at, _ := v.restart(l); v.o.Now.Before(at) {
		return &corev1.ContainerStateWaiting{Reason: reasonCrashLoop, Message: fmt.Sprintf("back-off %s restarting failed container=%s pod=%s_%s(%s)",
			at.Sub(l.FinishedAt).Round(time.Second), c.Name, v.pod.Name, v.pod.Namespace, v.pod.UID)}
	}
	if f := v.hindrance(c); f != nil {
		return &corev1.ContainerStateWaiting{Reason: f.Reason, Message: f.Message}
	}
	if v.o.Again[l.ID] || v.o.Resized[l.ID] {
		// The API lets no container that is over for its policy come back; this one never was.
		return &corev1.ContainerStateWaiting{Reason: reasonContainerCreating}
	}
	return nil
}

func isInit(pod *corev1.Pod, c *corev1.Container) bool {
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == c.Name {
			return true
		}
	}
	return false
}

func (v *view) terminated(c *runtime.Container) *corev1.ContainerStateTerminated {
	t := &corev1.ContainerStateTerminated{
		ExitCode: c.ExitCode, Signal: c.Signal, ContainerID: "containerd://" + c.ID,
		FinishedAt: stamp(c.FinishedAt), Message: v.o.Messages[c.ID],
	}
	if !c.StartedAt.IsZero() {
		t.StartedAt = stamp(c.StartedAt)
	}
	if t.Message == "" {
		t.Message = c.Message
	}
	switch {
	case c.OOMKilled:
		t.Reason = "OOMKilled"
	case c.Reason != "":
		t.Reason = c.Reason
	case c.ExitCode == 0:
		t.Reason = "Completed"
	default:
		t.Reason = "Error"
	}
	return t
}

func (v *view) containerMounts(c *corev1.Container, s *corev1.ContainerStatus) {
	for _, m := range c.VolumeMounts {
		ms := corev1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			rro := corev1.RecursiveReadOnlyDisabled
			if volumes.Recursive(&m) {
				rro = corev1.RecursiveReadOnlyEnabled
			}
			ms.RecursiveReadOnly = &rro
		}
		s.VolumeMounts = append(s.VolumeMounts, ms)
	}
}

// nodeConditions are those that the node that runs a pod says of it; all others are others'.
var nodeConditions = map[corev1.PodConditionType]bool{
	corev1.PodReadyToStartContainers: true, corev1.PodInitialized: true, corev1.ContainersReady: true,
	corev1.PodReady: true, corev1.PodScheduled: true,
}

// conditions sets the conditions that a node owns and leaves all others.
func (v *view) conditions(s *corev1.PodStatus) {
	set := func(t corev1.PodConditionType, ok bool, reason, message string) {
		c := corev1.PodCondition{Type: t, Status: corev1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: v.pod.Generation}
		if ok {
			c.Status = corev1.ConditionTrue
		}
		c.LastTransitionTime = stamp(v.o.Now)
		for i := range s.Conditions {
			if old := &s.Conditions[i]; old.Type == t {
				c.LastProbeTime = old.LastProbeTime
				if old.Status == c.Status {
					c.LastTransitionTime = old.LastTransitionTime
				}
				*old = c
				return
			}
		}
		s.Conditions = append(s.Conditions, c)
	}
	set(corev1.PodReadyToStartContainers, v.o.Sandbox != nil, "", "")

	reason, message := "", ""
	var waiting []string
	for i := range s.InitContainerStatuses {
		c, cs := &v.pod.Spec.InitContainers[i], &s.InitContainerStatuses[i]
		if podutil.IsRestartableInitContainer(c) && !*cs.Started || !podutil.IsRestartableInitContainer(c) && !cs.Ready {
			waiting = append(waiting, c.Name)
		}
	}
	initialized := v.initialized() || s.Phase == corev1.PodSucceeded
	if initialized {
		if s.Phase == corev1.PodSucceeded {
			reason = "PodCompleted"
		}
	} else {
		reason, message = "ContainersNotInitialized", fmt.Sprintf("containers with incomplete status: %s", names(waiting))
	}
	set(corev1.PodInitialized, initialized, reason, message)

	reason, message = "", ""
	var unready []string
	for i := range s.InitContainerStatuses {
		if podutil.IsRestartableInitContainer(&v.pod.Spec.InitContainers[i]) && !s.InitContainerStatuses[i].Ready {
			unready = append(unready, s.InitContainerStatuses[i].Name)
		}
	}
	for i := range s.ContainerStatuses {
		if !s.ContainerStatuses[i].Ready {
			unready = append(unready, s.ContainerStatuses[i].Name)
		}
	}
	ready := len(unready) == 0
	switch {
	case s.Phase == corev1.PodSucceeded:
		ready, reason = false, "PodCompleted"
	case s.Phase == corev1.PodFailed:
		ready, reason = false, "PodFailed"
	case !ready:
		reason, message = "ContainersNotReady", fmt.Sprintf("containers with unready status: %s", names(unready))
	}
	set(corev1.ContainersReady, ready, reason, message)

	var gates []string
	for _, g := range v.pod.Spec.ReadinessGates {
		_, c := podutil.GetPodConditionFromList(s.Conditions, g.ConditionType)
		if c == nil {
			gates = append(gates, fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist.", g.ConditionType))
		} else if c.Status != corev1.ConditionTrue {
			gates = append(gates, fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but %v", g.ConditionType, c.Status))
		}
	}
	if ready && len(gates) > 0 {
		ready, reason, message = false, "ReadinessGatesNotReady", strings.Join(gates, ", ")
	}
	set(corev1.PodReady, ready, reason, message)
	set(corev1.PodScheduled, true, "", "")
	v.resizeConditions(s, set)
	if v.o.Ended != nil {
		set(corev1.DisruptionTarget, true, corev1.PodReasonTerminationByKubelet, v.o.Ended.Message)
	}
}

func names(list []string) string { return "[" + strings.Join(list, " ") + "]" }

// addressesOf is how status shows the node's addresses: IPv4 first, as given.
func addressesOf(addrs []netip.Addr) []string {
	out := make([]string, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, a.Unmap().String())
	}
	return out
}

// stamp is a time as the API keeps it, in whole seconds: comparing what was read with what will be written works.
func stamp(t time.Time) metav1.Time { return metav1.NewTime(t.Truncate(time.Second)) }
