// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
	"sigs.k8s.io/network-policy-api/apis/v1beta1"

	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/policy"
	"skep.io/skep/dataplane/policy/model"
)

// TestRandomPackets: in random clusters of services and policies, what from_pod does with random packets, whole, cut
// short and with flipped bytes, is what the model says: nothing passes that it denies, nothing is dropped that it
// allows, and what a service is asked goes to its backend.
func TestRandomPackets(t *testing.T) {
	r := newPolicyRig(t)
	compared := map[bool]int{}
	rapid.Check(t, func(rt *rapid.T) {
		w := randomWorld(t, r, rt)
		for range 40 {
			i := rapid.IntRange(0, 1).Draw(rt, "family")
			packet, whole := w.packet(rt, i)
			verdict, out, err := r.Program("from_pod").Test(packet)
			if err != nil {
				if whole {
					rt.Fatalf("%x: %v", packet, err)
				}
				continue // the kernel refuses some cut ones before the program runs
			}
			if verdict != next && verdict != drop && verdict != redirect || len(out) != len(packet) {
				rt.Fatalf("%x: verdict %d, %d bytes became %d", packet, int32(verdict), len(packet), len(out))
			}
			p := dissect(packet)
			passes, known, to := w.expect(p)
			if known {
				compared[passes]++
				if passes != (verdict != drop) {
					rt.Fatalf("%+v: the program's verdict is %d, the model says %t; policies %v %v", p, int32(verdict), passes, w.Policies, w.ClusterPolicies)
				}
			}
			if known && passes && to.IsValid() {
				if got := dissect(out); got.to != to {
					rt.Fatalf("%+v was sent to %s, want %s", p, got.to, to)
				}
			}
		}
	})
	t.Logf("%d packets passed, %d were dropped", compared[true], compared[false])
	if compared[true] == 0 || compared[false] == 0 {
		t.Errorf("compared %v packets by whether they pass", compared)
	}
}

// packetWorld is what the model knows of the rig.
type packetWorld struct {
	model.Cluster
	rig     *policyRig
	backend [2]netip.Addr
}

// randomWorld puts policies and the services' backend into the kernel.
func randomWorld(t *testing.T, r *policyRig, rt *rapid.T) *packetWorld {
	w := &packetWorld{rig: r}
	w.Namespaces = []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "ns"}}}
	for name, pod := range r.pods {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name, Labels: pod.Labels}}
		for _, a := range pod.Addrs {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a.String()})
		}
		w.Pods = append(w.Pods, p)
	}
	w.backend = rapid.SampledFrom([][2]netip.Addr{podB, podC}).Draw(rt, "backend")
	r.backends(t, w.backend)
	for n := range 2 {
		name := fmt.Sprint("p", n)
		if !rapid.Bool().Draw(rt, "is a policy") {
			r.table.DeletePolicy(types.NamespacedName{Namespace: "ns", Name: name})
			continue
		}
		np := randomPolicy(rt, name)
		w.Policies = append(w.Policies, np)
		r.table.SetPolicy(np)
	}
	for n := range 2 {
		name := fmt.Sprint("c", n)
		if !rapid.Bool().Draw(rt, "is a cluster policy") {
			r.table.DeleteClusterPolicy(name)
			continue
		}
		o := randomClusterPolicy(rt, name)
		w.ClusterPolicies = append(w.ClusterPolicies, o)
		r.table.SetClusterPolicy(o)
	}
	if err := r.table.Flush(r.Maps()); err != nil {
		rt.Fatal(err)
	}
	if err := r.table.Collect(r.Maps(), func(policy.SetInfo, uint64) {}); err != nil {
		rt.Fatal(err)
	}
	// What does not fit closes its pods, which other tests look at, and of which the model knows nothing.
	if p := r.table.Problems(); len(p) > 0 {
		rt.Skipf("too many rules for the rig's small map: %v", p)
	}
	return w
}

func randomApp(rt *rapid.T) metav1.LabelSelector {
	if app := rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(rt, "app"); app != "" {
		return appIs(app)
	}
	return metav1.LabelSelector{}
}

var networks = []string{"0.0.0.0/0", "::/0", "10.142.0.0/29", "10.142.0.3/32", "fd73:6b65:a042::/64", "10.143.0.0/16", "192.0.2.0/24", "2001:db8::/32"}

func randomPolicy(rt *rapid.T, name string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}}
	np.Spec.PodSelector = randomApp(rt)
	peers := func() (out []networkingv1.NetworkPolicyPeer) {
		for range rapid.IntRange(0, 2).Draw(rt, "peers") {
			if rapid.Bool().Draw(rt, "block") {
				out = append(out, blockPeer(rapid.SampledFrom(networks).Draw(rt, "network")))
			} else {
				app := randomApp(rt)
				out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: &app})
			}
		}
		return out
	}
	ports := func() (out []networkingv1.NetworkPolicyPort) {
		for range rapid.IntRange(0, 2).Draw(rt, "ports") {
			proto := rapid.SampledFrom([]corev1.Protocol{"TCP", "UDP", "SCTP"}).Draw(rt, "protocol")
			p := networkingv1.NetworkPolicyPort{Protocol: &proto, Port: new(intstr.FromInt32(8080))}
			if rapid.Bool().Draw(rt, "range") {
				p.Port, p.EndPort = new(intstr.FromInt32(1)), new(int32(8080))
			}
			out = append(out, p)
		}
		return out
	}
	if rapid.Bool().Draw(rt, "ingress") {
		np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
		for range rapid.IntRange(0, 2).Draw(rt, "rules") {
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(), Ports: ports()})
		}
	}
	if len(np.Spec.PolicyTypes) == 0 || rapid.Bool().Draw(rt, "egress") {
		np.Spec.PolicyTypes = append(np.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		for range rapid.IntRange(0, 2).Draw(rt, "rules") {
			np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(), Ports: ports()})
		}
	}
	return np
}

func randomClusterPolicy(rt *rapid.T, name string) *v1beta1.ClusterNetworkPolicy {
	o := &v1beta1.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	o.Spec.Tier = rapid.SampledFrom([]v1beta1.Tier{v1beta1.AdminTier, v1beta1.BaselineTier}).Draw(rt, "tier")
	o.Spec.Priority = rapid.Int32Range(0, 2).Draw(rt, "priority")
	pods := func() *v1beta1.NamespacedPod { return &v1beta1.NamespacedPod{PodSelector: randomApp(rt)} }
	o.Spec.Subject.Pods = pods()
	action := func() v1beta1.ClusterNetworkPolicyRuleAction {
		return rapid.SampledFrom([]v1beta1.ClusterNetworkPolicyRuleAction{"Accept", "Deny", "Pass"}).Draw(rt, "action")
	}
	protocols := func() []v1beta1.ClusterNetworkPolicyProtocol {
		port := &v1beta1.Port{Number: 8080}
		switch rapid.IntRange(0, 2).Draw(rt, "protocol") {
		case 0:
			return []v1beta1.ClusterNetworkPolicyProtocol{{TCP: &v1beta1.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}}}
		case 1:
			return []v1beta1.ClusterNetworkPolicyProtocol{{UDP: &v1beta1.ClusterNetworkPolicyProtocolUDP{DestinationPort: port}}}
		}
		return nil
	}
	for range rapid.IntRange(0, 2).Draw(rt, "ingress rules") {
		o.Spec.Ingress = append(o.Spec.Ingress, v1beta1.ClusterNetworkPolicyIngressRule{
			Action: action(), From: []v1beta1.ClusterNetworkPolicyIngressPeer{{Pods: pods()}}, Protocols: protocols(),
		})
	}
	for range rapid.IntRange(0, 2).Draw(rt, "egress rules") {
		peer := v1beta1.ClusterNetworkPolicyEgressPeer{Pods: pods()}
		if rapid.Bool().Draw(rt, "networks") {
			peer = v1beta1.ClusterNetworkPolicyEgressPeer{Networks: []v1beta1.CIDR{v1beta1.CIDR(rapid.SampledFrom(networks).Draw(rt, "network"))}}
		}
		o.Spec.Egress = append(o.Spec.Egress, v1beta1.ClusterNetworkPolicyEgressRule{
			Action: action(), To: []v1beta1.ClusterNetworkPolicyEgressPeer{peer}, Protocols: protocols(),
		})
	}
	return o
}

// packet draws one of a connection that nobody knows yet. whole is false if it was cut or bytes were flipped.
func (w *packetWorld) packet(rt *rapid.T, i int) (b []byte, whole bool) {
	from := rapid.SampledFrom([]netip.Addr{podA[i], podA[i], podB[i], podB[i], podC[i], client[i]}).Draw(rt, "from")
	to := rapid.SampledFrom([]netip.AddrPort{
		at(podA[i], 8080), at(podB[i], 8080), at(podC[i], 8080), at(podB[i], 8081), at(vip[i], 80), at(nodeIP[i], 30080),
		at(nodeIP[i], 22), at(gateway[i], 53), at(client[i], 8080),
	}).Draw(rt, "to")
	return w.draw(rt, i, from, to)
}

// draw draws one between these.
func (w *packetWorld) draw(rt *rapid.T, i int, from netip.Addr, to netip.AddrPort) (b []byte, whole bool) {
	s := segment{
		proto: rapid.SampledFrom([]uint8{maps.TCP, maps.UDP, maps.SCTP, 1}).Draw(rt, "protocol"), to: to,
		flags: rapid.SampledFrom([]uint8{syn, syn, ack, syn | ack}).Draw(rt, "flags"), payload: []byte("payload"),
	}
	w.rig.port++
	s.from = at(from, 1024+w.rig.port%60000)
	b = s.bytes()
	if s.proto == 1 {
		icmp, echo := uint8(1), byte(8)
		if i == 1 {
			icmp, echo = 58, 128
		}
		b = ip(from, to.Addr(), icmp, []byte{echo, 0, 0, 0, 0, 1, 0, 1})
	}
	switch rapid.IntRange(0, 5).Draw(rt, "damage") {
	case 0:
		return b[:rapid.IntRange(15, len(b)-1).Draw(rt, "length")], false
	case 1:
		for range rapid.IntRange(1, 3).Draw(rt, "flips") {
			b[rapid.IntRange(14, len(b)-1).Draw(rt, "byte")] ^= byte(1) << rapid.IntRange(0, 7).Draw(rt, "bit")
		}
		return b, false
	}
	return b, true
}

// dissected is a packet as the model sees it.
type dissected struct {
	from     netip.Addr
	to       netip.AddrPort
	proto    uint8
	flags    byte
	icmp     byte // its type
	broken   bool // contradicts itself, or ends too early
	fragment bool
	strange  bool // what the model knows nothing of
}

func dissect(b []byte) (p dissected) {
	l3 := b[14:]
	var l4 []byte
	switch {
	case binary.BigEndian.Uint16(b[12:]) == 0x0800:
		if len(l3) < 20 || l3[0]>>4 != 4 || l3[0]&15 < 5 {
			return dissected{broken: true}
		}
		header, total := int(l3[0]&15)*4, int(binary.BigEndian.Uint16(l3[2:]))
		if total < header || total > len(l3) {
			return dissected{broken: true}
		}
		p.from, _ = netip.AddrFromSlice(l3[12:16])
		to, _ := netip.AddrFromSlice(l3[16:20])
		p.to, p.proto = at(to, 0), l3[9]
		p.fragment = binary.BigEndian.Uint16(l3[6:])&0x3fff != 0
		l4 = l3[min(header, len(l3)):]
	default:
		if len(l3) < 40 || l3[0]>>4 != 6 || int(binary.BigEndian.Uint16(l3[4:]))+40 > len(l3) {
			return dissected{broken: true}
		}
		p.from, _ = netip.AddrFromSlice(l3[8:24])
		to, _ := netip.AddrFromSlice(l3[24:40])
		p.to, p.proto = at(to, 0), l3[6]
		p.strange = slices.Contains([]uint8{0, 43, 60, 44}, p.proto) || p.from.Is4In6() || to.Is4In6()
		l4 = l3[40:]
	}
	if p.fragment || p.strange {
		return p
	}
	size := map[uint8]int{maps.TCP: 20, maps.UDP: 8, maps.SCTP: 12, 1: 1, 58: 1}[p.proto]
	if len(l4) < size {
		p.broken = true
		return p
	}
	switch p.proto {
	case maps.TCP, maps.UDP, maps.SCTP:
		p.to = at(p.to.Addr(), binary.BigEndian.Uint16(l4[2:]))
		if p.proto == maps.TCP {
			p.flags = l4[13]
		}
	case 1, 58:
		p.icmp = l4[0]
	}
	return p
}

func (p *dissected) opens() bool { return p.proto != maps.TCP || p.flags&(syn|ack) == syn }

func (p *dissected) connection() model.Connection {
	conn := model.Connection{From: p.from, To: p.to.Addr(), Port: int32(p.to.Port()), Proto: map[uint8]corev1.Protocol{
		maps.TCP: corev1.ProtocolTCP, maps.UDP: corev1.ProtocolUDP, maps.SCTP: corev1.ProtocolSCTP,
	}[p.proto]}
	if conn.Proto == "" {
		conn.Port = 0
	}
	return conn
}

// plain: a packet of which the model knows all that the programs look at.
func (p *dissected) plain() bool {
	echo := p.proto != 1 && p.proto != 58 || p.proto == 1 && p.icmp == 8 && p.from.Is4() || p.proto == 58 && p.icmp == 128 && p.from.Is6()
	return !p.broken && !p.strange && !p.fragment && p.from.IsValid() && echo
}

// expect says whether a packet that a pod sends passes, if the model knows, and where it goes if a service was asked.
func (w *packetWorld) expect(p dissected) (passes, known bool, to netip.AddrPort) {
	i := 0
	if p.from.Is6() {
		i = 1
	}
	switch {
	case p.broken && p.from != podA[i] && p.from != podB[i]:
		return false, true, to // whichever reason comes first
	case p.broken:
		return false, p.proto != 1 && p.proto != 58, to // without a policy nobody looks into ICMP
	case p.from != podA[i] && p.from != podB[i]:
		return false, !p.strange && p.proto != 58, to // neighbour discovery has other addresses
	case p.strange, p.fragment, !p.from.IsValid():
		return false, false, to
	case p.proto == 1 && p.icmp != 8, p.proto == 58 && p.icmp != 128:
		return false, false, to // an error or answer belongs to what it speaks of
	}
	conn, opens := p.connection(), p.opens()
	if service := p.to == at(vip[i], 80) || p.to == at(nodeIP[i], 30080); service && (p.proto == maps.TCP || p.proto == maps.UDP) {
		if !opens {
			return false, false, to // the stack decides what no connection is known for
		}
		to = at(w.backend[i], 8080)
		conn.To, conn.Port = to.Addr(), 8080
	}
	passes, known = w.judge(conn, opens, i)
	return passes, known, to
}

// judge says whether a packet of a connection that nobody knows passes, if the model knows.
func (w *packetWorld) judge(conn model.Connection, opens bool, i int) (passes, known bool) {
	if opens {
		return w.permits(conn, i), w.knows(conn, i)
	}
	// A segment of a connection whose entry was lost: either end may have opened it.
	back := conn
	back.From, back.To = conn.To, conn.From
	back.Port = -1 // nobody listens on ports as high as the drawn ones, so that no rule names them
	return w.permits(conn, i) || w.permits(back, i), w.knows(conn, i) && w.knows(back, i) && !w.namesPorts()
}

// permits: what a pod sends to its own node passes, and the model knows only pods of this node and elsewhere.
func (w *packetWorld) permits(conn model.Connection, i int) bool {
	egress := conn.From == podC[i] || w.Egress(conn) || conn.To == gateway[i] || conn.To == nodeIP[i]
	return egress && (conn.To == podC[i] || w.Ingress(conn))
}

// knows: whether a rule of an administrator denies what is sent to the node, or none lets it pass, the model does not
// say; to the node the first counts, and the second does not.
func (w *packetWorld) knows(conn model.Connection, i int) bool {
	return conn.To != nodeIP[i] || len(w.ClusterPolicies) == 0
}

// namesPorts: the port that a lost connection was opened to is not known where rules name any.
func (w *packetWorld) namesPorts() bool {
	for _, p := range w.Policies {
		for _, r := range p.Spec.Ingress {
			if len(r.Ports) > 0 {
				return true
			}
		}
		for _, r := range p.Spec.Egress {
			if len(r.Ports) > 0 {
				return true
			}
		}
	}
	for _, p := range w.ClusterPolicies {
		for _, r := range p.Spec.Ingress {
			if len(r.Protocols) > 0 {
				return true
			}
		}
		for _, r := range p.Spec.Egress {
			if len(r.Protocols) > 0 {
				return true
			}
		}
	}
	return false
}
