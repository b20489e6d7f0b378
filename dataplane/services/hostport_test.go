// SPDX-License-Identifier: Apache-2.0

package services

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestHostPorts(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	for _, c := range []struct {
		name   string
		change func(*corev1.Pod)
		want   []string
	}{
		{"both families", nil, []string{
			"pod ns/p 0.0.0.0:8080/TCP flags=2 affinity=0: 0.0.0.0:8080/0 0.0.0.0:8080/1 -> 10.42.0.5:80",
			"pod ns/p :::8080/TCP flags=2 affinity=0: [::]:8080/0 [::]:8080/1 -> [fd73::5]:80",
		}},
		{"one address of the node", func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostIP = "127.0.0.1" }, []string{
			"pod ns/p 127.0.0.1:8080/TCP flags=2 affinity=0: 127.0.0.1:8080/0 127.0.0.1:8080/1 -> 10.42.0.5:80",
		}},
		{"every address of both families", func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].HostIP = "::" }, []string{
			"pod ns/p 0.0.0.0:8080/TCP flags=2 affinity=0: 0.0.0.0:8080/0 0.0.0.0:8080/1 -> 10.42.0.5:80",
			"pod ns/p :::8080/TCP flags=2 affinity=0: [::]:8080/0 [::]:8080/1 -> [fd73::5]:80",
		}},
		{"a sidecar's, but no init container's", func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{
				{Ports: []corev1.ContainerPort{{HostPort: 1, ContainerPort: 1}}},
				{RestartPolicy: &always, Ports: []corev1.ContainerPort{{HostPort: 53, ContainerPort: 5353, Protocol: corev1.ProtocolUDP, HostIP: "192.0.2.1"}}},
			}
			p.Spec.Containers = nil
		}, []string{
			"pod ns/p 192.0.2.1:53/UDP flags=2 affinity=0: 192.0.2.1:53/0 192.0.2.1:53/1 -> 10.42.0.5:5353",
		}},
		{"no address yet", func(p *corev1.Pod) { p.Status.PodIPs = nil }, nil},
		{"ended", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, nil},
		{"on the host's network", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, nil},
		{"SCTP", func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].Protocol = corev1.ProtocolSCTP }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p"},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
					{HostPort: 8080, ContainerPort: 80}, {ContainerPort: 9090},
				}}}},
				Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.42.0.5"}, {IP: "fd73::5"}}},
			}
			if c.change != nil {
				c.change(pod)
			}
			if diff := cmp.Diff(c.want, describe(HostPorts(pod))); diff != "" {
				t.Error(diff)
			}
		})
	}
}
