// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

type podOption func(*v1.Pod)

func testPod(name string, options ...podOption) *v1.Pod {
	object := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID("uid-" + name), Generation: 1},
		Spec:       v1.PodSpec{SchedulerName: Name, Containers: []v1.Container{{Name: "c", Image: "app:1"}}},
	}
	for _, option := range options {
		option(object)
	}
	return object
}

// asks sets the container's requests from pairs of name and quantity.
func asks(pairs ...string) podOption {
	return func(p *v1.Pod) { p.Spec.Containers[0].Resources.Requests = resourceList(pairs...) }
}

func priority(value int32) podOption { return func(p *v1.Pod) { p.Spec.Priority = &value } }

func onNode(name string) podOption { return func(p *v1.Pod) { p.Spec.NodeName = name } }

func selects(key, value string) podOption {
	return func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{key: value} }
}

func toleratesAll(p *v1.Pod) {
	p.Spec.Tolerations = append(p.Spec.Tolerations, v1.Toleration{Operator: v1.TolerationOpExists})
}

func usesPort(ip string, port int32) podOption {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports, v1.ContainerPort{ContainerPort: port, HostPort: port, HostIP: ip})
	}
}

func ownedBy(uid string) podOption {
	yes := true
	return func(p *v1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: uid, UID: types.UID(uid), Controller: &yes}}
	}
}

func hasLabels(pairs ...string) podOption {
	return func(p *v1.Pod) {
		for i := 0; i < len(pairs); i += 2 {
			metav1.SetMetaDataLabel(&p.ObjectMeta, pairs[i], pairs[i+1])
		}
	}
}

// requiresNodes is the affinity that the daemon set controller gives to its pods.
func requiresNodes(names ...string) podOption {
	return func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{NodeAffinity: &v1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &v1.NodeSelector{
			NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{{
				Key: metav1.ObjectNameField, Operator: v1.NodeSelectorOpIn, Values: names,
			}}}},
		}}}
	}
}

func prefers(weight int32, key, value string) podOption {
	return func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{NodeAffinity: &v1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []v1.PreferredSchedulingTerm{{
			Weight: weight, Preference: v1.NodeSelectorTerm{MatchExpressions: []v1.NodeSelectorRequirement{{Key: key, Operator: v1.NodeSelectorOpIn, Values: []string{value}}}},
		}}}}
	}
}

type nodeOption func(*v1.Node)

// testNode has 4 cpus, 8Gi of memory and room for 110 pods unless options say otherwise.
func testNode(name string, options ...nodeOption) *v1.Node {
	object := &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1.LabelHostname: name}},
		Status:     v1.NodeStatus{Allocatable: resourceList("cpu", "4", "memory", "8Gi", "ephemeral-storage", "20Gi", "pods", "110")},
	}
	for _, option := range options {
		option(object)
	}
	return object
}

func gives(pairs ...string) nodeOption {
	return func(n *v1.Node) {
		for name, quantity := range resourceList(pairs...) {
			n.Status.Allocatable[name] = quantity
		}
	}
}

func labelled(key, value string) nodeOption { return func(n *v1.Node) { n.Labels[key] = value } }

func tainted(key string, effect v1.TaintEffect) nodeOption {
	return func(n *v1.Node) { n.Spec.Taints = append(n.Spec.Taints, v1.Taint{Key: key, Effect: effect}) }
}

func cordoned(n *v1.Node) {
	n.Spec.Unschedulable = true
	n.Spec.Taints = append(n.Spec.Taints, v1.Taint{Key: v1.TaintNodeUnschedulable, Effect: v1.TaintEffectNoSchedule})
}

func hasImage(name string, size int64) nodeOption {
	return func(n *v1.Node) {
		n.Status.Images = append(n.Status.Images, v1.ContainerImage{Names: []string{name}, SizeBytes: size})
	}
}

func resourceList(pairs ...string) v1.ResourceList {
	list := v1.ResourceList{}
	for i := 0; i < len(pairs); i += 2 {
		list[v1.ResourceName(pairs[i])] = resource.MustParse(pairs[i+1])
	}
	return list
}

// testSnapshot holds nodes, and the pods that name one.
func testSnapshot(nodes []*v1.Node, pods ...*v1.Pod) *snapshot {
	s := newSnapshot()
	for _, n := range nodes {
		s.setNode(n)
	}
	for _, p := range pods {
		s.setPod(newPod(p), p.Spec.NodeName)
	}
	return s
}

func numbered[T any](count int, what func(i int) T) []T {
	all := make([]T, count)
	for i := range all {
		all[i] = what(i)
	}
	return all
}

func name(prefix string, i int) string { return fmt.Sprintf("%s-%d", prefix, i) }

// someTime stands for now where it does not matter.
var someTime = time.Unix(1e9, 0)
