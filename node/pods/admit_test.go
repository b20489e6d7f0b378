// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

func asks(name corev1.ResourceName, amount string) func(*corev1.Container) {
	return func(c *corev1.Container) {
		c.Resources.Requests = corev1.ResourceList{name: resource.MustParse(amount)}
	}
}

func port(p int32, protocol corev1.Protocol, ip string) func(*corev1.Container) {
	return func(c *corev1.Container) {
		c.Ports = append(c.Ports, corev1.ContainerPort{HostPort: p, ContainerPort: p, Protocol: protocol, HostIP: ip})
	}
}

func sysctl(names ...string) podOpt {
	return func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{}
		for _, n := range names {
			p.Spec.SecurityContext.Sysctls = append(p.Spec.SecurityContext.Sysctls, corev1.Sysctl{Name: n, Value: "1"})
		}
	}
}

func called(uid string) podOpt { return func(p *corev1.Pod) { p.UID = types.UID(uid) } }

func TestAdmit(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"zone": "a"}}}
	node.Status.Allocatable = corev1.ResourceList{"example.com/fpga": resource.MustParse("2"), corev1.ResourceCPU: resource.MustParse("100")}
	allocatable := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("3")}
	terms := Terms{UnsafeSysctls: []string{"kernel.msg*", "net.core.somaxconn"}}
	web := pod(called("web"), main("c", asks("cpu", "1500m"), port(80, corev1.ProtocolTCP, "")))
	selects := func(key, value string) podOpt {
		return func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{key: value} }
	}
	apparmor := func(kind corev1.AppArmorProfileType) func(*corev1.Container) {
		return func(c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{AppArmorProfile: &corev1.AppArmorProfile{Type: kind}}
		}
	}
	tests := []struct {
		name    string
		pod     *corev1.Pod
		others  []*corev1.Pod
		reason  string
		message string
	}{
		{name: "nothing special", pod: pod(), others: []*corev1.Pod{web}},
		{name: "another system", pod: pod(func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} }), reason: "PodOSNotSupported"},
		{name: "by label too", pod: pod(selects(corev1.LabelOSStable, "windows")), reason: "PodOSSelectorNodeLabelDoesNotMatch"},
		{name: "a selector that fits", pod: pod(selects("zone", "a"))},
		{name: "one that does not", pod: pod(selects("zone", "b")), reason: "NodeAffinity"},

		{name: "safe sysctls, in both notations", pod: pod(sysctl("kernel.shm_rmid_forced", "net/ipv4/tcp_syncookies"))},
		{name: "an unsafe one", pod: pod(sysctl("kernel.shm_rmid_forced", "kernel.sem")), reason: "SysctlForbidden", message: `forbidden sysctl: "kernel.sem" not allowlisted`},
		{name: "allowed by name and by pattern", pod: pod(sysctl("net.core.somaxconn", "kernel.msgmax"))},
		{name: "a name is no pattern", pod: pod(sysctl("net.core.somaxconn2")), reason: "SysctlForbidden"},

		{name: "no AppArmor", pod: pod(main("c", apparmor(corev1.AppArmorProfileTypeUnconfined)))},
		{name: "AppArmor", pod: pod(main("c", apparmor(corev1.AppArmorProfileTypeRuntimeDefault))), reason: "AppArmor"},

		{name: "another port", pod: pod(main("c", port(81, corev1.ProtocolTCP, ""))), others: []*corev1.Pod{web}},
		{name: "another protocol", pod: pod(main("c", port(80, corev1.ProtocolUDP, ""))), others: []*corev1.Pod{web}},
		{name: "a port that is taken", pod: pod(main("c", port(80, "", "192.0.2.7"))), others: []*corev1.Pod{web}, reason: "NodePorts"},
		{name: "by a pod that has ended", pod: pod(main("c", port(80, "", ""))), others: []*corev1.Pod{pod(called("w"), phase(corev1.PodSucceeded), main("c", port(80, "", "")))}},
		{name: "by itself", pod: pod(called("web"), main("c", port(80, "", ""))), others: []*corev1.Pod{web}},
		{name: "on another address", pod: pod(main("c", port(80, "", "192.0.2.7"))), others: []*corev1.Pod{pod(called("w"), main("c", port(80, "", "192.0.2.8")))}},

		{name: "just enough", pod: pod(main("c", asks("cpu", "500m"))), others: []*corev1.Pod{web}},
		{name: "too little", pod: pod(main("c", asks("cpu", "501m"))), others: []*corev1.Pod{web}, reason: "OutOfcpu", message: "Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000"},
		{name: "memory", pod: pod(main("c", asks("memory", "2Gi"))), reason: "OutOfmemory"},
		{name: "huge pages that the host does not have", pod: pod(main("c", asks("hugepages-2Mi", "2Mi"))), reason: "OutOfhugepages-2Mi"},
		{name: "none of them", pod: pod(main("c", asks("hugepages-2Mi", "0")))},
		{name: "what somebody says the node has", pod: pod(main("c", asks("example.com/fpga", "2")))},
		{name: "more than that", pod: pod(main("c", asks("example.com/fpga", "2"))), others: []*corev1.Pod{pod(called("1"), main("c", asks("example.com/fpga", "1")))},
			reason: "OutOfexample.com/fpga", message: "Node didn't have enough resource: example.com/fpga, requested: 2, used: 1, capacity: 2"},
		{name: "what nobody says it has", pod: pod(main("c", asks("example.com/gpu", "1")))},
		{name: "one pod too many", pod: pod(), others: []*corev1.Pod{pod(called("1")), pod(called("2")), pod(called("3"))}, reason: "OutOfpods"},
		{name: "those that ended do not count", pod: pod(), others: []*corev1.Pod{pod(called("1")), pod(called("2")), pod(called("3"), phase(corev1.PodFailed))}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := admit(tt.pod, node, tt.others, allocatable, terms)
			if r == nil {
				r = &refusal{}
			}
			if r.Reason != tt.reason || tt.message != "" && r.Message != tt.message {
				t.Errorf("refused for %+v, want %s: %s", r, tt.reason, tt.message)
			}
		})
	}
	if r := admit(pod(selects("zone", "b")), nil, nil, allocatable, terms); r != nil {
		t.Errorf("a node that is not known yet refuses: %+v", r)
	}
}

func TestRefusedPodFails(t *testing.T) {
	o := seen(nothing)
	o.Refused = &refusal{"OutOfcpu", "no"}
	p := pod()
	s := status(p, o)
	if s.Phase != corev1.PodFailed || s.Reason != "OutOfcpu" || s.Message != "Pod was rejected: no" || len(s.ContainerStatuses) != 0 {
		t.Errorf("status %+v", s)
	}
	if pl := plan(p, o); len(pl.Actions) != 0 || !pl.Ending {
		t.Errorf("plan %+v", pl)
	}
	// An agent that starts later finds it failed, and leaves it so.
	p.Status = s
	if again := status(p, seen(nothing)); again.Reason != "OutOfcpu" || len(again.ContainerStatuses) != 0 {
		t.Errorf("status %+v", again)
	}
}

func TestSupports(t *testing.T) {
	s := &Set{cfg: Config{Terms: Terms{NoUserNamespaces: errors.New("the kernel is old")}, Client: fake.NewClientset(
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "plain"}, Handler: "runc"},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "vm"}, Handler: "kata"},
	)}}
	class := func(name string) podOpt { return func(p *corev1.Pod) { p.Spec.RuntimeClassName = &name } }
	no := false
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		want string
	}{
		{"nothing special", pod(), ""},
		{"the class of what is there", pod(class("plain")), ""},
		{"another", pod(class("vm")), `no runtime for "kata" is configured`},
		{"a class that does not exist", pod(class("none")), `failed to get RuntimeClass "none"`},
		{"user namespaces", pod(func(p *corev1.Pod) { p.Spec.HostUsers = &no }), "hostUsers: false: user namespaces are not supported by this node: the kernel is old"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := s.supports(context.Background(), tt.pod)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}
