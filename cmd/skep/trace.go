// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
)

func newTraceCommand(streams genericiooptions.IOStreams) *cobra.Command {
	var protocol, output, at string
	var v6 bool
	c := &cobra.Command{
		Use:   "trace FROM TO:PORT",
		Short: "Explain what becomes of a connection, and what to change",
		Long: "Explain what becomes of a connection: which name, service and backends it is for, which policies let it\n" +
			"pass or do not, which way it takes, and what to change. Nothing is sent: the answer is computed from the\n" +
			"tables that the kernel's programs read, on the nodes at which the connection would be judged.\n\n" +
			"FROM is a pod (NAME or NAMESPACE/NAME), node/NAME, or with --at an ADDRESS:PORT outside the cluster. TO is a Service (svc/NAME), a pod (pod/NAME), an\n" +
			"address, or a name as the pod would ask DNS for it. The exit status is 1 if it would not be forwarded.",
		Example: "  skep trace client web:80              # as the pod client would connect to http://web\n" +
			"  skep trace team/client svc/shop/web:http\n  skep trace node/n1 10.42.0.7:8080 --protocol udp\n" +
			"  skep trace 198.51.100.9:40000 192.0.2.10:30080 --at n1   # which backend node n1 would choose",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := untilSignal(cmd)
			defer stop()
			if output != "" && output != "json" {
				return fail("--output: %q is not json", output)
			}
			client, err := inspectClient(cmd)
			if err != nil {
				return err
			}
			t := traceRun{client: client, names: &peerNames{client: client}, namespace: currentNamespace(cmd), protocol: strings.ToUpper(protocol), v6: v6, at: at}
			a, err := t.run(ctx, args[0], args[1])
			if err != nil {
				return fail("%w", err)
			}
			if output == "json" {
				err = json.NewEncoder(streams.Out).Encode(a)
			} else {
				err = a.print(streams.Out)
			}
			if err == nil && a.Verdict != flows.Forwarded {
				return exitError{code: 1}
			}
			return err
		},
	}
	c.Flags().StringVar(&protocol, "protocol", "TCP", "TCP, UDP or SCTP")
	c.Flags().StringVar(&at, "at", "", "The node that is asked, for a client outside the cluster")
	c.Flags().BoolVarP(&v6, "ipv6", "6", false, "Take IPv6 addresses where there are both")
	c.Flags().StringVarP(&output, "output", "o", "", "json")
	return c
}

// currentNamespace is the one that names without a namespace are of.
func currentNamespace(cmd *cobra.Command) string {
	if f := cmd.Flags().Lookup("namespace"); f != nil && f.Value.String() != "" {
		return f.Value.String()
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	if f := cmd.Flags().Lookup("kubeconfig"); f != nil {
		rules.ExplicitPath = f.Value.String()
	}
	namespace, _, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{}).Namespace()
	if err != nil || namespace == "" {
		return metav1.NamespaceDefault
	}
	return namespace
}

// answer is a Trace with how TO was understood.
type answer struct {
	inspect.Trace
	Steps []string `json:"steps"`
}

type traceRun struct {
	client    kubernetes.Interface
	names     *peerNames
	namespace string
	protocol  string
	v6        bool
	at        string // the node that a client outside asks
	steps     []string
}

// asker is who would open the connection.
type asker struct {
	node, namespace string
	addrs           []netip.Addr // of a pod; none: the node itself
	port            uint16       // of a client outside, if it is known
}

func (t *traceRun) say(format string, args ...any) {
	t.steps = append(t.steps, fmt.Sprintf(format, args...))
}

func (t *traceRun) run(ctx context.Context, from, to string) (*answer, error) {
	who, err := t.asker(ctx, from)
	if err != nil {
		return nil, err
	}
	target, port, err := splitTarget(to)
	if err != nil {
		return nil, err
	}
	addrs, number, err := t.target(ctx, who, target, port)
	if err != nil {
		return nil, err
	}
	src, dst, err := pair(who.addrs, addrs, t.v6)
	if err != nil {
		return nil, fmt.Errorf("%s to %s: %w", from, to, err)
	}
	trace, err := t.ask(ctx, who.node, src, who.port, netip.AddrPortFrom(dst, number))
	if err != nil {
		return nil, err
	}
	for i := range trace.Paths {
		if err := t.follow(ctx, trace, &trace.Paths[i], src, who.node); err != nil {
			return nil, err
		}
	}
	if len(trace.Paths) > 0 {
		trace.Verdict, trace.Reason = inspect.Sum(trace.Paths)
	}
	for _, p := range []*flows.Peer{&trace.From, &trace.To} {
		if err := t.names.name(ctx, p); err != nil {
			return nil, err
		}
	}
	return &answer{*trace, t.steps}, nil
}

func (t *traceRun) ask(ctx context.Context, node string, from netip.Addr, port uint16, to netip.AddrPort) (*inspect.Trace, error) {
	params := map[string]string{"to": to.String(), "protocol": t.protocol}
	switch {
	case from.IsValid() && port != 0:
		params["from"] = netip.AddrPortFrom(from, port).String()
	case from.IsValid():
		params["from"] = from.String()
	}
	var out *inspect.Trace
	err := askNode(ctx, t.client, node, "trace", params, func(v inspect.Trace) error {
		out = &v
		return nil
	})
	if err == nil && out == nil {
		err = fmt.Errorf("node %s gave no answer", node)
	}
	return out, err
}

// follow asks the node of a pod elsewhere, which judges what comes in.
func (t *traceRun) follow(ctx context.Context, trace *inspect.Trace, p *inspect.Path, from netip.Addr, node string) error {
	if err := t.names.name(ctx, &p.To); err != nil {
		return err
	}
	if !p.Away || p.To.Pod == "" || p.Verdict != flows.Forwarded {
		return nil
	}
	pod, err := t.client.CoreV1().Pods(p.To.Namespace).Get(ctx, p.To.Pod, metav1.GetOptions{})
	if err != nil || pod.Spec.NodeName == "" || pod.Spec.NodeName == node {
		return err
	}
	if !from.IsValid() { // to the other node it is an address like any other
		n, err := t.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if from, _, err = pair(internalAddrs(n), []netip.Addr{p.To.Address}, false); err != nil {
			return err
		}
	}
	there, err := t.ask(ctx, pod.Spec.NodeName, from, 0, netip.AddrPortFrom(p.To.Address, p.To.Port))
	if err != nil {
		return err
	}
	if len(there.Paths) != 1 {
		return fmt.Errorf("node %s does not know the address %s of pod %s/%s", pod.Spec.NodeName, p.To.Address, p.To.Namespace, p.To.Pod)
	}
	p.Ingress, p.Verdict, p.Reason = there.Paths[0].Ingress, there.Paths[0].Verdict, there.Paths[0].Reason
	p.Route += ", node " + pod.Spec.NodeName + ": " + there.Paths[0].Route
	for _, a := range there.Advice {
		if !slices.Contains(trace.Advice, a) {
			trace.Advice = append(trace.Advice, a)
		}
	}
	return nil
}

func (t *traceRun) asker(ctx context.Context, s string) (who asker, err error) {
	kind, name, ok := strings.Cut(s, "/")
	if s == "node" || ok && (kind == "node" || kind == "nodes" || kind == "no") {
		who = asker{node: name, namespace: t.namespace}
		if name == "" {
			nodes, err := nodeNames(ctx, t.client, "")
			if err != nil || len(nodes) != 1 {
				return who, errors.Join(err, fmt.Errorf("say which node: node/NAME, one of %v", nodes))
			}
			who.node = nodes[0]
		}
		return who, nil
	}
	if a, port, ok := outsider(s); ok {
		if t.at == "" {
			return who, fmt.Errorf("%s is an address: say with --at which node it asks", s)
		}
		return asker{node: t.at, namespace: t.namespace, addrs: []netip.Addr{a}, port: port}, nil
	}
	pod, err := t.pod(ctx, s)
	if err != nil {
		return who, err
	}
	switch {
	case pod.Spec.NodeName == "":
		return who, fmt.Errorf("pod %s/%s has no node yet: see `skep describe pod -n %s %s`", pod.Namespace, pod.Name, pod.Namespace, pod.Name)
	case pod.Spec.HostNetwork:
		t.say("pod %s/%s uses the network of node %s", pod.Namespace, pod.Name, pod.Spec.NodeName)
		return asker{node: pod.Spec.NodeName, namespace: pod.Namespace}, nil
	}
	if who.addrs = podAddrs(pod); len(who.addrs) == 0 {
		return who, fmt.Errorf("pod %s/%s has no address: it is %s", pod.Namespace, pod.Name, pod.Status.Phase)
	}
	who.node, who.namespace = pod.Spec.NodeName, pod.Namespace
	return who, nil
}

// outsider reads ADDRESS and ADDRESS:PORT.
func outsider(s string) (a netip.Addr, port uint16, ok bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		return a, 0, true
	}
	both, err := netip.ParseAddrPort(s)
	return both.Addr(), both.Port(), err == nil
}

// pod reads NAME, NAMESPACE/NAME, or either after pod/.
func (t *traceRun) pod(ctx context.Context, s string) (*corev1.Pod, error) {
	p, err := parsePeer(s)
	if err != nil {
		return nil, err
	}
	if p.name == "" {
		return nil, fmt.Errorf("%q is no pod", s)
	}
	if p.namespace == "" {
		p.namespace = t.namespace
	}
	return t.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
}

// splitTarget cuts the port off.
func splitTarget(s string) (target, port string, err error) {
	i := strings.LastIndex(s, ":")
	if i <= 0 || i == len(s)-1 {
		return "", "", fmt.Errorf("%q has no port: say TO:PORT", s)
	}
	target, port = s[:i], s[i+1:]
	if strings.HasPrefix(target, "[") && strings.HasSuffix(target, "]") {
		target = target[1 : len(target)-1]
	} else if strings.Contains(target, ":") {
		return "", "", fmt.Errorf("%q: write an IPv6 address as [ADDRESS]:PORT", s)
	}
	return target, port, nil
}

// target finds the addresses and the port that TO means to who.
func (t *traceRun) target(ctx context.Context, who asker, target, port string) ([]netip.Addr, uint16, error) {
	number, err := strconv.ParseUint(port, 10, 16)
	named := err != nil
	if a, err := netip.ParseAddr(target); err == nil {
		if named || number == 0 {
			return nil, 0, fmt.Errorf("%q is no port", port)
		}
		return []netip.Addr{a}, uint16(number), nil
	}
	kind, name, ok := strings.Cut(target, "/")
	switch {
	case ok && (kind == "pod" || kind == "pods" || kind == "po"):
		pod, err := t.pod(ctx, target)
		if err != nil {
			return nil, 0, err
		}
		if named {
			if number = uint64(containerPort(pod, port)); number == 0 {
				return nil, 0, fmt.Errorf("pod %s/%s has no port named %q", pod.Namespace, pod.Name, port)
			}
		}
		return podAddrs(pod), uint16(number), nil
	case ok && slices.Contains([]string{"svc", "service", "services"}, kind):
		namespace, service, ok := strings.Cut(name, "/")
		if !ok {
			namespace, service = who.namespace, name
		}
		return t.service(ctx, namespace, service, port)
	case ok:
		return nil, 0, fmt.Errorf("%q is neither svc/NAME, pod/NAME, an address nor a name", target)
	}
	// As the search path of a pod's resolv.conf finds it.
	labels := strings.Split(strings.TrimSuffix(target, "."), ".")
	suffix := strings.Split("svc."+api.DefaultClusterDomain, ".")
	if n := len(labels); n > 2 && n <= 2+len(suffix) && slices.Equal(labels[2:], suffix[:n-2]) {
		labels = labels[:2]
	}
	if len(labels) > 2 {
		return nil, 0, fmt.Errorf("%q is no name of a Service: give the address that it stands for", target)
	}
	namespace := who.namespace
	if len(labels) == 2 {
		namespace = labels[1]
	}
	return t.service(ctx, namespace, labels[0], port)
}

func (t *traceRun) service(ctx context.Context, namespace, name, port string) ([]netip.Addr, uint16, error) {
	svc, err := t.client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, 0, fmt.Errorf("there is no Service %s/%s, so DNS has no such name: see `skep get services -n %s`", namespace, name, namespace)
	}
	if err != nil {
		return nil, 0, err
	}
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, 0, fmt.Errorf("Service %s/%s is another name for %s: give the address that it stands for", namespace, name, svc.Spec.ExternalName)
	}
	var number uint16
	for _, p := range svc.Spec.Ports {
		if (p.Name == port || strconv.Itoa(int(p.Port)) == port) && string(p.Protocol) == t.protocol {
			number = uint16(p.Port)
		}
	}
	if svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return t.headless(ctx, svc, port)
	}
	if number == 0 {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, 0, fmt.Errorf("Service %s/%s has no %s port named %q; it has %s", namespace, name, t.protocol, port, portsOf(svc))
		}
		t.say("Service %s/%s has no port %d/%s; it has %s", namespace, name, n, t.protocol, portsOf(svc))
		number = uint16(n)
	}
	var addrs []netip.Addr
	for _, ip := range svc.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(ip); err == nil {
			addrs = append(addrs, a)
		}
	}
	t.say("%s is Service %s/%s at %s", name, namespace, name, strings.Join(svc.Spec.ClusterIPs, ", "))
	return addrs, number, nil
}

// headless answers with a pod's address, as DNS does with all of them.
func (t *traceRun) headless(ctx context.Context, svc *corev1.Service, port string) ([]netip.Addr, uint16, error) {
	list, err := t.client.DiscoveryV1().EndpointSlices(svc.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=" + svc.Name})
	if err != nil {
		return nil, 0, err
	}
	var addrs []netip.Addr
	number, _ := strconv.ParseUint(port, 10, 16) // else it is a name
	for _, s := range list.Items {
		for _, p := range s.Ports {
			if p.Name != nil && *p.Name == port && p.Port != nil {
				number = uint64(*p.Port)
			}
		}
		for _, e := range s.Endpoints {
			for _, ip := range e.Addresses {
				if a, err := netip.ParseAddr(ip); err == nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
					addrs = append(addrs, a)
				}
			}
		}
	}
	if len(addrs) == 0 || number == 0 {
		return nil, 0, fmt.Errorf("headless Service %s/%s has no ready endpoint with port %s: see `skep get endpointslices -n %s`", svc.Namespace, svc.Name, port, svc.Namespace)
	}
	t.say("%s is headless Service %s/%s: DNS answers with %d addresses, and this is about the first", svc.Name, svc.Namespace, svc.Name, len(addrs))
	return addrs, uint16(number), nil
}

func portsOf(svc *corev1.Service) string {
	var out []string
	for _, p := range svc.Spec.Ports {
		text := fmt.Sprintf("%d/%s", p.Port, p.Protocol)
		if p.Name != "" {
			text += " (" + p.Name + ")"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func containerPort(pod *corev1.Pod, name string) int32 {
	for i := range pod.Spec.Containers {
		for _, p := range pod.Spec.Containers[i].Ports {
			if p.Name == name {
				return p.ContainerPort
			}
		}
	}
	return 0
}

func podAddrs(pod *corev1.Pod) (out []netip.Addr) {
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out = append(out, a)
		}
	}
	return out
}

func internalAddrs(node *corev1.Node) (out []netip.Addr) {
	for _, n := range node.Status.Addresses {
		if a, err := netip.ParseAddr(n.Address); err == nil && n.Type == corev1.NodeInternalIP {
			out = append(out, a)
		}
	}
	return out
}

// pair takes addresses of the same family. Without any from, the node has both.
func pair(from, to []netip.Addr, v6 bool) (src, dst netip.Addr, err error) {
	for _, want6 := range []bool{v6, !v6} {
		for _, d := range to {
			if d.Is4() == want6 {
				continue
			}
			if len(from) == 0 {
				return src, d, nil
			}
			for _, s := range from {
				if s.Is4() == d.Is4() {
					return s, d, nil
				}
			}
		}
	}
	return src, dst, fmt.Errorf("they have no address of the same family: %v and %v", from, to)
}

// print explains in the order in which it happens.
func (a *answer) print(out io.Writer) error {
	var b strings.Builder
	for _, s := range a.Steps {
		fmt.Fprintf(&b, "%s\n", s)
	}
	to := net.JoinHostPort(a.To.Address.String(), strconv.Itoa(int(a.To.Port)))
	fmt.Fprintf(&b, "%s -> %s %s\n", peerText(&a.From, true), to, a.Protocol)
	if s := a.Service; s != nil {
		fmt.Fprintf(&b, "  service  %s/%s, %s, %d backends", s.Namespace, s.Service, s.Scope, len(s.Backends))
		switch {
		case a.Choice != "":
			fmt.Fprintf(&b, ", one is certain (%s)", a.Choice)
		case len(s.Backends) > 1:
			fmt.Fprint(&b, ", one of them is chosen")
		}
		if s.AffinitySeconds > 0 {
			fmt.Fprintf(&b, ", the same for %d seconds", s.AffinitySeconds)
		}
		b.WriteByte('\n')
	}
	for i := range a.Paths {
		p := &a.Paths[i]
		fmt.Fprintf(&b, "  to       %s\n", peerText(&p.To, true))
		for _, j := range []struct {
			direction string
			*inspect.Judgement
		}{{"egress", p.Egress}, {"ingress", p.Ingress}} {
			if j.Judgement != nil {
				fmt.Fprintf(&b, "    %-8s %s\n", j.direction, judgementText(j.Judgement))
			}
		}
		fmt.Fprintf(&b, "    route    %s\n    verdict  %s\n", p.Route, verdictText(p.Verdict, p.Reason))
	}
	if len(a.Paths) != 1 {
		fmt.Fprintf(&b, "verdict    %s\n", verdictText(a.Verdict, a.Reason))
	}
	for _, s := range a.Advice {
		fmt.Fprintf(&b, "%s\n", s)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func verdictText(v flows.Verdict, reason string) string {
	return strings.TrimSpace(strings.Trim(string(v)+": "+reason, ": "))
}

func judgementText(j *inspect.Judgement) string {
	list := strings.Join(j.Policies, ", ")
	switch {
	case j.State == inspect.Open:
		return "no policy selects the pod: everything passes"
	case j.Allowed && j.Why != "":
		return "allowed: " + j.Why
	case j.Allowed:
		return "allowed by " + list
	case j.State == inspect.Closed:
		return strings.TrimSuffix("closed: "+j.Why+": "+list, ": ")
	}
	if j.Rule {
		return "denied by " + list
	}
	return "denied: none of " + list + " allows it"
}
