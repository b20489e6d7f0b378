// SPDX-License-Identifier: Apache-2.0

package pods

import (
	corev1 "k8s.io/api/core/v1"

	"skep.io/skep/node/runtime"
)

// ephemeral finds a container that was added for debugging; nil if the name is another's.
func ephemeral(pod *corev1.Pod, name string) *corev1.EphemeralContainer {
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return &pod.Spec.EphemeralContainers[i]
		}
	}
	return nil
}

// planEphemeral starts each container for debugging once, whatever the others are doing. It is never restarted, and
// nothing of the pod depends on it.
func (v *view) planEphemeral(p *Plan) {
	for i := range v.pod.Spec.EphemeralContainers {
		e := &v.pod.Spec.EphemeralContainers[i]
		if l := v.latest[e.Name]; l != nil && l.State != runtime.Created {
			continue
		}
		v.start(p, (*corev1.Container)(&e.EphemeralContainerCommon))
	}
}

func (v *view) ephemeralStatuses(ending bool) []corev1.ContainerStatus {
	var out []corev1.ContainerStatus
	for i := range v.pod.Spec.EphemeralContainers {
		s := v.containerStatus((*corev1.Container)(&v.pod.Spec.EphemeralContainers[i].EphemeralContainerCommon), false, ending)
		// Nobody waits for it to be ready (kubelet leaves both at their zero values).
		s.Started, s.Ready = nil, false
		s.Resources, s.AllocatedResources = nil, nil
		out = append(out, s)
	}
	return out
}
