// SPDX-License-Identifier: Apache-2.0

package endpointslice

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
)

const v4, v6 = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6

func service(families ...corev1.IPFamily) *corev1.Service {
	if len(families) == 0 {
		families = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "svc", Labels: map[string]string{"team": "a"}},
		Spec: corev1.ServiceSpec{
			ClusterIP: "10.43.0.7", IPFamilies: families, Selector: map[string]string{"app": "web"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString("http")}},
		},
	}
}

func pod(n int, options ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint("p", n), UID: types.UID(fmt.Sprint("u", n))},
		Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{
			Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}},
		}}},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			PodIPs:     []corev1.PodIP{{IP: fmt.Sprintf("10.42.%d.%d", n/256, n%256)}, {IP: fmt.Sprintf("fd00::%x", n)}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	for _, option := range options {
		option(p)
	}
	return p
}

func unready(p *corev1.Pod)     { p.Status.Conditions = nil }
func terminating(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }

var nodes = map[string]*corev1.Node{
	"n1": {ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}},
	"n2": {ObjectMeta: metav1.ObjectMeta{Name: "n2"}},
}

// world is an API server for slices.
type world struct {
	slices map[string]*discoveryv1.EndpointSlice
	next   int
}

func (w *world) snapshot(service *corev1.Service, pods ...*corev1.Pod) Snapshot {
	s := Snapshot{Service: service, Pods: pods, Node: func(name string) *corev1.Node { return nodes[name] }}
	for _, name := range slices.Sorted(maps.Keys(w.slices)) {
		s.Slices = append(s.Slices, w.slices[name])
	}
	return s
}

// apply computes and writes, and returns how many writes that took.
func (w *world) apply(service *corev1.Service, pods ...*corev1.Pod) (Plan, int) {
	plan := Compute(w.snapshot(service, pods...))
	if w.slices == nil {
		w.slices = map[string]*discoveryv1.EndpointSlice{}
	}
	for _, slice := range plan.Create {
		w.next++
		c := slice.DeepCopy()
		c.Name = fmt.Sprintf("%s%04d", c.GenerateName, w.next)
		w.slices[c.Name] = c
	}
	for _, slice := range plan.Update {
		w.slices[slice.Name] = slice.DeepCopy()
	}
	for _, slice := range plan.Delete {
		delete(w.slices, slice.Name)
	}
	return plan, len(plan.Create) + len(plan.Update) + len(plan.Delete)
}

// show is one family's endpoints in words.
func (w *world) show(family discoveryv1.AddressType) string {
	var out []string
	for _, slice := range w.slices {
		if slice.AddressType != family {
			continue
		}
		var ports []string
		for _, p := range slice.Ports {
			ports = append(ports, fmt.Sprintf("%s:%d", *p.Name, *p.Port))
		}
		for _, e := range slice.Endpoints {
			flags := ""
			for _, f := range []struct {
				name string
				on   *bool
			}{{"R", e.Conditions.Ready}, {"S", e.Conditions.Serving}, {"T", e.Conditions.Terminating}} {
				if *f.on {
					flags += f.name
				}
			}
			out = append(out, fmt.Sprintf("%s %s %s", strings.Join(e.Addresses, ","), flags, strings.Join(ports, ",")))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "; ")
}

func TestConditions(t *testing.T) {
	publish := service()
	publish.Spec.PublishNotReadyAddresses = true
	for _, tt := range []struct {
		name    string
		service *corev1.Service
		pod     *corev1.Pod
		want    string
	}{
		{"ready", service(), pod(1), "10.42.0.1 RS http:8080"},
		{"not ready", service(), pod(1, unready), "10.42.0.1  http:8080"},
		{"terminating but serving", service(), pod(1, terminating), "10.42.0.1 ST http:8080"},
		{"terminating", service(), pod(1, terminating, unready), "10.42.0.1 T http:8080"},
		{"not ready, published all the same", publish, pod(1, unready), "10.42.0.1 R http:8080"},
		{"terminating, published all the same", publish, pod(1, terminating, unready), "10.42.0.1 RT http:8080"},
		{"ended", service(), pod(1, func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), ""},
		{"no address yet", service(), pod(1, func(p *corev1.Pod) { p.Status.PodIPs = nil; p.Status.PodIP = "" }), ""},
		{"no such port", service(), pod(1, func(p *corev1.Pod) { p.Spec.Containers[0].Ports = nil }), "10.42.0.1 RS "},
		{"unknown node", service(), pod(1, func(p *corev1.Pod) { p.Spec.NodeName = "nobody" }), ""},
		{"unknown node, published all the same", publish, pod(1, func(p *corev1.Pod) { p.Spec.NodeName = "nobody" }), "10.42.0.1 RS http:8080"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var w world
			plan, _ := w.apply(tt.service, tt.pod)
			if got := w.show(v4); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if missing := strings.Join(plan.MissingNodes, " "); (missing == "nobody") != (tt.name == "unknown node") {
				t.Errorf("missing nodes %q", missing)
			}
		})
	}
}

func TestSliceIsAsUpstreamWritesIt(t *testing.T) {
	s := service()
	s.Labels[discoveryv1.LabelServiceName] = "stolen"
	var w world
	snapshot := w.snapshot(s, pod(1, func(p *corev1.Pod) { p.Spec.Hostname, p.Spec.Subdomain = "db-0", "web" }))
	snapshot.Triggered = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	plan := Compute(snapshot)
	if len(plan.Create) != 2 || plan.Create[0].AddressType != v4 || plan.Create[1].AddressType != v6 {
		t.Fatalf("plan %+v", plan)
	}
	got := plan.Create[1]
	yes, no := true, false
	name, number, protocol, node, zone, hostname := "http", int32(8080), corev1.ProtocolTCP, "n1", "z1", "db-0"
	want := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", GenerateName: "web-",
			Labels: map[string]string{
				"team": "a", "kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
			},
			Annotations:     map[string]string{"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05.000006Z"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: "web", UID: "svc", Controller: &yes, BlockOwnerDeletion: &yes}},
		},
		AddressType: v6,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &number, Protocol: &protocol}},
		Endpoints: []discoveryv1.Endpoint{{
			Addresses:  []string{"fd00::1"},
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "ns", Name: "p1", UID: "u1"},
			NodeName:   &node, Zone: &zone, Hostname: &hostname,
		}},
	}
	if !apiequality.Semantic.DeepEqual(got, want) {
		t.Errorf("slice\n%+v\nwant\n%+v", got, want)
	}
}

func TestHeadless(t *testing.T) {
	s := service()
	s.Spec.ClusterIP, s.Spec.Ports = corev1.ClusterIPNone, nil
	var w world
	w.apply(s, pod(1), pod(2))
	if got := w.show(v6); got != "fd00::1 RS ; fd00::2 RS " {
		t.Error(got)
	}
	for _, slice := range w.slices {
		if _, ok := slice.Labels[corev1.IsHeadlessService]; !ok {
			t.Errorf("labels %v", slice.Labels)
		}
	}
}

func TestNamedPortsMayDiffer(t *testing.T) {
	var w world
	other := func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].ContainerPort = 9090 }
	w.apply(service(corev1.IPv4Protocol), pod(1), pod(2, other), pod(3))
	if got := w.show(v4); got != "10.42.0.1 RS http:8080; 10.42.0.2 RS http:9090; 10.42.0.3 RS http:8080" {
		t.Error(got)
	}
	if len(w.slices) != 2 {
		t.Errorf("%d slices", len(w.slices))
	}
}

// How many writes each change costs.
func TestFewWrites(t *testing.T) {
	var w world
	s := service(corev1.IPv4Protocol)
	step := func(name string, wantWrites, wantSlices int, pods ...*corev1.Pod) {
		t.Helper()
		if _, writes := w.apply(s, pods...); writes != wantWrites || len(w.slices) != wantSlices {
			t.Errorf("%s: %d writes, %d slices; want %d, %d", name, writes, len(w.slices), wantWrites, wantSlices)
		}
	}
	many := func(n int) (pods []*corev1.Pod) {
		for i := range n {
			pods = append(pods, pod(i+1))
		}
		return pods
	}
	step("empty: a placeholder", 1, 1)
	step("still empty", 0, 1)
	step("first pod: the placeholder becomes its slice", 1, 1, pod(1))
	step("nothing new", 0, 1, pod(1))
	step("second pod", 1, 1, pod(1), pod(2))
	step("one of them unready", 1, 1, pod(1), pod(2, unready))
	step("a hundred", 1, 1, many(100)...)
	step("one more: a second slice", 1, 2, many(101)...)
	step("250", 2, 3, many(250)...)
	pods := many(250)
	pods[120] = pod(1000)
	step("one replaced", 1, 3, pods...)
	s = s.DeepCopy()
	s.Labels = map[string]string{"team": "b"}
	step("relabelled", 3, 3, pods...)
	step("all gone: one slice stays, empty", 3, 1)
	s = s.DeepCopy()
	s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	step("second family", 1, 2)
	s = s.DeepCopy()
	s.UID = "svc2"
	step("another service of the same name takes over", 4, 2)
	s.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	w.slices = nil
	step("a service that is going gets no new slices", 0, 0, pod(1))
}

func TestTrafficDistribution(t *testing.T) {
	s := service(corev1.IPv4Protocol)
	near := "PreferSameZone"
	var w world
	w.apply(s, pod(1))
	hints := func() string {
		for _, slice := range w.slices {
			if h := slice.Endpoints[0].Hints; h != nil {
				return h.ForZones[0].Name
			}
		}
		return ""
	}
	s.Spec.TrafficDistribution = &near
	w.apply(s, pod(1))
	if got := hints(); got != "z1" {
		t.Errorf("hint %q", got)
	}
	if _, writes := w.apply(s, pod(1)); writes != 0 {
		t.Errorf("%d writes without a change", writes)
	}
	s.Spec.TrafficDistribution = nil
	w.apply(s, pod(1))
	if got := hints(); got != "" {
		t.Errorf("hint %q stays", got)
	}
}

// Whatever happened before, one plan makes the slices show exactly the pods, a second plan has nothing to do, no
// slice is too large, and nothing in the caches changes.
func TestConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w world
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			var pods []*corev1.Pod
			want := map[discoveryv1.AddressType][]string{}
			offset := rapid.IntRange(1, 60).Draw(t, "first pod")
			for i := range rapid.IntRange(0, 230).Draw(t, "pods") {
				var options []func(*corev1.Pod)
				state := ""
				switch rapid.IntRange(0, 9).Draw(t, "state") {
				case 0:
					options, state = append(options, unready), ""
				case 1:
					options, state = append(options, terminating), "ST"
				default:
					state = "RS"
				}
				port := 8080
				if rapid.IntRange(0, 9).Draw(t, "port") == 0 {
					port = 9090
					options = append(options, func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].ContainerPort = 9090 })
				}
				p := pod(offset+i, options...)
				pods = append(pods, p)
				for j, family := range []discoveryv1.AddressType{v4, v6} {
					want[family] = append(want[family], fmt.Sprintf("%s %s http:%d", p.Status.PodIPs[j].IP, state, port))
				}
			}
			s := service()
			if rapid.IntRange(0, 4).Draw(t, "families") == 0 {
				s = service(corev1.IPv4Protocol)
			}
			if rapid.IntRange(0, 4).Draw(t, "labels") == 0 {
				s.Labels = map[string]string{"team": rapid.SampledFrom([]string{"b", "c"}).Draw(t, "team")}
			}
			before := w.snapshot(s, pods...)
			copies := make([]*discoveryv1.EndpointSlice, len(before.Slices))
			for i, slice := range before.Slices {
				copies[i] = slice.DeepCopy()
			}
			w.apply(s, pods...)
			for i, slice := range before.Slices {
				if !apiequality.Semantic.DeepEqual(slice, copies[i]) {
					t.Fatalf("cached slice %s was changed", slice.Name)
				}
			}
			for _, family := range []discoveryv1.AddressType{v4, v6} {
				if !slices.Contains(familiesOf(s), family) {
					want[family] = nil
				}
				slices.Sort(want[family])
				if got := w.show(family); got != strings.Join(want[family], "; ") {
					t.Fatalf("%s: %s\nwant %s", family, got, strings.Join(want[family], "; "))
				}
			}
			for name, slice := range w.slices {
				if len(slice.Endpoints) > MaxEndpoints {
					t.Fatalf("slice %s has %d endpoints", name, len(slice.Endpoints))
				}
			}
			if plan, writes := w.apply(s, pods...); writes != 0 {
				t.Fatalf("a second plan writes: %+v", plan)
			}
		}
	})
}
