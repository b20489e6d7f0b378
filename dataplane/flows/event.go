// SPDX-License-Identifier: Apache-2.0

package flows

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"skep.io/skep/dataplane/maps"
)

// Verdict says what became of a connection or packet.
type Verdict string

// Verdicts.
const (
	Forwarded Verdict = "forwarded" // a connection was opened
	Dropped   Verdict = "dropped"   // a packet
	Refused   Verdict = "refused"   // a socket was told so and no packet was sent, or whoever sent a packet is told
)

// Verdicts lists all.
var Verdicts = []Verdict{Forwarded, Dropped, Refused}

// Flow is one event with names. What is empty is unknown, or does not apply.
type Flow struct {
	Time        time.Time `json:"time"`
	Node        string    `json:"node"`
	Verdict     Verdict   `json:"verdict"`
	Reason      string    `json:"reason,omitempty"`
	Direction   string    `json:"direction,omitempty"` // of the policies that denied it: ingress or egress
	Policies    []string  `json:"policies,omitempty"`  // that select the pod, none of which lets it pass; or TIER/NAME that denies it
	Protocol    string    `json:"protocol"`
	Source      Peer      `json:"source"`
	Destination Peer      `json:"destination"`
	Service     *Service  `json:"service,omitempty"`    // that the client asked for
	Suppressed  uint32    `json:"suppressed,omitempty"` // events before this one that nobody was told of
}

// Peer is one end of a flow.
type Peer struct {
	Address   netip.Addr `json:"address"`
	Port      uint16     `json:"port,omitempty"`
	Namespace string     `json:"namespace,omitempty"`
	Pod       string     `json:"pod,omitempty"`
	Node      string     `json:"node,omitempty"` // if it is the node itself
}

// Service is what a client asked for.
type Service struct {
	Namespace string         `json:"namespace"`
	Name      string         `json:"name"`
	Address   netip.AddrPort `json:"address"`
}

// Names knows what the numbers in events stand for. Unknown ones are left as they are.
type Names interface {
	Pod(netip.Addr) (namespace, name string, ok bool)
	Device(ifindex uint32) (namespace, name string, ok bool)
	// Namespace is the pod with a network namespace, or "" for the node's own.
	Namespace(cookie uint64) (namespace, name string, ok bool)
	IsNode(netip.Addr) bool
	Service(id uint32) (namespace, name string, ok bool)
	// Policies of a set that denied a connection of a pod, by a rule of an administrator's if rule is not 0; why
	// says what else is the matter with it.
	Policies(set, rule uint32, namespace, pod, direction string) (policies []string, why string)
}

// Reasons of events about sockets, in the words of `skep flows`.
const (
	noBackend  = "no-backend"
	noFrontend = "no-such-service" // of a packet to an announced address
	noAddress  = "no-such-address"
)

// Read makes a Flow of an event. now is the same moment on both clocks.
func Read(e *maps.FlowEvent, node string, names Names, now Moment) Flow {
	f := Flow{
		Time: now.Time.Add(time.Duration(int64(e.At) - now.Monotonic)), Node: node, Verdict: Forwarded,
		Protocol: Protocol(e.Connection.Proto), Suppressed: e.Suppressed,
		Source:      Peer{Address: e.Connection.Saddr.Addr(), Port: e.Connection.Sport.Number()},
		Destination: Peer{Address: e.Connection.Daddr.Addr(), Port: e.Connection.Dport.Number()},
	}
	name := func(p *Peer) {
		p.Namespace, p.Pod, _ = names.Pod(p.Address)
		if p.Pod == "" && names.IsNode(p.Address) {
			p.Node = node
		}
	}
	name(&f.Source)
	name(&f.Destination)
	if e.Reason != 0 {
		f.Verdict = Dropped
		f.Reason, f.Direction = reason(e.Reason)
		if e.Reason == maps.EventNoBackend || f.Reason == noFrontend {
			f.Verdict = Refused
		}
	}
	if e.Reason != 0 && e.Netns != 0 { // a socket was told
		f.Verdict = Refused
		f.Source = Peer{}
		if namespace, pod, ok := names.Namespace(e.Netns); ok {
			f.Source.Namespace, f.Source.Pod = namespace, pod
			if pod == "" {
				f.Source.Node = node
			}
		}
	}
	if e.Ifindex != 0 && f.Source.Pod == "" {
		// What a pod sends in the name of another is the pod's.
		f.Source.Namespace, f.Source.Pod, _ = names.Device(e.Ifindex)
	}
	if e.Service != 0 {
		s := &Service{Address: netip.AddrPortFrom(e.Frontend.Addr(), e.FrontendPort.Number())}
		s.Namespace, s.Name, _ = names.Service(e.Service)
		f.Service = s
	}
	if f.Direction != "" {
		pod := f.Destination
		if f.Direction == "egress" {
			pod = f.Source
		}
		var why string
		if f.Policies, why = names.Policies(e.Set, e.Rule, pod.Namespace, pod.Pod, f.Direction); why != "" {
			f.Reason = why
		}
	}
	return f
}

// reason names why, and for policies the direction.
func reason(r uint8) (text, direction string) {
	switch r {
	case maps.EventNoBackend:
		return noBackend, ""
	case maps.EventNoAddress:
		return noAddress, ""
	}
	if int(r) >= len(Counters) {
		return fmt.Sprintf("unknown-%d", r), ""
	}
	text = Counters[r].Labels["reason"]
	if d, ok := strings.CutPrefix(text, "policy-"); ok && d != "closed" {
		direction = d
	}
	return text, direction
}

// Protocol names an IP protocol; those without a name here are numbers.
func Protocol(p uint8) string {
	switch p {
	case 1:
		return "ICMP"
	case maps.TCP:
		return "TCP"
	case maps.UDP:
		return "UDP"
	case 58:
		return "ICMPv6"
	case maps.SCTP:
		return "SCTP"
	}
	return fmt.Sprint(p)
}
