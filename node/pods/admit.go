// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
)

// refusal is why a node does not take a pod that is bound to it. The pod has failed then, and whoever owns it makes
// another. Reasons are kubelet's (lifecycle/predicate.go, sysctl/allowlist.go).
type refusal struct {
	Reason  string
	Message string
}

// Terms are what a node lets pods have, beside what it has itself.
type Terms struct {
	// UnsafeSysctls may be set by pods although they can hurt other pods; a name may end in an asterisk.
	UnsafeSysctls []string
	// NoUserNamespaces says why pods cannot have user ids of their own; nil: they can.
	NoUserNamespaces error
	// PodPids is how many processes and threads one pod may have; 0: the kernel's limits alone.
	PodPids int64
}

// safeSysctls live in a namespace of the pod and cannot hurt other pods (kubelet: sysctl/safe_sysctls.go; all of them
// are namespaced since Linux 4.15, which is older than any kernel that skep runs on).
var safeSysctls = []string{
	"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
	"net.ipv4.ip_unprivileged_port_start", "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout",
	"net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}

// admit decides whether a node takes a pod beside those it has; node is nil while it is not known. The scheduler has
// asked the same of what it knew then; others bind pods without asking.
func admit(pod *corev1.Pod, node *corev1.Node, others []*corev1.Pod, allocatable corev1.ResourceList, terms Terms) *refusal {
	if os := pod.Spec.OS; os != nil && os.Name != corev1.Linux {
		return &refusal{"PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"}
	}
	if want, ok := pod.Spec.NodeSelector[corev1.LabelOSStable]; ok && want != string(corev1.Linux) {
		return &refusal{"PodOSSelectorNodeLabelDoesNotMatch", "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"}
	}
	if r := admitSysctls(pod, terms.UnsafeSysctls); r != nil {
		return r
	}
	if name := apparmored(pod); name != "" {
		return &refusal{"AppArmor", fmt.Sprintf("Cannot enforce AppArmor: this node loads no profiles (container %s)", name)}
	}
	if node != nil && !matches(pod, node) {
		return &refusal{"NodeAffinity", "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"}
	}
	others = slices.DeleteFunc(slices.Clone(others), func(p *corev1.Pod) bool {
		return p.UID == pod.UID || podutil.IsPodPhaseTerminal(p.Status.Phase)
	})
	if takesPorts(pod, others) {
		return &refusal{"NodePorts", "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"}
	}
	if node != nil {
		allocatable = withExtended(allocatable, node.Status.Allocatable)
	}
	return admitResources(pod, others, allocatable)
}

// withExtended adds to what the host has the resources that others say the node has.
func withExtended(host, node corev1.ResourceList) corev1.ResourceList {
	all := maps.Clone(host)
	for name, q := range node {
		if v1helper.IsExtendedResourceName(name) {
			all[name] = q
		}
	}
	return all
}

// matches reports whether the node is one that the pod's selector and required affinity allow.
func matches(pod *corev1.Pod, node *corev1.Node) bool {
	ok, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node)
	return err == nil && ok
}

func admitSysctls(pod *corev1.Pod, unsafe []string) *refusal {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	for _, s := range pod.Spec.SecurityContext.Sysctls {
		// Both notations are the kernel's; the list is in one.
		name := strings.ReplaceAll(s.Name, "/", ".")
		allowed := slices.Contains(safeSysctls, name) || slices.ContainsFunc(unsafe, func(u string) bool {
			prefix, all := strings.CutSuffix(u, "*")
			return u == name || all && strings.HasPrefix(name, prefix)
		})
		if !allowed {
			return &refusal{"SysctlForbidden", fmt.Sprintf("forbidden sysctl: %q not allowlisted", s.Name)}
		}
	}
	return nil
}

// apparmored names the first container that wants an AppArmor profile; empty if none does.
func apparmored(pod *corev1.Pod) string {
	wants := func(p *corev1.AppArmorProfile) bool {
		return p != nil && p.Type != corev1.AppArmorProfileTypeUnconfined
	}
	general := pod.Spec.SecurityContext != nil && wants(pod.Spec.SecurityContext.AppArmorProfile)
	for _, c := range containersOf(pod) {
		if c.SecurityContext != nil && c.SecurityContext.AppArmorProfile != nil {
			if wants(c.SecurityContext.AppArmorProfile) {
				return c.Name
			}
		} else if general {
			return c.Name
		}
	}
	return ""
}

// takesPorts reports whether the pod wants a port of the host that another has.
func takesPorts(pod *corev1.Pod, others []*corev1.Pod) bool {
	want := hostPorts(pod)
	if len(want) == 0 {
		return false
	}
	for _, o := range others {
		for _, have := range hostPorts(o) {
			for _, w := range want {
				if w.port == have.port && w.protocol == have.protocol && (w.ip == have.ip || w.ip == anyAddress || have.ip == anyAddress) {
					return true
				}
			}
		}
	}
	return false
}

type hostPort struct {
	ip, protocol string
	port         int32
}

// anyAddress is how a port on all addresses is compared; an empty hostIP means it too.
const anyAddress = "0.0.0.0"

func hostPorts(pod *corev1.Pod) []hostPort {
	var out []hostPort
	for _, c := range containersOf(pod) {
		if isInit(pod, c) && !podutil.IsRestartableInitContainer(c) {
			continue // they are over before anything listens for long
		}
		for _, p := range c.Ports {
			if p.HostPort == 0 {
				continue
			}
			h := hostPort{p.HostIP, string(p.Protocol), p.HostPort}
			if h.ip == "" || h.ip == "::" {
				h.ip = anyAddress
			}
			if h.protocol == "" {
				h.protocol = string(corev1.ProtocolTCP)
			}
			out = append(out, h)
		}
	}
	return out
}

// admitResources compares requests, the others' and the pod's, with what the node has to give.
func admitResources(pod *corev1.Pod, others []*corev1.Pod, allocatable corev1.ResourceList) *refusal {
	if most, ok := allocatable[corev1.ResourcePods]; ok && int64(len(others))+1 > most.Value() {
		return &refusal{"OutOfpods", fmt.Sprintf("Node didn't have enough resource: pods, requested: 1, used: %d, capacity: %d", len(others), most.Value())}
	}
	wanted := resource.PodRequests(pod, resource.PodResourcesOptions{})
	names := make([]string, 0, len(wanted))
	for name := range wanted {
		names = append(names, string(name))
	}
	slices.Sort(names)
	used := corev1.ResourceList{}
	for _, o := range others {
		for name, q := range resource.PodRequests(o, resource.PodResourcesOptions{UseStatusResources: true}) {
			sum := used[name]
			sum.Add(q)
			used[name] = sum
		}
	}
	for _, n := range names {
		name := corev1.ResourceName(n)
		want, have := wanted[name], used[name]
		total, known := allocatable[name]
		// Like kubelet, what the node has never heard of is for whoever bound the pod to answer for: an extended
		// resource may be one that a scheduler's extender alone counts.
		if want.IsZero() || !known && v1helper.IsExtendedResourceName(name) {
			continue
		}
		sum := want.DeepCopy()
		sum.Add(have)
		if sum.Cmp(total) > 0 {
			return &refusal{"OutOf" + n, fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
				n, amount(name, &want), amount(name, &have), amount(name, &total))}
		}
	}
	return nil
}

// amount is a quantity in the units in which kubelet's messages have it: thousandths of processors, or whole numbers.
func amount(name corev1.ResourceName, q interface {
	MilliValue() int64
	Value() int64
}) int64 {
	if name == corev1.ResourceCPU {
		return q.MilliValue()
	}
	return q.Value()
}

// supports is nil if this node can run the pod in the way it asks for.
func (s *Set) supports(ctx context.Context, pod *corev1.Pod) error {
	if why := s.cfg.Terms.NoUserNamespaces; ownUsers(pod) && why != nil {
		return fmt.Errorf("hostUsers: false: user namespaces are not supported by this node: %w: leave it out, or run the containers as another user than root", why)
	}
	if pod.Spec.RuntimeClassName == nil || *pod.Spec.RuntimeClassName == "" {
		return nil
	}
	class, err := s.cfg.Client.NodeV1().RuntimeClasses().Get(ctx, *pod.Spec.RuntimeClassName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("failed to get RuntimeClass %q: %w", *pod.Spec.RuntimeClassName, err)
	}
	if class.Handler != RuntimeHandler {
		return fmt.Errorf("no runtime for %q is configured: RuntimeClass %s can only have the handler %q on this node", class.Handler, class.Name, RuntimeHandler)
	}
	return nil
}

// RuntimeHandler is the only one that skep's nodes have.
const RuntimeHandler = "runc"

// ownUsers reports whether the pod wants user and group ids of its own.
func ownUsers(pod *corev1.Pod) bool { return pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers }
