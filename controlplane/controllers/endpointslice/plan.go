// SPDX-License-Identifier: Apache-2.0

// Package endpointslice publishes the addresses of a Service's pods as EndpointSlices.
//
// Compute turns a Service, its pods and its present slices into the fewest writes that make the slices
// true: one set of slices a family and a set of resolved ports, at most MaxEndpoints in each. Endpoints
// stay in the slice they are in, so that a change of one pod is a change of one slice.
package endpointslice

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/endpointslice"
	"k8s.io/endpointslice/trafficdist"
	endpointsliceutil "k8s.io/endpointslice/util"
)

const (
	// ManagedBy marks the slices that this controller writes, with the name that upstream's uses.
	ManagedBy = "endpointslice-controller.k8s.io"
	// MaxEndpoints a slice.
	MaxEndpoints = 100
)

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Service *corev1.Service
	// Pods match the Service's selector.
	Pods []*corev1.Pod
	// Slices of the Service that this controller manages and that are not being deleted.
	Slices []*discoveryv1.EndpointSlice
	// Node returns a node by name, or nil if there is none.
	Node func(name string) *corev1.Node
	// Triggered is when what is new happened, for the annotation that latency is measured by; may be zero.
	Triggered time.Time
}

// Plan is what should be written.
type Plan struct {
	Create, Update, Delete []*discoveryv1.EndpointSlice
	// MissingNodes are nodes of pods that were left out, since nobody knows these nodes yet.
	MissingNodes []string
}

// Compute decides how to make a Service's slices true.
func Compute(s Snapshot) Plan {
	var plan Plan
	families := familiesOf(s.Service)
	for _, family := range families {
		plan.addFamily(s, family)
	}
	for _, slice := range s.Slices {
		if !slices.Contains(families, slice.AddressType) {
			plan.Delete = append(plan.Delete, slice)
		}
	}
	plan.reuse(s.Service)
	if s.Service.DeletionTimestamp != nil {
		// The garbage collector deletes slices of this Service; new ones would only be in its way.
		plan.Create = nil
	}
	for _, slice := range slices.Concat(plan.Create, plan.Update) {
		stamp(slice, s.Triggered)
	}
	return plan
}

// addFamily plans the slices of one address family.
func (plan *Plan) addFamily(s Snapshot, family discoveryv1.AddressType) {
	groups, missing := desired(s, family)
	for _, name := range missing {
		if !slices.Contains(plan.MissingNodes, name) {
			plan.MissingNodes = append(plan.MissingNodes, name)
		}
	}

	var p Plan
	existing := map[string][]*discoveryv1.EndpointSlice{}
	var present []*discoveryv1.EndpointSlice
	for _, slice := range s.Slices {
		if slice.AddressType != family {
			continue
		}
		present = append(present, slice)
		if !isOwnedBy(slice, s.Service) {
			// Left from an earlier Service of the same name.
			p.Delete = append(p.Delete, slice)
			continue
		}
		key := portsKey(slice.Ports)
		existing[key] = append(existing[key], slice)
	}

	for _, g := range groups {
		p.fit(s.Service, family, g, existing[g.key])
		delete(existing, g.key)
	}
	for _, slice := range present {
		if _, ok := existing[portsKey(slice.Ports)]; ok && isOwnedBy(slice, s.Service) {
			p.Delete = append(p.Delete, slice)
		}
	}
	p.placeholder(s.Service, family, present)
	p.hints(s.Service, present)

	plan.Create = append(plan.Create, p.Create...)
	plan.Update = append(plan.Update, p.Update...)
	plan.Delete = append(plan.Delete, p.Delete...)
}

// group is the endpoints that share one set of resolved ports. Named target ports may resolve differently
// from pod to pod.
type group struct {
	key   string
	ports []discoveryv1.EndpointPort
	// wanted are endpoints that have no place yet, order is the order to place them in.
	wanted map[endpointKey]*discoveryv1.Endpoint
	order  []endpointKey
}

// endpointKey is what makes an endpoint the same one although its conditions change.
type endpointKey struct {
	namespace, pod, hostname, addresses string
}

func keyOf(e *discoveryv1.Endpoint) endpointKey {
	k := endpointKey{addresses: strings.Join(e.Addresses, ",")}
	if e.TargetRef != nil {
		k.namespace, k.pod = e.TargetRef.Namespace, e.TargetRef.Name
	}
	if e.Hostname != nil {
		k.hostname = *e.Hostname
	}
	return k
}

// portsKey is the same for the same ports in any order.
func portsKey(ports []discoveryv1.EndpointPort) string {
	keys := make([]string, len(ports))
	for i, p := range ports {
		keys[i] = fmt.Sprintf("%s/%d/%s/%s", deref(p.Name), deref(p.Port), deref(p.Protocol), deref(p.AppProtocol))
	}
	slices.Sort(keys)
	return strings.Join(keys, ",")
}

func deref[T any](p *T) (value T) {
	if p != nil {
		value = *p
	}
	return value
}

func desired(s Snapshot, family discoveryv1.AddressType) (groups []*group, missingNodes []string) {
	byKey := map[string]*group{}
	for _, pod := range s.Pods {
		if !endpointsliceutil.ShouldPodBeInEndpoints(pod, true) {
			continue
		}
		ports := portsOf(s.Service, pod)
		key := portsKey(ports)
		g := byKey[key]
		if g == nil {
			g = &group{key: key, ports: ports, wanted: map[endpointKey]*discoveryv1.Endpoint{}}
			byKey[key] = g
			groups = append(groups, g)
		}
		var node *corev1.Node
		if pod.Spec.NodeName != "" {
			node = s.Node(pod.Spec.NodeName)
		}
		if node == nil && !s.Service.Spec.PublishNotReadyAddresses {
			missingNodes = append(missingNodes, pod.Spec.NodeName)
			continue
		}
		endpoint := endpointOf(s.Service, pod, node, family)
		if k := keyOf(&endpoint); len(endpoint.Addresses) > 0 && g.wanted[k] == nil {
			g.wanted[k] = &endpoint
			g.order = append(g.order, k)
		}
	}
	return groups, missingNodes
}

// fit places a group's endpoints: first each in the slice that has it, then the new ones in slices that
// change anyway, then in one that has room for all, then in new slices.
func (plan *Plan) fit(service *corev1.Service, family discoveryv1.AddressType, g *group, existing []*discoveryv1.EndpointSlice) {
	var changed, unchanged []*discoveryv1.EndpointSlice
	for _, slice := range existing {
		kept, differs := keep(slice, g.wanted)
		labels, relabelled := labelsFor(slice.Labels, service)
		switch {
		case (differs || len(kept) != len(slice.Endpoints)) && len(kept) == 0:
			plan.Delete = append(plan.Delete, slice)
		case differs || len(kept) != len(slice.Endpoints) || relabelled:
			c := slice.DeepCopy()
			c.Endpoints, c.Labels = kept, labels
			changed = append(changed, c)
		default:
			unchanged = append(unchanged, slice)
		}
	}

	var rest []*discoveryv1.Endpoint
	for _, k := range g.order {
		if e := g.wanted[k]; e != nil {
			rest = append(rest, e)
		}
	}
	take := func(slice *discoveryv1.EndpointSlice) {
		n := min(len(rest), MaxEndpoints-len(slice.Endpoints))
		for _, e := range rest[:max(0, n)] {
			slice.Endpoints = append(slice.Endpoints, *e)
		}
		rest = rest[max(0, n):]
	}
	// The fullest first, so that slices fill up rather than stay half empty.
	sort.SliceStable(changed, func(i, j int) bool { return len(changed[i].Endpoints) > len(changed[j].Endpoints) })
	for _, slice := range changed {
		take(slice)
	}
	plan.Update = append(plan.Update, changed...)
	for len(rest) > 0 {
		if room := bestFit(unchanged, len(rest)); room != nil {
			c := room.DeepCopy()
			take(c)
			plan.Update = append(plan.Update, c)
			continue
		}
		slice := newSlice(service, family, g.ports)
		take(slice)
		plan.Create = append(plan.Create, slice)
	}
}

// keep returns a slice's endpoints that are still wanted, in their present form, and removes them from
// wanted. differs tells whether one of them changed.
func keep(slice *discoveryv1.EndpointSlice, wanted map[endpointKey]*discoveryv1.Endpoint) (kept []discoveryv1.Endpoint, differs bool) {
	kept = []discoveryv1.Endpoint{}
	for i := range slice.Endpoints {
		old := &slice.Endpoints[i]
		k := keyOf(old)
		cur := wanted[k]
		if cur == nil {
			continue
		}
		e := *cur
		if !endpointsliceutil.EndpointsEqualBeyondHash(cur, old) {
			differs = true
		}
		// Hints are decided later, over all slices together.
		e.Hints = old.Hints
		kept = append(kept, e)
		delete(wanted, k)
	}
	return kept, differs
}

// bestFit is the slice that is fullest once n more endpoints are in it.
func bestFit(candidates []*discoveryv1.EndpointSlice, n int) *discoveryv1.EndpointSlice {
	var best *discoveryv1.EndpointSlice
	for _, slice := range candidates {
		if len(slice.Endpoints)+n <= MaxEndpoints && (best == nil || len(slice.Endpoints) > len(best.Endpoints)) {
			best = slice
		}
	}
	return best
}

// placeholder keeps one empty slice a family for a Service without endpoints, so that consumers know that
// this family has been looked at.
func (plan *Plan) placeholder(service *corev1.Service, family discoveryv1.AddressType, present []*discoveryv1.EndpointSlice) {
	if len(plan.Delete) < len(present) || len(plan.Create) > 0 {
		return
	}
	empty := newSlice(service, family, []discoveryv1.EndpointPort{})
	for i, slice := range plan.Delete {
		if isOwnedBy(slice, service) && len(slice.Endpoints) == 0 && len(slice.Ports) == 0 &&
			apiequality.Semantic.DeepEqual(slice.Labels, empty.Labels) {
			plan.Delete = slices.Delete(plan.Delete, i, i+1)
			return
		}
	}
	plan.Create = append(plan.Create, empty)
}

// hints adds zone and node hints as spec.trafficDistribution asks, or takes old ones away.
func (plan *Plan) hints(service *corev1.Service, present []*discoveryv1.EndpointSlice) {
	untouched := slices.DeleteFunc(slices.Clone(present), func(slice *discoveryv1.EndpointSlice) bool {
		same := func(other *discoveryv1.EndpointSlice) bool { return other.Name == slice.Name }
		return slices.ContainsFunc(plan.Update, same) || slices.ContainsFunc(plan.Delete, same)
	})
	plan.Create, plan.Update, _ = trafficdist.ReconcileHints(service.Spec.TrafficDistribution, plan.Create, plan.Update, untouched)
}

// reuse turns a deletion and a creation of the same family into one update.
func (plan *Plan) reuse(service *corev1.Service) {
	plan.Delete = slices.DeleteFunc(plan.Delete, func(old *discoveryv1.EndpointSlice) bool {
		i := slices.IndexFunc(plan.Create, func(slice *discoveryv1.EndpointSlice) bool { return slice.AddressType == old.AddressType })
		if i < 0 || !isOwnedBy(old, service) {
			return false
		}
		slice := plan.Create[i]
		slice.Name, slice.GenerateName = old.Name, old.GenerateName
		slice.ResourceVersion, slice.UID, slice.Annotations = old.ResourceVersion, old.UID, maps.Clone(old.Annotations)
		plan.Create = slices.Delete(plan.Create, i, i+1)
		plan.Update = append(plan.Update, slice)
		return true
	})
}

func newSlice(service *corev1.Service, family discoveryv1.AddressType, ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
	prefix := service.Name + "-"
	if len(validation.NameIsDNSSubdomain(prefix, true)) != 0 {
		prefix = service.Name
	}
	labels, _ := labelsFor(nil, service)
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:       service.Namespace,
			GenerateName:    prefix,
			Labels:          labels,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(service, corev1.SchemeGroupVersion.WithKind("Service"))},
		},
		AddressType: family,
		Ports:       ports,
		Endpoints:   []discoveryv1.Endpoint{},
	}
}

// isReserved are the labels that this controller sets itself, whatever the Service carries.
func isReserved(label string) bool {
	return label == discoveryv1.LabelServiceName || label == discoveryv1.LabelManagedBy || label == corev1.IsHeadlessService
}

// labelsFor gives a slice its Service's labels. changed compares those with the labels that a slice has.
func labelsFor(present map[string]string, service *corev1.Service) (labels map[string]string, changed bool) {
	labels = map[string]string{}
	for k, v := range service.Labels {
		if !isReserved(k) {
			labels[k] = v
		}
	}
	old := map[string]string{}
	for k, v := range present {
		if !isReserved(k) {
			old[k] = v
		}
	}
	changed = !apiequality.Semantic.DeepEqual(old, labels)
	if service.Spec.ClusterIP == "" || service.Spec.ClusterIP == corev1.ClusterIPNone {
		labels[corev1.IsHeadlessService] = ""
	}
	labels[discoveryv1.LabelServiceName] = service.Name
	labels[discoveryv1.LabelManagedBy] = ManagedBy
	return labels, changed
}

func isOwnedBy(slice *discoveryv1.EndpointSlice, service *corev1.Service) bool {
	return slices.ContainsFunc(slice.OwnerReferences, func(ref metav1.OwnerReference) bool {
		return ref.UID == service.UID && ref.Kind == "Service" && ref.APIVersion == "v1"
	})
}

// familiesOf a Service, in its own order.
func familiesOf(service *corev1.Service) []discoveryv1.AddressType {
	var families []discoveryv1.AddressType
	for _, family := range service.Spec.IPFamilies {
		families = append(families, discoveryv1.AddressType(family))
	}
	if len(families) > 0 {
		return families
	}
	// The API server always fills ipFamilies; be safe against one that did not yet.
	if ip, err := netip.ParseAddr(service.Spec.ClusterIP); err == nil {
		if ip.Is6() {
			return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv6}
		}
		return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4}
	}
	return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6}
}

func portsOf(service *corev1.Service, pod *corev1.Pod) []discoveryv1.EndpointPort {
	ports := []discoveryv1.EndpointPort{}
	for i := range service.Spec.Ports {
		port := &service.Spec.Ports[i]
		number, err := endpointslice.FindPort(pod, port)
		if err != nil {
			continue // this pod has no port of that name
		}
		n := int32(number)
		ports = append(ports, discoveryv1.EndpointPort{Name: &port.Name, Port: &n, Protocol: &port.Protocol, AppProtocol: port.AppProtocol})
	}
	return ports
}

func endpointOf(service *corev1.Service, pod *corev1.Pod, node *corev1.Node, family discoveryv1.AddressType) discoveryv1.Endpoint {
	serving, terminating := endpointsliceutil.IsPodReady(pod), pod.DeletionTimestamp != nil
	ready := service.Spec.PublishNotReadyAddresses || (serving && !terminating)
	endpoint := discoveryv1.Endpoint{
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
	for _, podIP := range pod.Status.PodIPs {
		ip, err := netip.ParseAddr(podIP.IP)
		if err != nil {
			continue
		}
		if ip.Is4() == (family == discoveryv1.AddressTypeIPv4) {
			endpoint.Addresses = append(endpoint.Addresses, ip.String())
		}
	}
	if pod.Spec.NodeName != "" {
		endpoint.NodeName = &pod.Spec.NodeName
	}
	if node != nil {
		if zone := node.Labels[corev1.LabelTopologyZone]; zone != "" {
			endpoint.Zone = &zone
		}
	}
	if endpointsliceutil.ShouldSetHostname(pod, service) {
		endpoint.Hostname = &pod.Spec.Hostname
	}
	return endpoint
}

// stamp records when the change happened that a write publishes.
func stamp(slice *discoveryv1.EndpointSlice, triggered time.Time) {
	if triggered.IsZero() {
		delete(slice.Annotations, corev1.EndpointsLastChangeTriggerTime)
		return
	}
	if slice.Annotations == nil {
		slice.Annotations = map[string]string{}
	}
	slice.Annotations[corev1.EndpointsLastChangeTriggerTime] = triggered.UTC().Format(time.RFC3339Nano)
}
