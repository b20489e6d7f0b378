// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/policy"
)

// policyRig is a rig whose pods a, b (here) and c (elsewhere) have the label app with their name.
type policyRig struct {
	*rig
	table *policy.Table
	pods  map[types.NamespacedName]*policy.Pod
	port  uint16
}

func (r *policyRig) Pod(n types.NamespacedName) *policy.Pod { return r.pods[n] }
func (r *policyRig) Namespace(string) labels.Set            { return labels.Set{} }
func (r *policyRig) Nodes(labels.Selector) []netip.Addr     { return nodeIP[:] }
func (r *policyRig) Pods(string) (out []*policy.Pod) {
	for _, p := range r.pods {
		out = append(out, p)
	}
	return out
}

func newPolicyRig(t *testing.T) *policyRig {
	t.Helper()
	r := &policyRig{rig: newRig(t), pods: map[types.NamespacedName]*policy.Pod{}, port: 5000}
	r.table = policy.NewTable(r, policy.Limits{Entries: 1000, Set: 100, Blocks: 1000}, maps.PolicyState{Epoch: 1})
	for i, addrs := range [][2]netip.Addr{podA, podB, podC} {
		name := types.NamespacedName{Namespace: "ns", Name: string(rune('a' + i))}
		r.pods[name] = &policy.Pod{Namespace: name.Namespace, Name: name.Name, Labels: labels.Set{"app": name.Name}, Addrs: addrs[:]}
		r.table.SetPod(r.pods[name])
		if i == 2 {
			continue
		}
		slot := uint32(i + 1)
		for _, a := range addrs {
			if err := r.Maps().SetEndpoint(a, maps.Endpoint{Ifindex: 1, Slot: slot}); err != nil {
				t.Fatal(err)
			}
		}
		r.table.Attach(slot, policy.Local{NamespacedName: name}, maps.PolicySets{})
	}
	if err := r.Maps().SetRanges(map[netip.Prefix]uint32{
		netip.PrefixFrom(gateway[0], 32): maps.RangeOpen, netip.PrefixFrom(gateway[1], 128): maps.RangeOpen,
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

func appIs(name string) metav1.LabelSelector {
	return metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}
}

func podPeer(name string) networkingv1.NetworkPolicyPeer {
	s := appIs(name)
	return networkingv1.NetworkPolicyPeer{PodSelector: &s}
}

func blockPeer(cidr string) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: cidr}}
}

// in is a policy for what comes to pod; out for what leaves it. Each peer may use port 8080 of every protocol.
func in(pod string, peers ...networkingv1.NetworkPolicyPeer) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "in-" + pod}}
	p.Spec = networkingv1.NetworkPolicySpec{PodSelector: appIs(pod), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}
	if len(peers) > 0 {
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: peers, Ports: port8080()}}
	}
	return p
}

func out(pod string, peers ...networkingv1.NetworkPolicyPeer) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "out-" + pod}}
	p.Spec = networkingv1.NetworkPolicySpec{PodSelector: appIs(pod), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}}
	if len(peers) > 0 {
		p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: peers, Ports: port8080()}}
	}
	return p
}

func port8080() (ports []networkingv1.NetworkPolicyPort) {
	for _, proto := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
		ports = append(ports, networkingv1.NetworkPolicyPort{Protocol: &proto, Port: new(intstr.FromInt32(8080))})
	}
	return ports
}

func (r *policyRig) set(t *testing.T, policies ...*networkingv1.NetworkPolicy) {
	t.Helper()
	for _, p := range policies {
		r.table.SetPolicy(p)
	}
	r.flush(t)
}

func (r *policyRig) unset(t *testing.T, name string) {
	t.Helper()
	r.table.DeletePolicy(types.NamespacedName{Namespace: "ns", Name: name})
	r.flush(t)
}

func (r *policyRig) flush(t *testing.T) {
	t.Helper()
	if err := r.table.Flush(r.Maps()); err != nil {
		t.Fatal(err)
	}
	if err := r.table.Collect(r.Maps(), func(policy.SetInfo, uint64) {}); err != nil {
		t.Fatal(err)
	}
}

// skb is the part of a program's context that a test packet may have.
type skb struct {
	_       [9]uint32
	Ingress uint32 // device it was received on; 0 if the node itself made it
	Ifindex uint32
	_       [37]uint32
}

// wants runs a program and checks the verdict.
func (r *policyRig) wants(t *testing.T, what, program string, packet []byte, want uint32) []byte {
	t.Helper()
	verdict, bytes, err := r.Program(program).Test(packet)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if verdict != want {
		t.Errorf("%s: verdict %d, want %d", what, int32(verdict), int32(want))
	}
	return bytes
}

// arrives runs to_pod for a packet that was received on a device.
func (r *policyRig) arrives(t *testing.T, what string, packet []byte, want uint32) {
	t.Helper()
	verdict, err := r.Program("to_pod").Run(&ebpf.RunOptions{Data: packet, Context: skb{Ingress: 1, Ifindex: 1}})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if verdict != want {
		t.Errorf("%s: verdict %d, want %d", what, int32(verdict), int32(want))
	}
}

// between is a packet that opens a connection from a new port.
func (r *policyRig) between(s segment, from, to netip.Addr, port uint16) segment {
	r.port++
	s.from, s.to = at(from, r.port), at(to, port)
	return s
}

func (s segment) back(flags uint8) segment {
	s.from, s.to, s.flags = s.to, s.from, flags
	return s
}

func eachPolicy(t *testing.T, f func(t *testing.T, r *policyRig, family int, s segment)) {
	for family, name := range []string{"IPv4", "IPv6"} {
		for proto, p := range map[uint8]string{maps.TCP: "TCP", maps.UDP: "UDP"} {
			t.Run(name+" "+p, func(t *testing.T) {
				f(t, newPolicyRig(t), family, segment{proto: proto, flags: syn, payload: []byte("odd")})
			})
		}
	}
}

func drops(t *testing.T, r interface{ Maps() *maps.Maps }, reason string) uint64 {
	t.Helper()
	return counted(t, r, func(c flows.Counter) bool { return c.Labels["reason"] == reason })
}

func counted(t *testing.T, r interface{ Maps() *maps.Maps }, which func(flows.Counter) bool) uint64 {
	t.Helper()
	values, err := r.Maps().Counters()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(flows.Counters, which)
	if i < 0 {
		t.Fatal("no such counter")
	}
	return values[i]
}

// TestPolicyIngress: default deny, what it lets through, answers, names of drops, and connections that follow changes.
func TestPolicyIngress(t *testing.T) {
	eachPolicy(t, func(t *testing.T, r *policyRig, i int, s segment) {
		open := r.between(s, podA[i], podB[i], 8080)
		r.wants(t, "no policy", "from_pod", open.bytes(), redirect)
		r.set(t, in("b"))
		r.wants(t, "established, now denied", "from_pod", open.bytes(), drop)
		r.wants(t, "its answer", "from_pod", open.back(ack).bytes(), drop)
		fresh := r.between(s, podA[i], podB[i], 8080)
		r.wants(t, "new, denied", "from_pod", fresh.bytes(), drop)
		if n := drops(t, r, "policy-ingress"); n != 3 {
			t.Errorf("%d drops", n)
		}
		named := map[string]uint64{}
		if err := r.table.Drops(r.Maps(), func(i policy.SetInfo, n uint64) {
			named[fmt.Sprintf("%s %s %v", i.Direction, i.Namespace, i.Policies)] = n
		}); err != nil {
			t.Fatal(err)
		}
		if named["ingress ns [in-b]"] != 3 {
			t.Errorf("drops by policy: %v", named)
		}
		all, err := r.Flows()
		if err != nil || len(all) != 1 {
			t.Errorf("a denied packet opened a flow: %v, %v", all, err)
		}
		// What b opens itself is answered.
		own := r.between(s, podB[i], podA[i], 9)
		r.wants(t, "opened by b", "from_pod", own.bytes(), redirect)
		r.wants(t, "the answer to b", "from_pod", own.back(syn|ack).bytes(), redirect)
		if s.proto == maps.TCP {
			r.wants(t, "a connection in the answer's place", "from_pod", own.back(syn).bytes(), drop)
		}

		r.set(t, in("b", podPeer("a")))
		r.wants(t, "allowed again", "from_pod", open.bytes(), redirect)
		r.wants(t, "the answer", "from_pod", open.back(syn|ack).bytes(), redirect)
		r.wants(t, "another port", "from_pod", r.between(s, podA[i], podB[i], 8081).bytes(), drop)
		r.arrives(t, "another pod", r.between(s, podC[i], podB[i], 8080).bytes(), drop)
		r.set(t, in("b", podPeer("c"), blockPeer(netip.PrefixFrom(client[i], client[i].BitLen()).String())))
		r.wants(t, "the first no more", "from_pod", open.bytes(), drop)
		r.arrives(t, "the other now", r.between(s, podC[i], podB[i], 8080).bytes(), next)
		r.arrives(t, "an address", r.between(s, client[i], podB[i], 8080).bytes(), next)
		r.arrives(t, "the next address", r.between(s, client[i].Next(), podB[i], 8080).bytes(), drop)
		// Labels change under an established connection.
		foreign := r.between(s, podC[i], podB[i], 8080)
		r.arrives(t, "from c", foreign.bytes(), next)
		c := *r.pods[types.NamespacedName{Namespace: "ns", Name: "c"}]
		c.Labels = labels.Set{"app": "other"}
		r.pods[types.NamespacedName{Namespace: "ns", Name: "c"}] = &c
		r.table.SetPod(&c)
		r.flush(t)
		r.arrives(t, "from c, which is another now", foreign.bytes(), drop)
		r.unset(t, "in-b")
		r.arrives(t, "no policy any more", foreign.bytes(), next)
		r.wants(t, "no policy any more", "from_pod", open.bytes(), redirect)
	})
}

// TestPolicyEgress: what a pod may open, its own node, and answers.
func TestPolicyEgress(t *testing.T) {
	eachPolicy(t, func(t *testing.T, r *policyRig, i int, s segment) {
		r.set(t, out("a", podPeer("b"), blockPeer(netip.PrefixFrom(client[i], client[i].BitLen()).String())))
		open := r.between(s, podA[i], podB[i], 8080)
		r.wants(t, "allowed", "from_pod", open.bytes(), redirect)
		r.wants(t, "its answer", "from_pod", open.back(syn|ack).bytes(), redirect)
		r.wants(t, "another port", "from_pod", r.between(s, podA[i], podB[i], 80).bytes(), drop)
		r.wants(t, "another pod", "from_pod", r.between(s, podA[i], podC[i], 8080).bytes(), drop)
		r.wants(t, "an address", "from_pod", r.between(s, podA[i], client[i], 8080).bytes(), next)
		r.wants(t, "another address", "from_pod", r.between(s, podA[i], client[i].Next(), 8080).bytes(), drop)
		if n := drops(t, r, "policy-egress"); n != 3 {
			t.Errorf("%d drops", n)
		}
		r.wants(t, "its node", "from_pod", r.between(s, podA[i], nodeIP[i], 10250).bytes(), next)
		r.wants(t, "its gateway", "from_pod", r.between(s, podA[i], gateway[i], 53).bytes(), next)
		// Who else may open what, a does not decide; and its answers pass.
		asked := r.between(s, podC[i], podA[i], 7)
		r.arrives(t, "asked by c", asked.bytes(), next)
		r.wants(t, "the answer to c", "from_pod", asked.back(syn|ack).bytes(), next)
		if s.proto == maps.TCP {
			r.wants(t, "a connection in the answer's place", "from_pod", asked.back(syn).bytes(), drop)
		}
	})
}

// TestPolicyNode: what the node itself sends reaches its pods, and is answered; what it forwards is judged.
func TestPolicyNode(t *testing.T) {
	eachPolicy(t, func(t *testing.T, r *policyRig, i int, s segment) {
		r.set(t, in("b"), out("b"))
		probe := r.between(s, nodeIP[i], podB[i], 8080)
		r.wants(t, "a probe", "to_pod", probe.bytes(), next)
		r.wants(t, "its answer", "from_pod", probe.back(syn|ack).bytes(), next)
		r.set(t, in("a")) // judged anew
		r.wants(t, "the probe goes on", "to_pod", probe.back(ack).back(ack).bytes(), next)
		r.wants(t, "and is answered", "from_pod", probe.back(ack).bytes(), next)
		r.arrives(t, "another node", r.between(s, nodeIP[i].Next(), podB[i], 8080).bytes(), drop)
	})
}

// TestPolicyServices: policies see who asks and who answers, whatever addresses are in between.
func TestPolicyServices(t *testing.T) {
	eachPolicy(t, func(t *testing.T, r *policyRig, i int, s segment) {
		r.set(t, in("b"), out("b"))
		r.wants(t, "ClusterIP, denied", "from_pod", r.between(s, podA[i], vip[i], 80).bytes(), drop)
		r.wants(t, "NodePort, denied", "from_outside", r.between(s, client[i], nodeIP[i], 30080).bytes(), drop)
		if all, err := r.Flows(); err != nil || len(all) != 0 {
			t.Errorf("denied packets opened flows: %v, %v", all, err)
		}
		hairpin := r.between(s, podB[i], vip[i], 80)
		bytes := r.wants(t, "a pod reaches itself", "from_pod", hairpin.bytes(), redirect)
		answer := s
		answer.from, answer.to, answer.flags = at(podB[i], 8080), source(t, bytes), syn|ack
		r.wants(t, "and answers itself", "from_pod", answer.bytes(), redirect)

		r.set(t, in("b", podPeer("a"), blockPeer(netip.PrefixFrom(client[i], client[i].BitLen()).String())))
		asked := r.between(s, podA[i], vip[i], 80)
		r.wants(t, "ClusterIP", "from_pod", asked.bytes(), redirect)
		answer.to = asked.from
		r.wants(t, "ClusterIP's answer", "from_pod", answer.bytes(), redirect)
		outside := r.between(s, client[i], nodeIP[i], 30080)
		bytes = r.wants(t, "NodePort", "from_outside", outside.bytes(), redirect)
		fromOutside := answer
		fromOutside.to = source(t, bytes)
		if fromOutside.to.Addr() != nodeIP[i] {
			t.Fatalf("source is %s", fromOutside.to)
		}
		r.wants(t, "NodePort's answer", "from_pod", fromOutside.bytes(), next)
		r.wants(t, "NodePort from another client", "from_outside", r.between(s, client[i].Next(), nodeIP[i], 30080).bytes(), drop)

		// They end when policy does.
		r.set(t, in("b"))
		r.wants(t, "ClusterIP, established", "from_pod", asked.bytes(), drop)
		r.wants(t, "its answer", "from_pod", answer.bytes(), drop)
		r.wants(t, "NodePort, established", "from_outside", outside.bytes(), drop)
		r.wants(t, "its answer", "from_pod", fromOutside.bytes(), drop)
		r.wants(t, "but a pod reaches itself", "from_pod", hairpin.bytes(), redirect)
	})
}

// TestPolicyLostFlow: a connection outlives its entry: agent upgrades and full tables cost none.
func TestPolicyLostFlow(t *testing.T) {
	for i := range 2 {
		r := newPolicyRig(t)
		r.set(t, in("b", podPeer("a")), out("b"))
		s := segment{proto: maps.TCP, flags: ack, payload: []byte("x")}
		forth := r.between(s, podA[i], podB[i], 8080)
		r.wants(t, "from the one who opened it", "from_pod", forth.bytes(), redirect)
		back := r.between(s, podA[i], podB[i], 8080).back(ack)
		r.wants(t, "from the one who did not", "from_pod", back.bytes(), redirect)
		r.set(t, in("a"))
		r.wants(t, "judged again", "from_pod", back.bytes(), redirect)
		r.wants(t, "and its answer", "from_pod", back.back(ack).bytes(), redirect)
		r.wants(t, "neither may have opened it", "from_pod", r.between(s, podB[i], podA[i], 8080).bytes(), drop)
		s.flags = syn
		r.wants(t, "one that opens", "from_pod", r.between(s, podA[i], podB[i], 8080).back(syn).bytes(), drop)
		s.proto = maps.UDP
		r.wants(t, "UDP opens with every packet", "from_pod", r.between(s, podA[i], podB[i], 8080).back(0).bytes(), drop)
	}
}

// ip builds a packet of any protocol.
func ip(from, to netip.Addr, proto uint8, l4 []byte) []byte {
	s := segment{proto: maps.UDP, from: at(from, 0), to: at(to, 0)}
	frame := s.bytes()
	if from.Is4() {
		frame = append(frame[:34], l4...)
		frame[23] = proto
		binary.BigEndian.PutUint16(frame[16:], uint16(20+len(l4)))
		frame[24], frame[25] = 0, 0
		binary.BigEndian.PutUint16(frame[24:], ^fold(sum(0, frame[14:34])))
		return frame
	}
	frame = append(frame[:54], l4...)
	frame[20] = proto
	binary.BigEndian.PutUint16(frame[18:], uint16(len(l4)))
	return frame
}

// fragment is a piece of a UDP datagram.
func fragment(s segment, id uint16, first bool) []byte {
	l4 := make([]byte, 16)
	if first {
		binary.BigEndian.PutUint16(l4[0:], s.from.Port())
		binary.BigEndian.PutUint16(l4[2:], s.to.Port())
	}
	offset, more := uint16(0), uint16(1)
	if !first {
		offset, more = 2, 0
	}
	if s.from.Addr().Is4() {
		frame := ip(s.from.Addr(), s.to.Addr(), maps.UDP, l4)
		binary.BigEndian.PutUint16(frame[18:], id)
		binary.BigEndian.PutUint16(frame[20:], more<<13|offset)
		return frame
	}
	header := []byte{maps.UDP, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint16(header[2:], offset<<3|more)
	binary.BigEndian.PutUint16(header[6:], id)
	return ip(s.from.Addr(), s.to.Addr(), 44, append(header, l4...))
}

// TestPolicyStateless: ICMP, fragments, SCTP, and protocols that nobody knows.
func TestPolicyStateless(t *testing.T) {
	for i := range 2 {
		r := newPolicyRig(t)
		icmp, echo, echoReply, tooBig, discovery := uint8(1), byte(8), byte(0), byte(3), byte(0)
		if i == 1 {
			icmp, echo, echoReply, tooBig, discovery = 58, 128, 129, 2, 136
		}
		message := func(kind byte, about []byte) []byte { return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, about...) }
		everything := in("b")
		everything.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{podPeer("a")}}}
		r.wants(t, "echo, no policy", "from_pod", ip(podA[i], podB[i], icmp, message(echo, nil)), redirect)
		r.set(t, in("b", podPeer("a")))
		r.wants(t, "echo, ports only", "from_pod", ip(podA[i], podB[i], icmp, message(echo, nil)), drop)
		r.wants(t, "echo from b", "from_pod", ip(podB[i], podA[i], icmp, message(echo, nil)), redirect)
		r.wants(t, "the reply to b", "from_pod", ip(podA[i], podB[i], icmp, message(echoReply, nil)), redirect)
		r.wants(t, "ESP", "from_pod", ip(podA[i], podB[i], 50, message(0, nil)), drop)
		r.wants(t, "ICMP without a type", "from_pod", ip(podA[i], podB[i], icmp, nil), drop)
		if i == 1 {
			r.wants(t, "neighbour discovery", "from_pod", ip(podA[i], podB[i], icmp, message(discovery, nil)), redirect)
		}

		// Path MTU: an error about what b sent reaches it, about anything else not.
		sent := r.between(segment{proto: maps.UDP, payload: []byte("x")}, podB[i], client[i], 9)
		r.wants(t, "b sends", "from_pod", sent.bytes(), next)
		r.arrives(t, "an error about it", ip(client[i].Next(), podB[i], icmp, message(tooBig, sent.bytes()[14:])), next)
		r.arrives(t, "an error about another's", ip(client[i].Next(), podB[i], icmp, message(tooBig, r.between(sent, podA[i], client[i], 9).bytes()[14:])), drop)
		r.arrives(t, "an error cut short", ip(client[i].Next(), podB[i], icmp, message(tooBig, sent.bytes()[14:30])), drop)
		r.set(t, in("b"), out("b"))
		r.arrives(t, "an error about what b may not send", ip(client[i].Next(), podB[i], icmp, message(tooBig, r.between(sent, podB[i], client[i], 9).bytes()[14:])), drop)
		r.unset(t, "out-b")

		r.set(t, everything)
		r.wants(t, "echo, every protocol", "from_pod", ip(podA[i], podB[i], icmp, message(echo, nil)), redirect)
		r.wants(t, "ESP, every protocol", "from_pod", ip(podA[i], podB[i], 50, message(0, nil)), redirect)

		r.set(t, in("b", podPeer("a")))
		right, wrong := r.between(segment{}, podA[i], podB[i], 8080), r.between(segment{}, podA[i], podB[i], 8081)
		r.wants(t, "a later fragment before the first", "from_pod", fragment(right, 1, false), drop)
		r.wants(t, "a first fragment", "from_pod", fragment(right, 1, true), redirect)
		r.wants(t, "a later fragment", "from_pod", fragment(right, 1, false), redirect)
		r.wants(t, "of another datagram", "from_pod", fragment(right, 2, false), drop)
		r.wants(t, "a first fragment to another port", "from_pod", fragment(wrong, 3, true), drop)
		r.wants(t, "a later fragment to another port", "from_pod", fragment(wrong, 3, false), drop)
		answer := right.back(0)
		answer.proto, answer.payload = maps.UDP, []byte("x")
		r.wants(t, "the answer to fragments", "from_pod", answer.bytes(), redirect)
		if n := drops(t, r, "fragment-before-first"); n != 3 {
			t.Errorf("%d fragments dropped", n)
		}

		sctp := func(s segment) []byte {
			l4 := make([]byte, 16)
			binary.BigEndian.PutUint16(l4[0:], s.from.Port())
			binary.BigEndian.PutUint16(l4[2:], s.to.Port())
			return ip(s.from.Addr(), s.to.Addr(), maps.SCTP, l4)
		}
		assoc := r.between(segment{}, podA[i], podB[i], 8080)
		r.wants(t, "SCTP", "from_pod", sctp(assoc), redirect)
		r.wants(t, "SCTP, the answer", "from_pod", sctp(assoc.back(0)), redirect)
		r.wants(t, "SCTP, another port", "from_pod", sctp(r.between(segment{}, podA[i], podB[i], 8081)), drop)
		r.arrives(t, "SCTP from elsewhere", sctp(r.between(segment{}, podC[i], podB[i], 8080)), drop)

		// What cannot be read is not let through to pods once there are policies.
		whole := r.between(segment{proto: maps.TCP, flags: syn}, podC[i], podB[i], 8080)
		whole.wrongPayload = 1
		r.arrives(t, "a length beyond the packet", whole.bytes(), drop)
	}
}
