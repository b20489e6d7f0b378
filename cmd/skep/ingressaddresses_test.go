// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func nodeAt(addr string, ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{Status: corev1.NodeStatus{
		Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: addr}, {Type: corev1.NodeHostName, Address: "host"}, {Type: corev1.NodeExternalIP, Address: "203.0.113.9"},
		},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}},
	}}
}

func TestIngressAddresses(t *testing.T) {
	for want, nodes := range map[string][]*corev1.Node{
		"[]": nil,
		"[192.0.2.1 2001:db8::3]": {
			nodeAt("192.0.2.1", corev1.ConditionTrue), nodeAt("192.0.2.2", corev1.ConditionUnknown), nodeAt("2001:db8::3", corev1.ConditionTrue),
		},
		"[192.0.2.1 192.0.2.2]": {nodeAt("192.0.2.1", corev1.ConditionFalse), nodeAt("192.0.2.2", corev1.ConditionUnknown)},
	} {
		if got := fmt.Sprint(ingressAddresses(nodes)); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
