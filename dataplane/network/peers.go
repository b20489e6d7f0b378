// SPDX-License-Identifier: Apache-2.0

package network

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// Routing is how nodes reach each other's pods.
type Routing string

// The two ways. VXLAN works on every network that carries UDP between the nodes; Direct costs nothing but
// needs all nodes on one link, and a network that does not mind packets with pods' addresses.
const (
	VXLAN  Routing = "vxlan"
	Direct Routing = "direct"
)

// Routings lists what ParseRouting knows.
var Routings = []Routing{VXLAN, Direct}

// ParseRouting reads a Routing; empty is VXLAN.
func ParseRouting(text string) (Routing, error) {
	r := cmp.Or(Routing(text), VXLAN)
	if !slices.Contains(Routings, r) {
		return "", fmt.Errorf("%q is none of %v", text, Routings)
	}
	return r, nil
}

// Peer is another node.
type Peer struct {
	Name     string
	Addrs    []netip.Addr // the primary one first
	PodCIDRs []netip.Prefix
}

// Self is this node, as its peers know it.
type Self struct {
	Addrs    []netip.Addr
	PodCIDRs []netip.Prefix
	Tunnel   int                // index of the VXLAN device; 0 with Direct
	Devices  map[netip.Addr]int // which device has an address of Addrs
}

// A peerRoute leads to a peer's pods; onlink says that the next hop needs no route of its own.
type peerRoute struct {
	dst    netip.Prefix
	via    netip.Addr
	src    netip.Addr // preferred source; may be invalid
	device int
	onlink bool
}

// A neighbour entry on the VXLAN device answers for a peer's gateway.
type neighbour struct {
	ip  netip.Addr
	mac [6]byte
}

// A forwarding entry (FDB) of the VXLAN device says where the node with a MAC is.
type forwarding struct {
	mac    [6]byte
	remote netip.Addr
}

// peering is everything in the kernel that is there for peers' sake.
type peering struct {
	routes      map[netip.Prefix]peerRoute
	neighbours  map[netip.Addr]neighbour
	forwardings map[[6]byte]forwarding
}

func newPeering() peering {
	return peering{map[netip.Prefix]peerRoute{}, map[netip.Addr]neighbour{}, map[[6]byte]forwarding{}}
}

// vtepMAC is the MAC of a node's end of the tunnel. It follows from the node's primary address, so nobody
// has to tell it to anybody; the second bit says that it is locally administered.
func vtepMAC(primary netip.Addr) (mac [6]byte) {
	sum := sha256.Sum256(primary.Unmap().AsSlice())
	copy(mac[:], sum[:])
	mac[0] = mac[0]&^1 | 2
	return mac
}

// underlay picks the family in which tunnels run: all of a cluster's nodes have to have it.
func underlay(addrs []netip.Addr) (v6 bool) {
	return !slices.ContainsFunc(addrs, netip.Addr.Is4)
}

func ofFamily(addrs []netip.Addr, v6 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// plan says what must be in the kernel for the peers. What cannot be is in problems, by the peer's name.
// It is pure; the order of peers does not matter.
func plan(routing Routing, self Self, peers []Peer) (want peering, problems map[string]string) {
	want, problems = newPeering(), map[string]string{}
	peers = slices.SortedFunc(slices.Values(peers), func(a, b Peer) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range peers {
		if len(p.Addrs) == 0 {
			continue // has not said yet where it is
		}
		for _, r := range p.PodCIDRs {
			r = r.Masked()
			if owner := overlapping(want.routes, self.PodCIDRs, r); owner != "" {
				problems[p.Name] = fmt.Sprintf("its pod range %s overlaps %s: delete one of the two nodes, and let it register anew", r, owner)
				continue
			}
			route, err := route(routing, self, p, r)
			if err != nil {
				problems[p.Name] = err.Error()
				continue
			}
			want.routes[r] = route
			if routing == VXLAN {
				mac := vtepMAC(p.Addrs[0])
				want.neighbours[route.via] = neighbour{route.via, mac}
				want.forwardings[mac] = forwarding{mac, ofFamily(p.Addrs, underlay(self.Addrs))}
			}
		}
	}
	return want, problems
}

func route(routing Routing, self Self, p Peer, r netip.Prefix) (peerRoute, error) {
	if routing == VXLAN {
		v6 := underlay(self.Addrs)
		if !ofFamily(p.Addrs, v6).IsValid() {
			return peerRoute{}, fmt.Errorf("it has no %s address, in which this node's tunnels run: give it one with --node-ip", family(v6))
		}
		out := peerRoute{dst: r, via: Gateway(r), device: self.Tunnel, onlink: true}
		for _, own := range self.PodCIDRs {
			if own.Addr().Is6() == r.Addr().Is6() {
				// What the node itself sends to pods elsewhere is answered through the tunnel, too.
				out.src = Gateway(own)
			}
		}
		return out, nil
	}
	v6 := r.Addr().Is6()
	via, own := ofFamily(p.Addrs, v6), ofFamily(self.Addrs, v6)
	if !via.IsValid() || !own.IsValid() {
		return peerRoute{}, fmt.Errorf("there is no %s address of both nodes to route %s by: give them one with --node-ip, or use --routing=vxlan", family(v6), r)
	}
	return peerRoute{dst: r, via: via, device: self.Devices[own]}, nil
}

// overlapping names what a range overlaps, or is "".
func overlapping(routes map[netip.Prefix]peerRoute, own []netip.Prefix, r netip.Prefix) string {
	for _, o := range own {
		if o.Overlaps(r) {
			return "this node's " + o.String()
		}
	}
	for o := range routes {
		if o.Overlaps(r) {
			return "another node's " + o.String()
		}
	}
	return ""
}

func family(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

func hardware(mac [6]byte) net.HardwareAddr { return mac[:] }
