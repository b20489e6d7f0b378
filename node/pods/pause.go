// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox"
)

// sharesProcesses reports whether the containers of the pod see one another's processes. With hostPID they do anyway.
func sharesProcesses(pod *corev1.Pod) bool {
	share := pod.Spec.ShareProcessNamespace
	return share != nil && *share && !pod.Spec.HostPID
}

// planPause has the process there that holds the PID namespace of the pod, if its containers share one. A PID namespace
// lives as long as its first process, and no container of the pod may be that one: it would take the others with it.
func (v *view) planPause(p *Plan) {
	switch {
	case !sharesProcesses(v.pod) || v.pause != nil && v.pause.State == runtime.Running || !v.stopped():
		// If the holder has died, the kernel is ending whatever runs in its namespace: a new one begins after that.
	case v.pause != nil:
		p.do(Action{Kind: RemoveContainer, Container: v.pause.Name, ID: v.pause.ID})
	case v.o.Sandbox != nil:
		p.do(Action{Kind: StartPause})
	}
}

// targetPID is the process whose PID namespace a container joins; 0 if it has its own. It is not ok to start while that
// process is not there.
func (v *view) targetPID(container string) (pid uint32, ok bool) {
	if sharesProcesses(v.pod) {
		if v.pause == nil || v.pause.State != runtime.Running {
			return 0, false
		}
		return v.pause.PID, true
	}
	e := ephemeral(v.pod, container)
	if e == nil || e.TargetContainerName == "" || v.pod.Spec.HostPID {
		return 0, true
	}
	if t := v.latest[e.TargetContainerName]; t != nil && t.State == runtime.Running {
		return t.PID, true
	}
	return 0, false
}

// startPause starts the holder of the pod's PID namespace.
func (s *Set) startPause(ctx context.Context, pod *corev1.Pod, box *sandbox.Sandbox) error {
	id, err := s.cfg.Runtime.Create(ctx, runtime.ContainerSpec{
		PodUID: pod.UID, PodNamespace: pod.Namespace, PodName: pod.Name, Name: runtime.PauseName,
		Sandbox: box, CgroupParent: cgroupParent(pod), OOMScoreAdj: pauseOOMScore,
		Annotations: map[string]string{annotationBoot: s.cfg.BootID},
	})
	if err != nil {
		return fmt.Errorf("hold the PID namespace: %w", err)
	}
	if err := s.cfg.Runtime.Start(ctx, id); err != nil {
		return fmt.Errorf("hold the PID namespace: %w", err)
	}
	return nil
}

// pauseOOMScore spares the process that all others of the pod depend on (kubelet: qos/policy.go, PodInfraOOMAdj).
const pauseOOMScore = -998
