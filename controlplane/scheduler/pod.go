// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	resourcehelper "k8s.io/component-helpers/resource"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// Requests that a container without any counts with when nodes are scored, so that pods that ask
// for nothing still spread (the values are Kubernetes' own).
const (
	assumedMilliCPU = 100
	assumedMemory   = 200 << 20
)

// nonZeroDefaults is what PodRequests puts in place of a missing request.
var nonZeroDefaults = v1.ResourceList{
	v1.ResourceCPU:    *resource.NewMilliQuantity(assumedMilliCPU, resource.DecimalSI),
	v1.ResourceMemory: *resource.NewQuantity(assumedMemory, resource.BinarySI),
}

// extended is an amount of one resource other than cpu, memory, ephemeral-storage and pods.
type extended struct {
	name   v1.ResourceName
	amount int64
	reason string // "Insufficient NAME", made once here so that filters never format
}

// requests is what a pod takes from a node.
type requests struct {
	milliCPU, memory, ephemeral int64
	extended                    []extended
	// scoredCPU and scoredMemory count missing requests with their assumed values.
	scoredCPU, scoredMemory int64
}

func (r *requests) empty() bool {
	return r.milliCPU == 0 && r.memory == 0 && r.ephemeral == 0 && len(r.extended) == 0
}

// hostPort is a port of the node that a pod occupies. An empty ip means all addresses.
type hostPort struct {
	ip       string
	protocol v1.Protocol
	port     int32
}

func (a hostPort) conflicts(b hostPort) bool {
	return a.port == b.port && a.protocol == b.protocol && (a.ip == b.ip || a.ip == "" || b.ip == "")
}

// pod is everything that filters, scores and accounting need to know about a Pod, computed once
// when the Pod arrives rather than once for each node.
type pod struct {
	object   *v1.Pod // shared with the informer's cache: never written
	uid      types.UID
	key      types.NamespacedName
	priority int32

	requests requests
	ports    []hostPort
	affinity []affinityTerm // to other pods, and against them
	claims   []claimUse

	// Only for pods that are to be scheduled:
	required  *nodeaffinity.RequiredNodeAffinity     // nil: any node
	nodeNames sets.Set[string]                       // nil: any node; else only these can match
	conflict  bool                                   // required affinity names no node at all
	preferred *nodeaffinity.PreferredSchedulingTerms // nil: none
	images    []string                               // normalised
	hard      []spreadConstraint                     // DoNotSchedule
	soft      []spreadConstraint                     // ScheduleAnyway
	together  []podSelector                          // of required affinity; one pod must be meant by all

	// While the pod is placed or nominated, where the topology counts it:
	on      *node // nil while it is nominated
	terms   []*term
	tallies []*tally

	// node is where the snapshot accounts the pod; empty while it is pending.
	node string
	// nominated is the node whose pods were preempted for this one.
	nominated string
}

// newPod computes what concerns accounting.
func newPod(object *v1.Pod) *pod {
	return &pod{
		object:   object,
		uid:      object.UID,
		key:      types.NamespacedName{Namespace: object.Namespace, Name: object.Name},
		priority: corev1helpers.PodPriority(object),
		requests: podRequests(object),
		ports:    hostPorts(object),
		affinity: affinityTerms(object),
		claims:   claimsOf(object),
	}
}

// newPendingPod computes what a decision needs as well.
func newPendingPod(object *v1.Pod) *pod {
	p := newPod(object)
	p.nominated = object.Status.NominatedNodeName
	if len(object.Spec.NodeSelector) > 0 || requiredNodeTerms(object) != nil {
		required := nodeaffinity.GetRequiredNodeAffinity(object)
		p.required = &required
		p.nodeNames, p.conflict = namedNodes(requiredNodeTerms(object))
	}
	if affinity := object.Spec.Affinity; affinity != nil && affinity.NodeAffinity != nil {
		if terms := affinity.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution; len(terms) > 0 {
			// The API server validated the terms; one that does not parse prefers nothing.
			p.preferred, _ = nodeaffinity.NewPreferredSchedulingTerms(terms)
		}
	}
	p.images = podImages(object)
	p.hard = spreadConstraints(p, v1.DoNotSchedule)
	p.soft = spreadConstraints(p, v1.ScheduleAnyway)
	p.together = together(p.affinity)
	return p
}

func podRequests(object *v1.Pod) requests {
	// Resizes in place count with what the node has granted until it reports the new amount.
	options := resourcehelper.PodResourcesOptions{UseStatusResources: true, InPlacePodLevelResourcesVerticalScalingEnabled: true}
	var r requests
	for name, quantity := range resourcehelper.PodRequests(object, options) {
		switch name {
		case v1.ResourceCPU:
			r.milliCPU = quantity.MilliValue()
		case v1.ResourceMemory:
			r.memory = quantity.Value()
		case v1.ResourceEphemeralStorage:
			r.ephemeral = quantity.Value()
		case v1.ResourcePods: // counted, never requested
		default:
			if amount := quantity.Value(); amount > 0 {
				r.extended = append(r.extended, extended{name, amount, "Insufficient " + string(name)})
			}
		}
	}
	r.scoredCPU, r.scoredMemory = r.milliCPU, r.memory
	if missing := missingRequests(object, &r); len(missing) > 0 {
		options.NonMissingContainerRequests = missing
		filled := resourcehelper.PodRequests(object, options)
		cpu, memory := filled[v1.ResourceCPU], filled[v1.ResourceMemory]
		r.scoredCPU, r.scoredMemory = cpu.MilliValue(), memory.Value()
	}
	return r
}

// missingRequests says which defaults apply: container defaults must not be added to a request
// that was made for the pod as a whole.
func missingRequests(object *v1.Pod, r *requests) v1.ResourceList {
	if !resourcehelper.IsPodLevelRequestsSet(object) {
		return nonZeroDefaults
	}
	missing := v1.ResourceList{}
	if r.milliCPU == 0 {
		missing[v1.ResourceCPU] = nonZeroDefaults[v1.ResourceCPU]
	}
	if r.memory == 0 {
		missing[v1.ResourceMemory] = nonZeroDefaults[v1.ResourceMemory]
	}
	return missing
}

func hostPorts(object *v1.Pod) []hostPort {
	var ports []hostPort
	add := func(c *v1.Container) {
		for _, p := range c.Ports {
			if p.HostPort <= 0 {
				continue
			}
			hp := hostPort{ip: p.HostIP, protocol: p.Protocol, port: p.HostPort}
			if hp.ip == "0.0.0.0" {
				hp.ip = ""
			}
			if hp.protocol == "" {
				hp.protocol = v1.ProtocolTCP
			}
			ports = append(ports, hp)
		}
	}
	for i := range object.Spec.InitContainers {
		// Other init containers have let go of their ports when the next container starts.
		if c := &object.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	for i := range object.Spec.Containers {
		add(&object.Spec.Containers[i])
	}
	return ports
}

func requiredNodeTerms(object *v1.Pod) *v1.NodeSelector {
	if a := object.Spec.Affinity; a != nil && a.NodeAffinity != nil {
		return a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	}
	return nil
}

// namedNodes returns the nodes that required affinity can match at all, when every term names some
// by metadata.name, as those of daemon sets do: such a pod costs one node, not all of them.
// conflict is true when the terms contradict themselves.
func namedNodes(selector *v1.NodeSelector) (names sets.Set[string], conflict bool) {
	if selector == nil || len(selector.NodeSelectorTerms) == 0 {
		return nil, false
	}
	names = sets.New[string]()
	for _, term := range selector.NodeSelectorTerms {
		var ofTerm sets.Set[string]
		for _, r := range term.MatchFields {
			if r.Key != metav1.ObjectNameField || r.Operator != v1.NodeSelectorOpIn {
				continue
			}
			if values := sets.New(r.Values...); ofTerm == nil {
				ofTerm = values
			} else {
				ofTerm = ofTerm.Intersection(values)
			}
		}
		if ofTerm == nil {
			return nil, false // terms are alternatives, and this one is open to every node
		}
		names = names.Union(ofTerm)
	}
	return names, len(names) == 0
}

func podImages(object *v1.Pod) []string {
	var images []string
	for i := range object.Spec.InitContainers {
		images = append(images, normalImage(object.Spec.InitContainers[i].Image))
	}
	for i := range object.Spec.Containers {
		images = append(images, normalImage(object.Spec.Containers[i].Image))
	}
	return images
}

// normalImage gives an image without tag or digest the tag it will be pulled with.
func normalImage(name string) string {
	if strings.LastIndexByte(name, ':') <= strings.LastIndexByte(name, '/') {
		return name + ":latest"
	}
	return name
}

// startTime is when a pod began to run, for comparing which of two pods is cheaper to lose; one
// that has not started counts as starting now.
func startTime(object *v1.Pod, now time.Time) time.Time {
	if object.Status.StartTime != nil {
		return object.Status.StartTime.Time
	}
	return now
}
