// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// Question is a connection that somebody may want to open.
type Question struct {
	From     netip.Addr // of a pod of this node, or elsewhere; invalid: this node itself asks
	FromPort uint16     // 0: not known yet
	To       netip.AddrPort
	Protocol uint8
	Now      int64        // of the monotonic clock, ns: for session affinity
	Self     []netip.Addr // this node's, by which a Service's source ranges know it
}

// Trace says what becomes of it on this node, and why.
type Trace struct {
	Node     string        `json:"node"`
	From     flows.Peer    `json:"from"`
	To       flows.Peer    `json:"to"`
	Protocol string        `json:"protocol"`
	Service  *Frontend     `json:"service,omitempty"` // that .To is an address of
	Verdict  flows.Verdict `json:"verdict,omitempty"` // empty: it depends on which backend is chosen
	Reason   string        `json:"reason,omitempty"`
	Paths    []Path        `json:"paths,omitempty"`  // one for each backend, or the only one
	Choice   string        `json:"choice,omitempty"` // why it is this backend, where that is certain
	Advice   []string      `json:"advice,omitempty"`
}

// Path leads to one address.
type Path struct {
	To      flows.Peer    `json:"to"`
	Egress  *Judgement    `json:"egress,omitempty"` // by the policies of the asking pod, if it is of this node
	Ingress *Judgement    `json:"ingress,omitempty"`
	Route   string        `json:"route"`
	Away    bool          `json:"away,omitempty"` // the other node judges what comes in to its pods
	Verdict flows.Verdict `json:"verdict"`
	Reason  string        `json:"reason,omitempty"`
}

// Judgement of policies.
type Judgement struct {
	State    string   `json:"state"` // Open, Judged or Closed
	Policies []string `json:"policies,omitempty"`
	Allowed  bool     `json:"allowed"`
	Why      string   `json:"why,omitempty"`
	Rule     bool     `json:"rule,omitempty"` // of an administrator's policy denies it
}

// Tables are what the programs read; *maps.Maps is the real one.
type Tables interface {
	Service(maps.ServiceKey) (maps.Service, bool, error)
	Admits(maps.Service, netip.Addr) (bool, error)
	Consistent(s maps.Service, hash uint32) (maps.Backend, bool, error)
	Kept(s maps.Service, client netip.Addr, now int64) (maps.Backend, bool, error)
	BackendsOf(maps.Service) ([]maps.Backend, error)
	Endpoint(netip.Addr) (maps.Endpoint, bool, error)
	Range(netip.Addr) (kind uint32, found bool, err error)
	IsNodeAddress(netip.Addr) (bool, error)
	PolicySets(slot uint32) (maps.PolicySets, error)
	Peer(scope uint32, a netip.Addr) (uint32, error)
	Policy(set, peer uint32, proto uint8, port uint16) (maps.PolicyVerdict, bool, error)
}

// Route says which way the node's stack sends what goes to an address; an error that it refuses.
type Route func(to netip.Addr) (string, error)

type tracer struct {
	Tables
	names flows.Names
	route Route
	node  string
	q     Question
}

// Explain looks up what the programs look up, in their order.
func Explain(q Question, node string, tables Tables, names flows.Names, route Route) (out Trace, err error) {
	q.From, q.To = q.From.Unmap(), netip.AddrPortFrom(q.To.Addr().Unmap(), q.To.Port())
	t := &tracer{tables, names, route, node, q}
	out = Trace{Node: node, Protocol: flows.Protocol(q.Protocol), To: peerOf(names, q.To.Addr(), q.To.Port(), node)}
	if q.From.IsValid() {
		out.From = peerOf(names, q.From, 0, node)
	} else {
		out.From.Node = node
	}
	service, external, found, err := t.frontend()
	if err != nil {
		return out, err
	}
	targets := []netip.AddrPort{q.To}
	if found {
		all, err := t.BackendsOf(service)
		if err != nil {
			return out, err
		}
		f := Frontends(snapshotOf(service, all), names)[0]
		out.Service, targets = &f, f.Backends
		if ok, err := t.admitted(service); err != nil {
			return out, err
		} else if !ok {
			out.Verdict, out.Reason = flows.Refused, "source-range"
			if external {
				out.Verdict = flows.Dropped
			}
			out.Advice = []string{fmt.Sprintf("The loadBalancerSourceRanges of Service %s/%s do not hold %s: add it, or ask from elsewhere.", f.Namespace, f.Service, text(&out.From))}
			return out, nil
		}
		if len(targets) == 0 {
			out.Verdict, out.Reason = flows.Refused, "no-backend"
			out.Advice = []string{fmt.Sprintf("Service %s/%s has no endpoint that serves: look at `skep get endpointslices -n %s -l kubernetes.io/service-name=%s` and at its selector.",
				f.Namespace, f.Service, f.Namespace, f.Service)}
			return out, nil
		}
		if to, why, err := t.pick(service, external); err != nil {
			return out, err
		} else if why != "" {
			targets, out.Choice = []netip.AddrPort{to}, why
		}
	} else if dead, err := t.dead(q.To.Addr()); err != nil || dead {
		out.Verdict, out.Reason = flows.Refused, "no-such-address"
		out.Advice = []string{fmt.Sprintf("Nobody in the cluster has the address %s with port %d: no Service, and no pod of node %s.", q.To.Addr(), q.To.Port(), node)}
		return out, err
	}
	for _, to := range targets {
		p, advice, err := t.path(to)
		if err != nil {
			return out, err
		}
		out.Paths = append(out.Paths, p)
		if advice != "" && !slices.Contains(out.Advice, advice) {
			out.Advice = append(out.Advice, advice)
		}
	}
	out.Verdict, out.Reason = Sum(out.Paths)
	return out, nil
}

// Sum is the verdict of all paths if they agree.
func Sum(paths []Path) (verdict flows.Verdict, reason string) {
	if len(paths) == 0 {
		return "", ""
	}
	verdict, reason = paths[0].Verdict, paths[0].Reason
	for _, p := range paths {
		if p.Verdict != verdict {
			return "", "depends on the backend"
		}
	}
	return verdict, reason
}

func snapshotOf(s maps.Service, backends []maps.Backend) maps.Snapshot {
	out := maps.Snapshot{Services: map[maps.ServiceKey]maps.Service{s.Key: s}, Slots: map[maps.SlotKey]uint32{}, Backends: map[uint32]maps.Backend{}}
	for i, b := range backends {
		out.Slots[maps.SlotKey{Service: s.ID, Generation: s.Generation, Slot: uint32(i)}], out.Backends[uint32(i)] = uint32(i), b
	}
	return out
}

// admitted is service_admits of bpf/services.h.
func (t *tracer) admitted(s maps.Service) (bool, error) {
	client := t.q.From
	for _, a := range t.q.Self {
		if !client.IsValid() && a.Is4() == t.q.To.Addr().Is4() {
			client = a
		}
	}
	return t.Admits(s, client)
}

// pick is backend_select of bpf/services.h, where it does not choose at random; else why is empty.
func (t *tracer) pick(s maps.Service, external bool) (to netip.AddrPort, why string, err error) {
	client, sport, dport := t.q.From, t.q.FromPort, t.q.To.Port()
	if !client.IsValid() {
		return to, "", nil // the node's own sockets are known by their namespace
	}
	at := func(b maps.Backend) netip.AddrPort { return netip.AddrPortFrom(b.Addr.Addr(), b.Port.Number()) }
	if s.Flags&maps.ServiceAffinity != 0 {
		b, found, err := t.Kept(s, client, t.q.Now)
		if err != nil || found {
			return at(b), "session affinity: the client has had it", err
		}
		sport, dport = 0, 0
	} else if !external || sport == 0 {
		return to, "", nil // sockets choose before they have a port
	}
	if s.Flags&maps.ServiceMaglev == 0 {
		return to, "", nil
	}
	b, found, err := t.Consistent(s, maps.ClientHash(client, sport, dport))
	if err != nil || !found {
		return to, "", err
	}
	if sport == 0 {
		return at(b), "session affinity: the consistent table gives it to the client's address", nil
	}
	return at(b), "the consistent table gives it to the client's address and port", nil
}

// frontend is what a socket would be translated by; asked from outside, what the host's programs would.
func (t *tracer) frontend() (s maps.Service, external, found bool, err error) {
	to := t.q.To
	k := maps.ServiceKey{Addr: maps.AddressOf(to.Addr()), Port: maps.PortOf(to.Port()), Proto: t.q.Protocol, Scope: maps.ScopeInternal}
	if t.q.From.IsValid() {
		_, here, err := t.Endpoint(t.q.From)
		if err != nil {
			return s, false, false, err
		}
		if external = !here; external {
			k.Scope = maps.ScopeExternal
		}
	}
	if s, found, err = t.Tables.Service(k); err != nil || found {
		return s, external, found, err
	}
	own, err := t.IsNodeAddress(to.Addr())
	if err != nil || !own && (t.q.From.IsValid() || !to.Addr().IsLoopback()) {
		return s, external, false, err
	}
	wildcard := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		wildcard = netip.IPv6Unspecified()
	}
	k.Addr = maps.AddressOf(wildcard)
	s, found, err = t.Tables.Service(k)
	return s, external, found, err
}

// dead is address_is_dead of bpf/endpoints.h.
func (t *tracer) dead(a netip.Addr) (bool, error) {
	kind, found, err := t.Range(a)
	if err != nil || !found || kind == maps.RangeOpen || kind == maps.RangeCluster {
		return false, err
	}
	_, here, err := t.Endpoint(a)
	return kind == maps.RangeService || !here, err
}

// path is permitted of bpf/policy.h, and what comes after it.
func (t *tracer) path(to netip.AddrPort) (p Path, advice string, err error) {
	p = Path{To: peerOf(t.names, to.Addr(), to.Port(), t.node), Verdict: flows.Forwarded}
	_, here, err := t.Endpoint(to.Addr())
	if err != nil {
		return p, "", err
	}
	if p.Route, err = t.way(to.Addr(), here); err != nil {
		p.Verdict, p.Reason = flows.Refused, "no-route"
		return p, fmt.Sprintf("Node %s knows no way to %s: %v.", t.node, to.Addr(), err), nil
	}
	if !t.q.From.IsValid() || t.q.From == to.Addr() {
		p.Away = !here && p.To.Node == ""
		return p, "", nil // what the node itself sends passes, and what a pod sends to itself
	}
	_, local, err := t.Endpoint(t.q.From)
	if err != nil {
		return p, "", err
	}
	if local {
		if p.Egress, err = t.judge(t.q.From, to.Addr(), to.Port(), "egress"); err != nil {
			return p, "", err
		}
		if !p.Egress.Allowed {
			if own, err := t.answers(to.Addr(), p.Egress.Rule); err != nil {
				return p, "", err
			} else if own {
				p.Egress.Allowed, p.Egress.Why = true, "a pod may always reach its node"
			}
		}
		if !p.Egress.Allowed {
			p.Verdict, p.Reason = flows.Dropped, reasonOf(p.Egress, "policy-egress")
			return p, t.advise(p.Egress, "egress", t.q.From, to), nil
		}
	}
	if !here {
		p.Away = true
		return p, "", nil
	}
	if p.Ingress, err = t.judge(to.Addr(), t.q.From, to.Port(), "ingress"); err != nil {
		return p, "", err
	}
	if !p.Ingress.Allowed {
		p.Verdict, p.Reason = flows.Dropped, reasonOf(p.Ingress, "policy-ingress")
		return p, t.advise(p.Ingress, "ingress", to.Addr(), netip.AddrPortFrom(t.q.From, to.Port())), nil
	}
	return p, "", nil
}

func reasonOf(j *Judgement, otherwise string) string {
	if j.State == Closed {
		return j.Why
	}
	return otherwise
}

// answers is to_this_node of bpf/policy.h; denied says that a rule of an administrator denies it.
func (t *tracer) answers(a netip.Addr, denied bool) (bool, error) {
	own, err := t.IsNodeAddress(a)
	if own = own && !denied; err != nil || own {
		return own, err
	}
	kind, found, err := t.Range(a)
	return found && kind == maps.RangeOpen, err
}

// judge is set_allows of bpf/policy.h for one direction of a pod.
func (t *tracer) judge(pod, peer netip.Addr, port uint16, direction string) (*Judgement, error) {
	e, _, err := t.Endpoint(pod)
	if err != nil {
		return nil, err
	}
	sets, err := t.PolicySets(e.Slot)
	if err != nil {
		return nil, err
	}
	set := sets.Ingress
	if direction == "egress" {
		set = sets.Egress
	}
	j := &Judgement{State: stateOf(set), Allowed: set == 0}
	if set == 0 {
		return j, nil
	}
	namespace, name, _ := t.names.Pod(pod)
	j.Policies, j.Why = t.names.Policies(set, maps.AnyRule, namespace, name, direction)
	if set == maps.PolicyClosed {
		return j, nil
	}
	var identities []uint32
	for _, scope := range []uint32{maps.EpochOf(set), set} {
		identity, err := t.Peer(scope, peer)
		if err != nil {
			return nil, err
		}
		identities = append(identities, identity)
	}
	var rule uint32
	j.Allowed, rule, err = maps.Judge(func(peer uint32) (maps.PolicyVerdict, bool, error) {
		return t.Policy(set, peer, t.q.Protocol, port)
	}, identities...)
	if !j.Allowed {
		j.Rule = rule != 0
		j.Policies, j.Why = t.names.Policies(set, rule, namespace, name, direction)
	}
	return j, err
}

// advise says what to change.
func (t *tracer) advise(j *Judgement, direction string, pod netip.Addr, peer netip.AddrPort) string {
	who := peerOf(t.names, pod, 0, t.node)
	other := peerOf(t.names, peer.Addr(), 0, t.node)
	list := strings.Join(j.Policies, ", ")
	switch {
	case j.Rule:
		return fmt.Sprintf("The administrator's policy %s denies it (%s of pod %s): no NetworkPolicy can let it pass. See `skep describe clusternetworkpolicy`.",
			list, direction, text(&who))
	case j.State == Closed && len(j.Policies) > 0:
		return fmt.Sprintf("Pod %s is closed (%s) as long as a policy cannot be put into force: see `skep describe networkpolicy` of %s.", text(&who), direction, list)
	case j.State == Closed:
		return fmt.Sprintf("Pod %s is closed until its policies are known: if that lasts, see the log of node %s.", text(&who), t.node)
	case direction == "egress":
		return fmt.Sprintf("Policies isolate what pod %s sends, and none of them lets it reach %s at port %d/%s: add an egress rule to one of %s.",
			text(&who), text(&other), peer.Port(), flows.Protocol(t.q.Protocol), list)
	}
	return fmt.Sprintf("Policies isolate pod %s, and none of them lets %s in to port %d/%s: add an ingress rule to one of %s.",
		text(&who), text(&other), peer.Port(), flows.Protocol(t.q.Protocol), list)
}

func text(p *flows.Peer) string {
	switch {
	case p.Pod != "":
		return p.Namespace + "/" + p.Pod
	case p.Node != "":
		return "node " + p.Node
	}
	return p.Address.String()
}

func (t *tracer) way(to netip.Addr, here bool) (string, error) {
	if here {
		e, _, err := t.Endpoint(to)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("straight to the pod's device (index %d)", e.Ifindex), nil
	}
	if own, err := t.answers(to, false); err != nil || own {
		return "the node itself answers", err
	}
	return t.route(to)
}
